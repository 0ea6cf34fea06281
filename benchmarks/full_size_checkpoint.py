"""Write a random checkpoint with the sizes of a released one.

Speed and memory do not depend on the weights' values, so full-size measurements need no download. Config and tokenizer
come from a small checkpoint, by default a golden one in ``tests/``, with the sizes replaced.

    python -m fusion_edge.benchmarks.full_size_checkpoint --layout 3b --output FOLDER
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

from fusion_edge.benchmarks.json_file import write_json
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
STANDARD_DEVIATION = 0.02  # ``initializer_range`` of the released config
POOL = 1 << 23  # random values, 16 MB; every matrix is made of pieces of the pool
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",  # names end tokens by the tokenizer's ids
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a checkpoint (docs/fusion-model.md, "The four released models")."""

    like: Literal["FUSION-tiny-Phi", "FUSION-X-tiny-LLaMA"]
    """Golden checkpoint that provides config and tokenizer."""
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

    def with_layers(self, layers: int) -> ModelSizes:
        """Return the same widths with fewer LLM layers, and the interaction layers that still fit."""
        return dataclasses.replace(self, layers=layers)

    @property
    def alignment_layers(self) -> int:
        """Return the number of interaction layers: ten, or as many as follow an LLM layer."""
        return min(10, math.ceil(self.layers / self.alignment_stride))

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the LLM."""
        return self.hidden_size // self.heads

    def tensors(self) -> dict[str, Shape]:
        """Return names and shapes of all tensors of the checkpoint, unused ones included."""
        table = parameters(self._structure())
        shapes = {source.tensor: source.shape for parameter in table.values() for source in parameter.sources}
        return shapes | dict.fromkeys(UNUSED, (self.vision.width,))

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of ``config.json`` that depend on the sizes."""
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
        if self.like == "FUSION-tiny-Phi":  # longrope: one factor per frequency; these resemble Phi-3.5's
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
        """Return the configuration that decides tensor names and shapes; other fields are empty."""
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
_PHI = ModelSizes(
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
_LLAMA = ModelSizes(
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
LAYOUTS: Mapping[str, ModelSizes] = {
    "3b": _PHI,
    "x-3b": dataclasses.replace(_PHI, tower=_GIANT_TOWER, vision=_GIANT),
    "8b": _LLAMA,
    "x-8b": dataclasses.replace(_LLAMA, tower=_GIANT_TOWER, vision=_GIANT),
}
"""Released models by short name."""


def write_checkpoint(
    sizes: ModelSizes,
    folder: Path,
    like: Path,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    is_sparse: bool = False,
) -> None:
    """Write random bfloat16 weights to ``folder``; the same arguments give the same bytes.

    Config and tokenizer come from the checkpoint folder ``like``. At most 16 MB of weights are in memory. The index is
    written last, so an interrupted folder is not a valid checkpoint. ``is_sparse`` writes zeros that occupy no disk
    space, for dry runs.

    Raises:
        FusionError: ``folder`` is not empty, ``like`` is not a checkpoint, or the disk is too small.
    """
    config = read_json_object(like / "config.json")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FusionError(f"{folder} exists and is not an empty folder; pass a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = sizes.tensors()
    total = sum(map(_nbytes, tensors.values()))
    free = shutil.disk_usage(folder).free
    if free < total and not is_sparse:
        raise FusionError(
            f"{folder} has {format_bytes(free)} free; the checkpoint needs {format_bytes(total)}. Choose a "
            "folder on a larger disk, or fewer --layers."
        )
    for name in TOKENIZER_FILES:
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)
    write_json(folder / "config.json", config | sizes.config_fields())
    shards = list(_shards(tensors, shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    values = None if is_sparse else _RandomValues(seed)
    with Progress(f"writing {format_bytes(total)}", total) as progress:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                _write_shard(file, shard, values, progress.advance)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


class _RandomValues:
    """Random bfloat16 bit patterns as pieces of one pool, much faster than drawing every value."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        draws = self._random.standard_normal(POOL, dtype=np.float32)
        draws *= STANDARD_DEVIATION
        self._pool = _bfloat16(draws)

    def pieces(self, name: str, shape: Shape) -> Iterator[npt.NDArray[np.uint16]]:
        """Yield the values of a tensor in order, at most :data:`POOL` at a time."""
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
    """Return the upper half of each float32; truncation is random enough."""
    return (values.view(np.uint32) >> 16).astype("<u2")


def _nbytes(shape: Shape) -> int:
    return 2 * math.prod(shape)


def _shards(tensors: Mapping[str, Shape], limit: int) -> Iterator[dict[str, Shape]]:
    """Yield groups of tensors in order, each at most ``limit`` bytes or a single tensor."""
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
    """Write a safetensors file; without values its tensors are a hole in the file."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_main, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.benchmarks.full_size_checkpoint",
        description="Write a random checkpoint with the sizes of a released one (3b: 10 GB).",
    )
    add = parser.add_argument
    add("--layout", required=True, choices=tuple(LAYOUTS), help="released model")
    add("--output", required=True, type=Path, metavar="FOLDER", help="new or empty folder")
    add("--layers", type=positive_integer, metavar="N", help="LLM layers (default: the model's 32)")
    text = "rows of the embeddings and lm_head; with as many as the tokenizer has tokens, every token has a text"
    add("--vocab-size", type=positive_integer, metavar="N", help=f"{text} (default: the model's)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--sparse", action="store_true", help="write zeros that occupy no disk space, for dry runs")
    add(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="small checkpoint with tokenizer and config (default: the repository's golden one)",
    )
    return parser


def _main(arguments: argparse.Namespace) -> int:
    sizes = LAYOUTS[arguments.layout]
    if arguments.layers is not None:
        sizes = sizes.with_layers(arguments.layers)
    if arguments.vocab_size is not None:
        sizes = dataclasses.replace(sizes, vocab_size=arguments.vocab_size)
    like = GOLDEN / sizes.like if arguments.like is None else arguments.like
    write_checkpoint(sizes, arguments.output, like, arguments.seed, is_sparse=arguments.sparse)
    return 0


if __name__ == "__main__":
    sys.exit(main())
