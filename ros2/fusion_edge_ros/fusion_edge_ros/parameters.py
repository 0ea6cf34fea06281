"""Parameters of a ROS node: declared with descriptions and ranges, read together, checked on every change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import ParameterUninitializedException
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter

from fusion_edge import FusionError
from fusion_edge_ros.settings import PARAMETERS, Parameter, Settings, settings_of


def declare_settings(node: Node, when_changed: Callable[[Settings], object]) -> Settings:
    """Declare all parameters; return their settings. Each accepted change calls ``when_changed`` with the new ones.

    Raises:
        UsageError: Values do not fit together.
        rclpy.exceptions.ParameterException: A value has a wrong type or is out of range.
    """
    for parameter in PARAMETERS:
        _declare(node, parameter)
    values = {parameter.name: _value(node, parameter) for parameter in PARAMETERS}

    def check(changes: list[RosParameter[Any]]) -> SetParametersResult:
        ours = {change.name: change.value for change in changes if change.name in values}
        try:
            settings = settings_of({**values, **ours})
        except FusionError as error:
            return SetParametersResult(successful=False, reason=str(error))
        values.update(ours)
        when_changed(settings)
        return SetParametersResult(successful=True)

    settings = settings_of(values)
    node.add_on_set_parameters_callback(check)
    return settings


def _declare(node: Node, parameter: Parameter) -> None:
    descriptor = ParameterDescriptor(description=parameter.description)
    if isinstance(parameter.largest, float):
        descriptor.floating_point_range = [
            FloatingPointRange(from_value=float(parameter.smallest), to_value=parameter.largest)
        ]
    elif parameter.largest is not None:
        descriptor.integer_range = [IntegerRange(from_value=parameter.smallest, to_value=parameter.largest, step=1)]
    # rclpy takes an empty list for one of bytes, so an array of strings is declared by its type.
    value = parameter.default if parameter.default != [] else RosParameter.Type.STRING_ARRAY
    node.declare_parameter(parameter.name, value, descriptor)


def _value(node: Node, parameter: Parameter) -> Any:
    try:
        return node.get_parameter(parameter.name).value
    except ParameterUninitializedException:  # declared by its type alone, and not given
        return parameter.default
