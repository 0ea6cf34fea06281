"""Checks of the values in ``engines.json``: ranges and consistency. :mod:`.schema` has checked their types."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from fusion_edge.runtime.bundle.engine_manifest import Engine, Engines

LARGEST = 2**31 - 1
"""Upper bound of a size."""
DTYPES = ("float32", "float16", "int64", "int32", "int8", "bool")


def check_engines(engines: Engines) -> None:
    """Raise ``ValueError`` that names the first invalid value, as a part of a sentence."""
    if not 1 <= engines.max_context <= LARGEST:
        raise ValueError(f"max_context is {engines.max_context}"[:80])
    for graph, parts in engines.engines.items():
        if not parts:
            raise ValueError(f"engines.{graph} is empty"[:80])
        for number, engine in enumerate(parts):
            _check_engine(engine, f"engines.{graph}[{number}]"[:80])
    if (engines.check.skipped is None) != bool(engines.check.stages):
        raise ValueError("check has neither stages nor a reason, or both")
    for number, stage in enumerate(engines.check.stages):
        figures = [stage.relative_error, stage.limit]
        if stage.logits is not None:
            figures += [stage.logits.kl_divergence, stage.logits.kl_limit]
        if not all(map(math.isfinite, figures)):
            raise ValueError(f"check.stages[{number}] has figures that are not finite")


def _check_engine(engine: Engine, name: str) -> None:
    if engine.file.size < 0:
        raise ValueError(f"{name}.file.size is {engine.file.size}"[:160])
    if not engine.profiles:
        raise ValueError(f"{name}.profiles is empty")
    dimensions = engine.profiles[0].keys()
    for profile in engine.profiles:
        if profile.keys() != dimensions:
            raise ValueError(f"{name}.profiles have different dimensions")
        for dimension, sizes in profile.items():
            if len(sizes) != 3 or not 0 <= sizes[0] <= sizes[1] <= sizes[2] <= LARGEST:
                raise ValueError(f"{name}.profiles have {dimension} from {list(sizes)[:4]}"[:200])
    for tensor in engine.tensors:
        if not _is_tensor(tensor, dimensions):
            raise ValueError(f"{name} has the tensor {dict(tensor)!r}"[:200])


def _is_tensor(tensor: Mapping[str, Any], dimensions: Collection[str]) -> bool:
    """Return whether a tensor has a name, a dtype, and a shape whose symbolic dimensions are in the profiles."""
    return (
        tensor.keys() == {"name", "dtype", "shape"}
        and isinstance(tensor["name"], str)
        and isinstance(tensor["dtype"], str)
        and tensor["dtype"] in DTYPES
        and isinstance(tensor["shape"], list | tuple)
        and all(
            _is_dimension(size, dimensions) if isinstance(size, str) else type(size) is int and 0 <= size <= LARGEST
            for size in tensor["shape"]
        )
    )


def _is_dimension(text: str, dimensions: Collection[str]) -> bool:
    """Return whether a text is one of ``dimensions``, or one and a number, as in ``text+729``."""
    name, plus, added = text.partition("+")
    return name in dimensions and (not plus or (re.fullmatch(r"[1-9]\d{0,8}", added, re.ASCII) is not None))
