"""The LLM of a bundle against onnxruntime-genai on one CPU: prefill, decode, memory.

    python -m fusion_edge.benchmarks.llm_against_genai --bundle ours=DIR --genai b32=DIR --genai b128=DIR

Needs onnxruntime-genai in the same environment; its models are folders that its builder wrote for the same LLM.
Runners take turns (A B C, A B C, ...), each time in a fresh process, so that a disturbance hits all of them and
memory is counted from zero. Both sides decode greedily, the choice of the token included. The bundle's LLM is
run without latents, as the peer has none.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fusion_edge.benchmarks.latency.statistics import timed
from fusion_edge.runtime import cli
from fusion_edge.runtime.backends.onnxruntime import Decoder
from fusion_edge.runtime.backends.onnxruntime_graph import Graph, Input
from fusion_edge.runtime.bundle import open_bundle
from fusion_edge.runtime.embeddings import Embeddings
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.graphs import LLM

MODULE = "fusion_edge.benchmarks.llm_against_genai"
FIRST_TOKEN, TOKENS = 1000, 1000  # the prompt repeats these ids, which every vocabulary of an LLM has
WARM_UP = 8  # tokens


@dataclass(frozen=True)
class Workload:
    """What every runner does."""

    prompt: int = 900
    """Tokens of the timed prefill."""
    context: int = 1000
    """Positions in the cache in the middle of the timed decode steps."""
    steps: int = 32
    """Timed decode steps."""
    capacity: int = 4096
    """Positions that the KV cache is allocated for, by every runner."""
    threads: int = 2

    def __post_init__(self) -> None:
        if self.untimed_steps < 0 or self.context + self.steps > self.capacity:
            raise UsageError(
                f"--context {self.context} does not fit: expected at least --prompt plus half of --steps "
                f"({self.prompt + self.steps // 2}), and --context plus --steps at most --capacity ({self.capacity})."
            )

    @property
    def untimed_steps(self) -> int:
        """Decode steps that bring the cache from the prompt to the start of the timed ones."""
        return self.context - self.steps // 2 - self.prompt

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return [FIRST_TOKEN + i % TOKENS for i in range(self.prompt)]


@dataclass(frozen=True)
class Result:
    """One run of one runner in its own process."""

    load_seconds: float
    """Up to the end of a first short prompt: first use touches the whole KV cache, in one runner or another."""
    prefill_seconds: float
    decode_tokens_per_second: float
    """From the median step."""
    memory: int
    """Resident bytes of the process at the end, pages mapped from files included."""
    peak_memory: int
    """The most that was ever resident."""


@dataclass(frozen=True)
class Contestant:
    """What is compared."""

    label: str
    runner: str
    """A key of :data:`RUNNERS`."""
    folder: Path


class Llm(Protocol):
    """A loaded LLM."""

    def prefill(self, ids: list[int]) -> None:
        """Start anew: run token ids up to the logits of the last one and choose the next token."""
        ...

    def step(self) -> None:
        """Run the chosen token and choose the next one."""
        ...


def measure(runner: str, folder: Path, work: Workload) -> Result:
    """Measure in this process; ``runner`` is a key of :data:`RUNNERS`."""
    start = time.perf_counter()
    llm = RUNNERS[runner](folder, work)
    llm.prefill(work.prompt_ids[:WARM_UP])
    loaded = time.perf_counter()
    llm.prefill(work.prompt_ids)
    prefilled = time.perf_counter()
    for _ in range(work.untimed_steps):
        llm.step()
    seconds = [timed(llm.step) for _ in range(work.steps)]
    return Result(
        load_seconds=loaded - start,
        prefill_seconds=prefilled - loaded,
        decode_tokens_per_second=1 / statistics.median(seconds),
        memory=_status("VmRSS"),
        peak_memory=_status("VmHWM"),
    )


class GenaiLlm:
    """A model folder of onnxruntime-genai."""

    def __init__(self, folder: Path, work: Workload) -> None:
        try:
            genai: Any = importlib.import_module("onnxruntime_genai")
        except ImportError:
            raise FusionError(
                "onnxruntime-genai is not installed in this environment: pip install onnxruntime-genai."
            ) from None
        if not (folder / "genai_config.json").is_file():
            raise FusionError(f"{folder} has no genai_config.json; pass a folder that genai's builder wrote.")
        settings = {"model": {"decoder": {"session_options": {"intra_op_num_threads": work.threads}}}}
        config = genai.Config(str(folder))
        config.overlay(json.dumps(settings))
        model = genai.Model(config)
        parameters = genai.GeneratorParams(model)
        # Random weights may choose an end token, which would stop the run: none is allowed before min_length.
        parameters.set_search_options(do_sample=False, max_length=work.capacity, min_length=work.capacity)
        self._generator: Any = genai.Generator(model, parameters)

    def prefill(self, ids: list[int]) -> None:
        self._generator.rewind_to(0)
        self._generator.append_tokens(np.array([ids], np.int32))  # computes the logits
        self._generator.generate_next_token()  # only chooses from them, as does every first call

    def step(self) -> None:
        self._generator.generate_next_token()


class BundleLlm:
    """The LLM of a bundle, without vision encoder and alignment decoder: those have no counterpart in the peer."""

    def __init__(self, folder: Path, work: Workload) -> None:
        bundle = open_bundle(folder)
        model = bundle.manifest.model
        if work.capacity > bundle.manifest.max_context:
            raise UsageError(
                f"--capacity {work.capacity} is more than the {bundle.manifest.max_context} positions of {folder}; "
                "pass less, or export with a larger --max-context."
            )
        self._capacity = work.capacity
        self._decoder = Decoder(Graph(bundle, LLM, "cpu", work.threads), bundle.manifest)
        self._embed = Embeddings(bundle)
        shape = (model.alignment.layers, 0, model.alignment.window_size**2, model.language.hidden_size)
        self._no_pairs = np.zeros(shape, np.float32)
        self._token = 0

    def prefill(self, ids: list[int]) -> None:
        inputs: dict[str, Input] = {
            "embeddings": self._embed(np.array(ids))[None],
            "latent_positions": np.zeros((0, 0), np.int64),
            "question_positions": np.zeros(0, np.int64),
            "keys": self._no_pairs,
            "values": self._no_pairs,
        }
        logits = self._decoder.prefill(inputs, len(ids), self._capacity)
        self._token = int(logits.argmax())

    def step(self) -> None:
        self._token = int(self._decoder.step(self._embed(np.array([self._token]))[0]).argmax())


RUNNERS: Mapping[str, Callable[[Path, Workload], Llm]] = {"genai": GenaiLlm, "bundle": BundleLlm}


def _status(field: str) -> int:
    """A memory figure of this process in bytes, from Linux's ``/proc``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise FusionError(f"/proc/self/status has no {field}; memory can be measured on Linux only.")


def compare(contestants: Sequence[Contestant], work: Workload, rounds: int) -> dict[str, list[Result]]:
    """Results by label; every round runs every contestant once, each in its own process."""
    results: dict[str, list[Result]] = {contestant.label: [] for contestant in contestants}
    for number in range(rounds):
        for contestant in contestants:
            if sys.stderr.isatty():
                sys.stderr.write(f"round {number + 1} of {rounds}: {contestant.label}\n")
            results[contestant.label].append(_measure_alone(contestant, work))
    return results


def _measure_alone(contestant: Contestant, work: Workload) -> Result:
    request = [contestant.runner, str(contestant.folder), dataclasses.asdict(work)]
    command = [sys.executable, "-m", MODULE, "--measure", json.dumps(request)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:  # the child has said why
        raise FusionError(f"The run of {contestant.label} failed with exit code {child.returncode}.")
    return Result(**json.loads(child.stdout.splitlines()[-1]))


def median(results: Sequence[Result]) -> Result:
    """Field by field."""
    columns = zip(*map(dataclasses.astuple, results), strict=True)
    return Result(*(statistics.median(column) for column in columns))


def render(results: Mapping[str, Sequence[Result]]) -> str:
    """A table of medians; in brackets how many times better the first contestant is."""
    medians = {label: median(runs) for label, runs in results.items()}
    first = next(iter(medians.values()))
    rows = [["", "prefill", "", "decode", "", "memory", "", "peak", "", "load"]]
    for label, one in medians.items():
        ratios = (
            one.prefill_seconds / first.prefill_seconds,
            first.decode_tokens_per_second / one.decode_tokens_per_second,
            one.memory / first.memory,
            one.peak_memory / first.peak_memory,
        )
        texts = (
            f"{one.prefill_seconds:.2f} s",
            f"{one.decode_tokens_per_second:.2f} tokens/s",
            cli.size(one.memory),
            cli.size(one.peak_memory),
        )
        cells = [cell for text, ratio in zip(texts, ratios, strict=True) for cell in (text, f"({ratio:.2f}x)")]
        rows.append([label, *cells, f"{one.load_seconds:.1f} s"])
    return cli.table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    return cli.run(_main, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    work = Workload()
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Compare the LLM of a bundle with onnxruntime-genai on this CPU.",
    )
    add = parser.add_argument
    for runner, text in (("bundle", "what fusion-export wrote"), ("genai", "what genai's builder wrote")):
        add(f"--{runner}", action="append", default=[], type=_labelled, metavar="LABEL=DIR", help=f"{text}; repeatable")
    add("--rounds", type=cli.positive, default=3, metavar="N", help="default: %(default)s")
    for field in dataclasses.fields(Workload):
        default = getattr(work, field.name)
        add(f"--{field.name}", type=cli.positive, default=default, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write every single result, too")
    add("--measure", help=argparse.SUPPRESS)  # a child's request
    return parser


def _labelled(text: str) -> tuple[str, Path]:
    label, separator, folder = text.partition("=")
    if not (label and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form LABEL=DIR")
    return label, Path(folder)


def _main(arguments: argparse.Namespace) -> int:
    if arguments.measure is not None:
        runner, folder, settings = json.loads(arguments.measure)
        result = measure(runner, Path(folder), Workload(**settings))
        sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")
        return 0
    work = Workload(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Workload)})
    contestants = [
        Contestant(label, runner, folder)
        for runner in ("bundle", "genai")
        for label, folder in getattr(arguments, runner)
    ]
    if not contestants or len({contestant.label for contestant in contestants}) < len(contestants):
        raise UsageError("There is nothing to compare; expected --bundle or --genai, every label once.")
    results = compare(contestants, work, arguments.rounds)
    if arguments.json is not None:
        runs = {label: [dataclasses.asdict(result) for result in one] for label, one in results.items()}
        report = {"workload": dataclasses.asdict(work), "versions": _versions(), "results": runs}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(render(results))
    return 0


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("fusion-edge", "onnxruntime", "onnxruntime-genai"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


if __name__ == "__main__":
    sys.exit(main())
