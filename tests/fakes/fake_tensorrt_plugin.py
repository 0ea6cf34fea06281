"""A fake of ``tensorrt.plugin`` that keeps what is registered; sizes are numbers, not expressions.

``tests/bindings/`` takes the plugins through the real module.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

Function = Callable[..., Any]


class FakePlugins(ModuleType):
    TensorDesc = KernelLaunchParams = AutoTuneCombination = SimpleNamespace
    SymIntExprs = SimpleNamespace(from_tuple=tuple)
    SymInt32 = int
    max = staticmethod(builtins.max)

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.registered: dict[str, dict[str, Function]] = {}
        """Functions by plugin, and by the name of the decorator."""

    def register(self, plugin_id: str) -> Callable[[Function], None]:
        return self._keep("register", plugin_id)

    def autotune(self, plugin_id: str) -> Callable[[Function], None]:
        return self._keep("autotune", plugin_id)

    def aot_impl(self, plugin_id: str) -> Callable[[Function], None]:
        return self._keep("aot_impl", plugin_id)

    def _keep(self, name: str, plugin_id: str) -> Callable[[Function], None]:
        return lambda function: self.registered.setdefault(plugin_id, {}).update({name: function})
