"""Rules that assign formats to weights. Rules are ordered; the first match wins."""

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

VISION = ("int8", "int8-weights", "fp16")
EMBEDDING = "llm.embed_tokens"
LM_HEAD = "llm.lm_head"


@dataclass(frozen=True)
class Rule:
    """A shell pattern over names such as ``llm.layers.0.mlp.down``, and the format of the weights that match."""

    pattern: str
    format: WeightFormat

    def matches(self, name: str) -> bool:
        """Return whether the rule applies to the weight ``name``."""
        return fnmatchcase(name, self.pattern)

    @classmethod
    def parse(cls, text: str, group_size: int | None) -> Rule:
        """Parse ``PATTERN=FORMAT``. Raises :class:`UsageError`."""
        pattern, equals, fmt = text.partition("=")
        if not pattern or not equals:
            raise UsageError(f"Cannot read rule {text!r}; expected PATTERN=FORMAT, e.g. 'llm.lm_head=int8:64'.")
        return cls(pattern.strip(), WeightFormat.parse(fmt.strip(), group_size))


def vision_rules(vision: str, int8: WeightFormat) -> list[Rule]:
    """Return the rules of ``--vision``. ``int8`` is the format of linears with float activations.

    ``--vision int8`` quantizes activations too, except the pixels and the inputs of the projector's last linear.
    """
    if vision == "int8":
        return [
            Rule("vision.patch_embedding", WeightFormat("fp16")),
            # Its inputs are outputs of a GELU: many small values and a few large ones. Quantized with one scale they
            # caused nine tenths of the encoder's error (docs/benchmarks.md).
            Rule("vision.projector.down", int8),
            Rule("vision.*", WeightFormat("w8a8")),
        ]
    return [Rule("vision.*", int8 if vision == "int8-weights" else WeightFormat("fp16"))]


def precision_rules(
    precision: str,
    group_size: int | None,
    vision: str,
    asymmetric: bool = False,
    int8: WeightFormat | None = None,
    lm_head: WeightFormat | None = None,
) -> list[Rule]:
    """Return the rules of ``--fp32``, ``--fp16``, ``--int8``, ``--int4`` or ``--nf4``.

    ``vision`` applies to the last three. ``asymmetric`` gives INT4 weights zero points. ``int8`` is the format of 8-bit
    linears; None: in groups of ``group_size``. 4-bit precisions apply to the LLM and the alignment; weights that are
    read once per image keep 8 bits, and so does ``lm_head`` unless its format is given.
    """
    if precision in ("fp32", "fp16"):
        return [Rule("*", WeightFormat(precision))]
    grouped = WeightFormat.grouped("int8", group_size)
    int8 = int8 or grouped
    table = Rule(EMBEDDING, grouped)
    if precision == "int8":
        return [table, *vision_rules(vision, int8), Rule("*", int8)]
    return [
        table,
        Rule(LM_HEAD, lm_head or int8),
        *vision_rules(vision, int8),
        Rule("*", WeightFormat.grouped("uint4" if asymmetric else precision, group_size)),
    ]


def read_rules(path: Path, group_size: int | None) -> list[Rule]:
    """Read the rules of a TOML file, in order: a table ``[rules]`` of lines ``"llm.layers.*.mlp.down" = "int8:64"``.

    Raises :class:`FusionError` if the file cannot be read or has other content.
    """
    expected = 'expected a table [rules] of lines "PATTERN" = "FORMAT"'
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"Cannot read the rules in {path} ({error}); {expected}.") from None
    rules = data.get("rules")
    if set(data) != {"rules"} or not isinstance(rules, dict):
        raise FusionError(f"{path} contains {', '.join(data) or 'nothing'}; {expected}.")
    if wrong := [key for key, value in rules.items() if not isinstance(value, str)]:
        raise FusionError(f"Rule {wrong[0]!r} in {path} has no format; {expected}; quote names with dots.")
    return [Rule(pattern, WeightFormat.parse(fmt, group_size)) for pattern, fmt in rules.items()]


def _suits_embedding(fmt: WeightFormat) -> bool:
    return fmt.bits != 4 and fmt.is_symmetric and fmt.kind not in ("w8a8", "fp8")


def assign(names: Iterable[str], overrides: Sequence[Rule], defaults: Sequence[Rule]) -> dict[str, WeightFormat]:
    """Return the format of every name. ``defaults`` must match all names.

    The embedding table is looked up by row and gains nothing from 4 bits: rules with such a format skip it. Raises
    :class:`UsageError` for a rule that matches only the embedding table with such a format, or matches nothing.
    """
    names = list(names)
    for rule in overrides:
        matched = [name for name in names if rule.matches(name)]
        if not matched:
            raise UsageError(
                f"Rule {rule.pattern!r} matches no weight; names look like {names[0]!r} or {names[-1]!r} "
                "(fusion-export --dry-run --json lists them all)."
            )
        if matched == [EMBEDDING] and not _suits_embedding(rule.format):
            raise UsageError(f"{EMBEDDING} cannot be {rule.format}: it is looked up by row; use int8 or fp16.")
    rules = [*overrides, *defaults]

    def matches(rule: Rule, name: str) -> bool:
        return rule.matches(name) and (name != EMBEDDING or _suits_embedding(rule.format))

    return {name: next(rule.format for rule in rules if matches(rule, name)) for name in names}
