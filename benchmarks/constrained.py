"""Measure constrained answers: valid documents of random schemas, and the time of masks and of compiling.

    python -m fusion_edge.benchmarks.constrained --bundle BUNDLE --tokenizer 32064:tokenizer.json --json FILE

Every fifth document is first interrupted at a random moment by a deadline or a cancel: it is an error or complete.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.benchmarks.random_schemas import random_schema
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.constraints.compiler import GrammarCompiler
from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.errors import Cancelled, DeadlineExceeded
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.sampling import Sampling
from fusion_edge.runtime.system.output_file import write_whole

QUESTIONS = (
    "What is ahead?",
    "Is the path clear?",
    "Describe the nearest object.",
    "Was liegt auf dem Weg?",
    "前に何がありますか",
)
BOX = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 4096}, "minItems": 4, "maxItems": 4}
OBJECT = {
    "type": "object",
    "properties": {
        "label": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["person", "vehicle", "animal", "obstacle"]},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        "box": BOX,
    },
    "required": ["label", "kind", "confidence", "box"],
}
SCENE = {
    "type": "object",
    "properties": {
        "objects": {"type": "array", "items": OBJECT, "maxItems": 8},
        "clear": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 200},
    },
    "required": ["objects", "clear", "note"],
}
DOCUMENTS = 30


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--bundle", type=Path, help="bundle that answers; without it, no documents are generated")
    add("--schemas", type=positive_integer, default=500, help="number of random schemas (default: %(default)s)")
    add("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    add(
        "--tokenizer",
        type=_tokenizer,
        action="append",
        default=[],
        metavar="LOGITS:FILE",
        help="measure masks with this tokenizer.json and number of logits; repeatable",
    )
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _tokenizer(text: str) -> tuple[int, Path]:
    logits, _, path = text.partition(":")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOGITS:FILE such as 32064:tokenizer.json")
    return positive_integer(logits), Path(path)


def _main(options: argparse.Namespace) -> int:
    result: dict[str, Any] = {"processor": machine_info(None).processor, "load_average": os.getloadavg()[0]}
    result["masks"] = [mask_times(logits, Tokenizer.from_file(str(path))) for logits, path in options.tokenizer]
    for times in result["masks"]:
        sys.stdout.write(f"{times}\n")
    if options.bundle:
        with load(options.bundle, device="cpu") as fusion:
            result["documents"] = dict(documents(fusion, options.seed, options.schemas))
        sys.stdout.write(f"{result['documents']}\n")
    if options.json:
        write_whole(options.json, json.dumps(result, indent=2) + "\n")
    return 0


def mask_times(logits: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return milliseconds of compiling two schemas, and microseconds a token of random documents.

    A token's time is that of its mask, of applying it to the logits, and of advancing the grammar. All are processor
    times, which other programs do not change much.
    """
    end = logits - 1
    compiler = GrammarCompiler(tokenizer, frozenset({end}), logits)
    grammars = {"first": Grammar.json(SCENE), "second": Grammar.json(OBJECT), "first again": Grammar.json(SCENE)}
    compile_ms = {}
    for name, grammar in grammars.items():
        started = time.process_time()
        compiler.start(grammar)
        compile_ms[name] = round(1e3 * (time.process_time() - started), 2)
    seconds: list[float] = []
    for seed in range(DOCUMENTS):
        seconds += _document_times(compiler, grammars["first"], logits, end, seed)
    token_us = {"mean": round(1e6 * float(np.mean(seconds)))}
    token_us |= {f"p{p}": round(1e6 * float(np.percentile(seconds, p))) for p in (50, 90, 99)}
    return {"logits": logits, "compile_ms": compile_ms, "tokens": len(seconds), "token_us": token_us}


def _document_times(compiler: GrammarCompiler, grammar: Grammar, logits: int, end: int, seed: int) -> Iterator[float]:
    constraint, source = compiler.start(grammar), np.random.default_rng(seed)
    values, token = source.standard_normal(logits).astype(np.float32), -1
    while token != end:
        started = time.process_time()
        masked = constraint.mask(values)
        took = time.process_time() - started
        token = int(source.choice(np.flatnonzero(np.isfinite(masked))))
        started = time.process_time()
        constraint.accept(token)
        yield took + time.process_time() - started


def documents(fusion: Fusion, first: int, count: int) -> Counter[str]:
    """Generate a document of each random schema; count the valid ones, and what became of interrupted ones.

    Raises ``jsonschema.ValidationError`` for a document that is not valid.
    """
    found: Counter[str] = Counter()
    for seed in range(first, first + count):
        if seed % 10 == 0:
            found[_interrupted(fusion, seed, deadline=random.Random(seed).uniform(0.001, 0.1))] += 1
        if seed % 10 == 5:
            timer = threading.Timer(random.Random(seed).uniform(0, 0.1), fusion.cancel)
            timer.start()
            found[_interrupted(fusion, seed, deadline=None)] += 1
            timer.cancel()
            timer.join()
        _ask(fusion, seed)
        found["valid"] += 1
    return found


def _interrupted(fusion: Fusion, seed: int, deadline: float | None) -> str:
    """Return what became of a document with a deadline, or one that another thread cancels."""
    try:
        _ask(fusion, seed, deadline)
    except DeadlineExceeded:
        return "deadline"
    except Cancelled:
        return "cancelled"
    return "valid before the interruption"


def _ask(fusion: Fusion, seed: int, deadline: float | None = None) -> None:
    """Generate and validate a document."""
    from jsonschema import Draft202012Validator

    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    schema, question = random_schema(seed), QUESTIONS[seed % len(QUESTIONS)]
    sampling = Sampling(max_new_tokens=2048, temperature=1.0, seed=seed)
    value = fusion.json(frame, question, schema, sampling=sampling, deadline=deadline)
    Draft202012Validator(schema).validate(value)


if __name__ == "__main__":
    sys.exit(main())
