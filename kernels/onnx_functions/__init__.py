"""ONNX functions of the domain ``fusion_edge``: each of our operators, defined in standard operators.

A runtime without our kernels inlines them. The CPU kernels (``kernels/cpu/``) and the TensorRT plugins
(``kernels/tensorrt_plugins.py``) implement them as single operators.
"""
