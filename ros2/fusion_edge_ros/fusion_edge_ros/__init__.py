"""A ROS 2 node that answers questions about camera frames with a FUSION bundle.

``frames``, ``questions``, ``answering`` and ``settings`` need no ROS; the other modules need rclpy.
"""
