"""Which weight gets which format: ordered rules, the first that matches wins."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.errors import FusionError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("fp32", "fp16", "int8", "int4", "nf4")
VISION = ("int8", "int8-weights", "fp16")
EMBEDDING = "llm.embed_tokens"


@dataclass(frozen=True)
class Rule:
    """A shell pattern over names such as ``llm.layers.0.mlp.down`` and the format for those that match."""

    pattern: str
    format: WeightFormat

    def matches(self, name: str) -> bool:
        """Whether it is for the weight ``name``."""
        return fnmatchcase(name, self.pattern)

    @classmethod
    def parse(cls, text: str, group_size: int | None) -> Rule:
        """``PATTERN=FORMAT``. Raises :class:`UsageError`."""
        pattern, equals, form = text.partition("=")
        if not pattern or not equals:
            raise UsageError(f"Cannot read rule {text!r}; expected PATTERN=FORMAT, e.g. 'llm.lm_head=int8:64'.")
        return cls(pattern.strip(), WeightFormat.parse(form.strip(), group_size))


def vision_preset(vision: str, int8: WeightFormat) -> list[Rule]:
    """The rules behind ``--vision``. ``int8``: inputs are integers too, but for the patch embedding's, the pixels, and
    those of the projector's last linear. ``int8`` is the format of weights whose inputs are floats.
    """
    if vision == "int8":
        return [
            Rule("vision.patch_embedding", WeightFormat("fp16")),
            # Its inputs come out of a GELU, small values beside a few large ones: rounded with one scale they made nine
            # tenths of the encoder's error (docs/benchmarks.md).
            Rule("vision.projector.down", int8),
            Rule("vision.*", WeightFormat("w8a8")),
        ]
    return [Rule("vision.*", int8 if vision == "int8-weights" else WeightFormat("fp16"))]


def preset(
    precision: str, group_size: int | None, vision: str, asymmetric: bool = False, int8: WeightFormat | None = None
) -> list[Rule]:
    """Return the rules of ``--fp32``, ``--fp16``, ``--int8``, ``--int4``, ``--nf4``; ``vision`` is for the last three.

    ``asymmetric``: INT4 weights have zero points. ``int8``: format of 8-bit linears, if not of ``group_size``.

    4 bits are for the LLM and the alignment; what is read once an image, or is most sensitive, keeps 8 bits.
    """
    if precision in ("fp32", "fp16"):
        return [Rule("*", WeightFormat(precision))]
    grouped = WeightFormat.grouped("int8", group_size)
    int8 = int8 or grouped
    table = Rule(EMBEDDING, grouped)
    if precision == "int8":
        return [table, *vision_preset(vision, int8), Rule("*", int8)]
    return [
        table,
        Rule("llm.lm_head", int8),
        *vision_preset(vision, int8),
        Rule("*", WeightFormat.grouped("uint4" if asymmetric else precision, group_size)),
    ]


def read_rules(path: Path, group_size: int | None) -> list[Rule]:
    """Rules of a TOML file, in order: ``[rules]`` with lines ``"llm.layers.*.mlp.down" = "int8:64"``.

    Raises :class:`FusionError` if the file cannot be read or holds anything else.
    """
    expected = 'expected a table [rules] of lines "PATTERN" = "FORMAT"'
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"Cannot read the rules in {path} ({error}); {expected}.") from None
    rules = data.get("rules")
    if set(data) != {"rules"} or not isinstance(rules, dict):
        raise FusionError(f"{path} holds {', '.join(data) or 'nothing'}; {expected}.")
    if wrong := [key for key, value in rules.items() if not isinstance(value, str)]:
        raise FusionError(f"Rule {wrong[0]!r} in {path} has no format; {expected}; quote names with dots.")
    return [Rule(pattern, WeightFormat.parse(form, group_size)) for pattern, form in rules.items()]


def _suits_a_table(form: WeightFormat) -> bool:
    return form.bits != 4 and form.is_symmetric and not form.rounds_inputs


def assign(names: Iterable[str], overrides: Sequence[Rule], defaults: Sequence[Rule]) -> dict[str, WeightFormat]:
    """The format of every name. ``defaults`` must match all.

    The embedding table is looked up by row and gains nothing from 4 bits: wider patterns pass over it, and
    asking for it by name is an error. Raises :class:`UsageError` for that and for an override that matches no
    name.
    """
    names = list(names)
    for rule in overrides:
        matched = [name for name in names if rule.matches(name)]
        if not matched:
            raise UsageError(
                f"Rule {rule.pattern!r} matches no weight; names look like {names[0]!r} or {names[-1]!r} "
                "(fusion-export --dry-run --json lists them all)."
            )
        if matched == [EMBEDDING] and not _suits_a_table(rule.format):
            raise UsageError(f"{EMBEDDING} cannot be {rule.format}: it is looked up by row; use int8 or fp16.")
    rules = [*overrides, *defaults]

    def matches(rule: Rule, name: str) -> bool:
        return rule.matches(name) and (name != EMBEDDING or _suits_a_table(rule.format))

    return {name: next(rule.format for rule in rules if matches(rule, name)) for name in names}
