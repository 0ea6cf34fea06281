"""Start the node, which configures and activates itself.

ros2 launch fusion_edge_ros fusion_edge.launch.py bundle:=BUNDLE image:=/camera/image_raw question:="Is the path clear?"
"""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

DEFAULTS = PathJoinSubstitution([FindPackageShare("fusion_edge_ros"), "config", "fusion_edge.yaml"])
ARGUMENTS = {
    "params_file": (DEFAULTS, "YAML file of parameters"),
    "bundle": ("", "folder of the bundle, or hub id; default: that of the file"),
    "question": ("", "question about each newest frame; default: that of the file"),
    "image": ("image", "topic of the frames; CompressedImage if it ends with /compressed"),
    "autostart": ("true", "whether the node configures and activates itself"),
    "name": ("fusion_edge", "name of the node"),
    "namespace": ("", "its namespace"),
}


def generate_launch_description() -> LaunchDescription:
    """Return the arguments and the node."""
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=node)])


def node(context: LaunchContext) -> list[LifecycleNode]:
    """Return the node, with the parameters that are given."""
    values = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    given = {name: ParameterValue(values[name], value_type=str) for name in ("bundle", "question") if values[name]}
    autostart = ParameterValue(LaunchConfiguration("autostart"), value_type=bool)
    return [
        LifecycleNode(
            package="fusion_edge_ros",
            executable="fusion_edge_node",
            name=values["name"],
            namespace=values["namespace"],
            parameters=[values["params_file"], {**given, "autostart": autostart}],
            remappings=[("image", values["image"])],
            output="screen",
        )
    ]
