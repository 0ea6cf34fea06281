"""Strip the prefixes that training wrappers add to tensor names, as in ``module.model.norm.weight``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_EMBEDDINGS = "model.embed_tokens.weight"  # every FUSION model has them
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Name parts of torch.compile, FSDP and activation checkpointing. They stand before any wrapped module."""


def strip_wrappers(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Return ``tensors`` under the names that they have in the unwrapped model.

    A prefix of *every* name is stripped too, such as ``module.`` of DistributedDataParallel or ``base_model.model.`` of
    PEFT. All names stay as they are if two would become equal.
    """
    names = {name: _WRAPPERS.sub("", name) for name in tensors}
    embeddings = next((name for name in names.values() if name.endswith(f".{_EMBEDDINGS}")), _EMBEDDINGS)
    prefix = embeddings.removesuffix(_EMBEDDINGS)
    if all(name.startswith(prefix) for name in names.values()):
        names = {stored: name.removeprefix(prefix) for stored, name in names.items()}
    if len(set(names.values())) < len(names):
        return dict(tensors)
    return {names[stored]: value for stored, value in tensors.items()}
