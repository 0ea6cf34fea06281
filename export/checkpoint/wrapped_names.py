"""Names of tensors that were saved from a wrapped model: ``module.model.norm.weight``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_TOKEN_TABLE = "model.embed_tokens.weight"  # every FUSION model has it
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into the name of any module that they wrap."""


def without_wrappers(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """``tensors`` by the names that they have in the model itself.

    What stands in front of *every* name, such as ``module.`` of DistributedDataParallel or ``base_model.model.`` of
    PEFT, is left out as well. Names stay as they are where two would become one.
    """
    names = {name: _WRAPPERS.sub("", name) for name in tensors}
    table = next((name for name in names.values() if name.endswith(f".{_TOKEN_TABLE}")), _TOKEN_TABLE)
    prefix = table.removesuffix(_TOKEN_TABLE)
    if all(name.startswith(prefix) for name in names.values()):
        names = {stored: name.removeprefix(prefix) for stored, name in names.items()}
    if len(set(names.values())) < len(names):
        return dict(tensors)
    return {names[stored]: value for stored, value in tensors.items()}
