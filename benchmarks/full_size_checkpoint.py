"""A random checkpoint with the sizes of a released one: ``python -m fusion_edge.benchmarks.full_size_checkpoint``.

Speed and memory do not depend on what the weights are, so full-size measurements need no download. Config and
tokenizer are those of a small checkpoint (by default of the golden ones in ``tests/``) with the sizes put in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.input_files import read_json_object
from fusion_edge.export.checkpoint.tensor_mapping import UNUSED, parameters
from fusion_edge.runtime.bundle.config import AlignmentConfig, FusionConfig, LanguageConfig, VisionConfig
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.system.progress import Progress

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "golden"
SHARD_BYTES = 2_000_000_000
STANDARD_DEVIATION = 0.02  # as the released config's ``initializer_range``
POOL = 1 << 23  # values drawn, 16 MB; every matrix is made of pieces of them
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",  # its end tokens are the tokenizer's
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The sizes of a checkpoint (FUSION.md, "The four released models")."""

    like: Literal["FUSION-tiny-Phi", "FUSION-X-tiny-LLaMA"]
    """The golden checkpoint whose config and tokenizer it takes."""
    tower: str
    """``mm_vision_tower``."""
    vision: VisionConfig
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocab_size: int
    alignment_stride: int = 3

    def with_layers(self, layers: int) -> Layout:
        """The same widths with fewer LLM layers; so many interaction layers stay as still have a place."""
        return dataclasses.replace(self, layers=layers)

    @property
    def alignment_layers(self) -> int:
        """Interaction layers: ten, or as many as follow an LLM layer."""
        return min(10, math.ceil(self.layers / self.alignment_stride))

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the LLM."""
        return self.hidden_size // self.heads

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes of every tensor of the checkpoint, the unused ones included."""
        table = parameters(self._structure())
        shapes = {source.tensor: source.shape for parameter in table.values() for source in parameter.sources}
        return shapes | dict.fromkeys(UNUSED, (self.vision.width,))

    def config_fields(self) -> dict[str, Any]:
        """The fields of ``config.json`` that the sizes decide."""
        fields: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_width,
            "max_position_embeddings": 131072,
            "mm_hidden_size": self.vision.width,
            "mm_vision_tower": self.tower,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_of_vision_sampler_layers": self.alignment_layers,
            "start_of_vision_sampler_layers": 0,
            "stride_of_vision_sampler_layers": self.alignment_stride,
            "vocab_size": self.vocab_size,
        }
        if self.like == "FUSION-tiny-Phi":  # longrope has one factor a frequency; these only resemble Phi-3.5's
            factors = range(self.head_dim // 2)
            fields["rope_scaling"] = {
                "type": "longrope",
                "short_factor": [round(1 + 0.04 * i, 2) for i in factors],
                "long_factor": [round(1 + 1.3 * i, 1) for i in factors],
            }
        else:
            fields["head_dim"] = self.head_dim
        return fields

    def _structure(self) -> FusionConfig:
        """What the table of names asks for; everything that no shape depends on is left empty."""
        return FusionConfig(
            template="phi_3" if self.like == "FUSION-tiny-Phi" else "llama_3",
            vision=self.vision,
            language=LanguageConfig(
                hidden_size=self.hidden_size,
                layers=self.layers,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                mlp_width=self.mlp_width,
                vocab_size=self.vocab_size,
                norm_eps=1e-5,
                rotary_inverse_frequencies=(),
                rotary_scale=1.0,
            ),
            alignment=AlignmentConfig(
                layers=self.alignment_layers,
                start=0,
                stride=self.alignment_stride,
                window_size=3,
                query_lengths=(),
            ),
            max_length=4096,
            bos_token_id=0,
            eos_token_ids=(),
        )


_SIGLIP_TOWER, _GIANT_TOWER = "google/siglip-so400m-patch14-384", "google/siglip2-giant-opt-patch16-384"
_SIGLIP = VisionConfig(width=1152, layers=26, mlp_width=4304, patch_size=14)
_GIANT = VisionConfig(width=1536, layers=39, mlp_width=6144, patch_size=16)
_PHI = Layout(
    like="FUSION-tiny-Phi",
    tower=_SIGLIP_TOWER,
    vision=_SIGLIP,
    hidden_size=3072,
    layers=32,
    heads=32,
    kv_heads=32,
    mlp_width=8192,
    vocab_size=32064,
)
_LLAMA = Layout(
    like="FUSION-X-tiny-LLaMA",
    tower=_SIGLIP_TOWER,
    vision=_SIGLIP,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    mlp_width=14336,
    vocab_size=128258,
)
LAYOUTS: Mapping[str, Layout] = {
    "3b": _PHI,
    "x-3b": dataclasses.replace(_PHI, tower=_GIANT_TOWER, vision=_GIANT),
    "8b": _LLAMA,
    "x-8b": dataclasses.replace(_LLAMA, tower=_GIANT_TOWER, vision=_GIANT),
}
"""The four released models by short name."""


def write_checkpoint(
    layout: Layout,
    folder: Path,
    like: Path,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    is_sparse: bool = False,
) -> None:
    """Write ``layout`` with random bf16 weights to ``folder``; the same arguments give the same bytes.

    Config and tokenizer come from the checkpoint folder ``like``. Memory: 16 MB of weights at a time. The index
    is written last, so an interrupted folder is not taken for a checkpoint. With ``is_sparse`` all weights are zero
    and take no room on the disk: for dry runs, which read none.

    Raises:
        FusionError: ``folder`` is not empty, ``like`` is no checkpoint, or the disk is too small.
    """
    config = read_json_object(like / "config.json")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FusionError(f"{folder} exists and is not an empty folder; pass a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = layout.tensors()
    total = sum(map(_nbytes, tensors.values()))
    free = shutil.disk_usage(folder).free
    if free < total and not is_sparse:
        raise FusionError(
            f"{folder} has {format_bytes(free)} free, but the checkpoint takes {format_bytes(total)}; pass a folder "
            "on a larger disk or fewer --layers."
        )
    for name in TOKENIZER_FILES:
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)
    _write_json(folder / "config.json", config | layout.config_fields())
    shards = list(_shards(tensors, shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    values = None if is_sparse else _RandomValues(seed)
    with Progress(f"writing {format_bytes(total)}", total) as progress:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                _write_shard(file, shard, values, progress.advance)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


class _RandomValues:
    """bf16 bit patterns, many times quicker than a draw for every value: pieces of one pool of draws."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        draws = self._random.standard_normal(POOL, dtype=np.float32)
        draws *= STANDARD_DEVIATION
        self._pool = _bfloat16(draws)

    def pieces(self, name: str, shape: Shape) -> Iterator[npt.NDArray[np.uint16]]:
        """One tensor in order, at most :data:`POOL` values at a time."""
        if len(shape) == 1 and name.endswith(".weight"):  # norms scale by about one
            draws = self._random.standard_normal(shape, dtype=np.float32)
            yield _bfloat16(1 + STANDARD_DEVIATION * draws)
            return
        left = math.prod(shape)
        while left:
            start = int(self._random.integers(POOL))
            piece = self._pool[start : start + left]
            left -= piece.size
            yield piece


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float32: truncation is as random as rounding would be."""
    return (values.view(np.uint32) >> 16).astype("<u2")


def _nbytes(shape: Shape) -> int:
    return 2 * math.prod(shape)


def _shards(tensors: Mapping[str, Shape], limit: int) -> Iterator[dict[str, Shape]]:
    """Tensors in order, each group at most ``limit`` bytes unless it is one tensor."""
    shard: dict[str, Shape] = {}
    filled = 0
    for name, shape in tensors.items():
        if shard and filled + _nbytes(shape) > limit:
            yield shard
            shard, filled = {}, 0
        shard[name] = shape
        filled += _nbytes(shape)
    yield shard


def _write_shard(
    file: BinaryIO, shard: Mapping[str, Shape], values: _RandomValues | None, advance: Callable[[int], None]
) -> None:
    """One safetensors file: length of the header, header, tensors without gaps; without values a hole of their size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        start, end = end, end + _nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    if values is None:
        file.truncate(file.tell() + end)
        return
    for name, shape in shard.items():
        for piece in values.pieces(name, shape):
            file.write(piece.data)
            advance(piece.nbytes)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    return run_command(_main, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.benchmarks.full_size_checkpoint",
        description="Write a random checkpoint with the sizes of a released one (3b: 10 GB).",
    )
    add = parser.add_argument
    add("--layout", required=True, choices=tuple(LAYOUTS), help="which released model")
    add("--output", required=True, type=Path, metavar="FOLDER", help="a new or empty folder")
    add("--layers", type=positive_integer, metavar="N", help="LLM layers (default: the model's 32)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--sparse", action="store_true", help="zeros that take no room on the disk: for dry runs")
    add(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="small checkpoint that gives tokenizer and config (default: the repository's golden one)",
    )
    return parser


def _main(arguments: argparse.Namespace) -> int:
    layout = LAYOUTS[arguments.layout]
    if arguments.layers is not None:
        layout = layout.with_layers(arguments.layers)
    like = GOLDEN / layout.like if arguments.like is None else arguments.like
    write_checkpoint(layout, arguments.output, like, arguments.seed, is_sparse=arguments.sparse)
    return 0


if __name__ == "__main__":
    sys.exit(main())
