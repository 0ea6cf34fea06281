"""Describe and change the inputs, outputs and other values of ONNX graphs."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, ValueInfoProto, helper, shape_inference


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


def inferred_values(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Infer values between the nodes, by name. Each dimension is a size or ``NAME`` or ``NAME+SIZE`` of the inputs.

    Inference of ONNX loses names where nodes compute with sizes. So it runs twice, with sizes in place of the names. A
    value is missing if one of its dimensions is another function of the inputs.
    """
    names = {size: None for value in model.graph.input for size in tensor_shape(value) if isinstance(size, str)}
    # Every name grows by another amount from the first run to the second.
    sizes = [{name: base + step * i for i, name in enumerate(names)} for base, step in ((1009, 127), (4001, 511))]
    first, second = (_inferred(model, one) for one in sizes)
    values = {}
    for name in first.keys() & second.keys():
        pairs = zip(tensor_shape(first[name]), tensor_shape(second[name]), strict=True)
        shape = [_dimension(a, b, *sizes) for a, b in pairs]
        if None not in shape:
            values[name] = helper.make_tensor_value_info(name, first[name].type.tensor_type.elem_type, shape)
    return values


def _inferred(model: ModelProto, sizes: Mapping[str, int]) -> dict[str, ValueInfoProto]:
    """Return the values between the nodes for sizes of the symbolic dimensions."""
    sized = ModelProto()
    sized.CopyFrom(model)
    for name, size in sizes.items():
        fix_dimension(sized, name, size)
    return {value.name: value for value in shape_inference.infer_shapes(sized, data_prop=True).graph.value_info}


def _dimension(a: int | str, b: int | str, sizes_a: Mapping[str, int], sizes_b: Mapping[str, int]) -> int | str | None:
    """Return the dimension that has the size ``a`` for ``sizes_a`` and ``b`` for ``sizes_b``; None if it is unknown."""
    if isinstance(a, str) or isinstance(b, str) or not a or not b:
        return None
    if a == b:
        return a
    for name, size in sizes_a.items():
        if a - size == b - sizes_b[name] >= 0:
            return f"{name}+{a - size}" if a > size else name
    return None
