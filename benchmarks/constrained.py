"""Measure constrained answers: valid documents of random schemas, and the time of masks and of compiling.

    python -m fusion_edge.benchmarks.constrained --bundle BUNDLE --tokenizer 32064:tokenizer.json --json FILE

Every fifth document has a deadline or is cancelled at a random moment: it must end with an error or be complete.
"""

from __future__ import annotations

import argparse
import json
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
from fusion_edge.runtime.fusion import Fusion, load
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
    result: dict[str, Any] = {"processor": machine_info(None).processor}
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

    A token's time is that of its mask, of applying it to the logits, and of advancing the grammar.
    """
    end = logits - 1
    compiler = GrammarCompiler(tokenizer, frozenset({end}), logits)
    grammars = {"first": Grammar.json(SCENE), "second": Grammar.json(OBJECT), "first again": Grammar.json(SCENE)}
    compile_ms = {}
    for name, grammar in grammars.items():
        started = time.perf_counter()
        compiler.start(grammar)
        compile_ms[name] = round(1e3 * (time.perf_counter() - started), 2)
    seconds: list[float] = []
    for seed in range(DOCUMENTS):
        seconds += _document_times(compiler, grammars["first"], logits, end, seed)
    percentiles = {f"p{p}": round(1e6 * float(np.percentile(seconds, p))) for p in (50, 90, 99)}
    return {"logits": logits, "compile_ms": compile_ms, "tokens": len(seconds), "token_us": percentiles}


def _document_times(compiler: GrammarCompiler, grammar: Grammar, logits: int, end: int, seed: int) -> Iterator[float]:
    constraint, source = compiler.start(grammar), np.random.default_rng(seed)
    values, token = source.standard_normal(logits).astype(np.float32), -1
    while token != end:
        started = time.perf_counter()
        masked = constraint.mask(values)
        took = time.perf_counter() - started
        token = int(source.choice(np.flatnonzero(np.isfinite(masked))))
        started = time.perf_counter()
        constraint.accept(token)
        yield took + time.perf_counter() - started


def documents(fusion: Fusion, first: int, count: int) -> Counter[str]:
    """Generate a document of each random schema; count the valid ones and those that were stopped.

    Raises ``jsonschema.ValidationError`` for a document that is not valid.
    """
    from jsonschema import Draft202012Validator

    found: Counter[str] = Counter()
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for seed in range(first, first + count):
        schema, source = random_schema(seed), random.Random(seed)
        deadline = source.uniform(0.001, 0.1) if seed % 10 == 0 else None
        timer = threading.Timer(source.uniform(0, 0.1), fusion.cancel) if seed % 10 == 5 else None
        if timer is not None:
            timer.start()
        sampling = Sampling(max_new_tokens=2048, temperature=1.0, seed=seed)
        try:
            value = fusion.json(frame, source.choice(QUESTIONS), schema, sampling=sampling, deadline=deadline)
            Draft202012Validator(schema).validate(value)
            found["valid"] += 1
        except DeadlineExceeded:
            found["deadline"] += 1
        except Cancelled:
            found["cancelled"] += 1
        if timer is not None:
            timer.cancel()
            timer.join()
    return found


if __name__ == "__main__":
    sys.exit(main())
