"""Describe and change the inputs and outputs of ONNX graphs."""

from __future__ import annotations

from onnx import ModelProto, ValueInfoProto, helper


def fix_dimension(model: ModelProto, name: str, size: int) -> None:
    """Replace a symbolic dimension of a model's values by a size."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == name:
                dimension.dim_value = size


def tensor_shape(value: ValueInfoProto) -> list[int | str]:
    """Return a value's shape, with names for symbolic dimensions."""
    return [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


def tensor_dtype(value: ValueInfoProto) -> str:
    """Return the NumPy name of a value's dtype."""
    return str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)
