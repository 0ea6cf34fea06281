"""All steps of the acceptance, in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from fusion_edge.benchmarks.acceptance.demo import INT8_CACHE, W8A8
from fusion_edge.benchmarks.acceptance.quantized_linears import FORMS
from fusion_edge.benchmarks.acceptance.steps import Step
from fusion_edge.kernels.tensorrt_plugins import PLUGINS
from fusion_edge.kernels.triton.ahead_of_time import KERNELS

PACKAGE = "fusion_edge.benchmarks.acceptance"
PARTS = ("environment", "kernels", "operators", "demo", "full-size")
HEAD_SIZES = (64, 72, 96, 128)
CACHE_HEAD_SIZES = (96, 128)
"""Of the LLMs of 3B and 8B."""
PLUGIN_ROWS = ((0, 144), (1, 1), (2, 144))
"""Questions, and latents of each."""


def steps(parts: Collection[str]) -> list[Step]:
    """Return the steps of some of :data:`PARTS`."""
    return [step for step in _steps() if step.part in parts]


def _steps() -> list[Step]:
    environment = Step("environment", "environment", f"{PACKAGE}.environment:check")
    return [environment, *_kernels(), *_operators(), *_demo(), *_full_size()]


def _kernels() -> Iterator[Step]:
    for name in KERNELS:
        yield Step(f"kernel-{name}", "kernels", f"{PACKAGE}.alignment:check", {"name": name}, limit=300)


def _operators() -> Iterator[Step]:
    def step(name: str, function: str, **arguments: Any) -> Step:
        return Step(name, "operators", f"{PACKAGE}.operator_steps:{function}", arguments, limit=600)

    yield from (step(form, "linear", form=form) for form in FORMS)
    yield from (step(f"attention-{dim}", "attention", dim=dim) for dim in HEAD_SIZES)
    yield from (step(f"int8-cache-{dim}", "int8_cache", dim=dim) for dim in CACHE_HEAD_SIZES)
    yield step("tensor-scatter", "scatter", is_native=True)
    yield step("scatter-alias", "scatter", is_native=False)
    for plugin in PLUGINS:
        for questions, latents in PLUGIN_ROWS:
            name = f"{plugin.operator}-{questions * latents}-rows"
            yield step(name, "plugin", operator=plugin.operator, questions=questions, latents=latents)


def _demo() -> Iterator[Step]:
    def step(name: str, function: str, *needs: str, **arguments: Any) -> Step:
        limit = 7200 if function == "build" else 900  # --bundle may be a whole model
        return Step(name, "demo", f"{PACKAGE}.demo:{function}", arguments, needs, limit)

    yield step("demo-export", "export")
    yield step("demo-cpu", "answer_on_cpu", "demo-export")
    for kind in ("functions", "plugins"):  # the later engines replace the earlier ones
        built = f"demo-{kind}-build"
        yield step(built, "build", "demo-export", plugins=kind == "plugins")
        yield step(f"demo-{kind}", "run", built, graphs=True)
        yield step(f"demo-{kind}-no-graph", "run", built, graphs=False)
        yield step(f"demo-{kind}-cancel", "cancel", built)
    for variant in (INT8_CACHE, W8A8):
        exported, built = f"{variant}-export", f"{variant}-build"
        yield step(exported, "export_variant", "demo-export", variant=variant)
        yield step(f"{variant}-cpu", "answer_on_cpu", exported, variant=variant)
        yield step(built, "build", exported, plugins=False, variant=variant)
        yield step(variant, "run", built, graphs=True, variant=variant)


def _full_size() -> Iterator[Step]:
    def step(name: str, function: str, *needs: str) -> Step:
        return Step(name, "full-size", f"{PACKAGE}.full_size:{function}", needs=needs, limit=1800)

    yield step("full-size-export", "export")
    yield step("full-size-build", "build", "full-size-export")
    yield step("full-size-run", "run", "full-size-build")
    yield step("full-size-windows", "windows", "full-size-build")
