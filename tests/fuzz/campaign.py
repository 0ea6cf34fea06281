"""Choose mutants, run them and collect the results."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fuzz.children import Batch, Children
from fuzz.judge import Kind, Verdict

PACKAGES = ("fusion-edge", "numpy", "onnx", "onnxruntime", "pillow", "tokenizers")
SEEDS = 10**7
"""Maximum number of mutants of a kind per campaign seed."""
MEASURED = frozenset({"hang", "memory"})
"""Failures that a busy machine may cause: they count only if they recur."""
RETRY_PATIENCE = 5.0
"""Factor on the time limit when a mutant runs again after such a failure."""
SHOWN = 5  # seeds of a failure


@dataclasses.dataclass
class Tally:
    """Statistics of one kind."""

    mutants: int = 0
    accepted: int = 0
    seconds: float = 0.0
    """Total run time of all mutants, over all processes."""
    unchanged_seconds: float = 0.0
    """Run time of the unchanged input."""
    slowest: float = 0.0
    growth: int = 0
    """Largest memory growth of a mutant, in bytes."""


@dataclasses.dataclass
class Failure:
    """All failures of one kind of input, failure and place."""

    kind: str
    failure: str
    place: str
    seeds: list[int]
    example: Verdict


class Campaign:
    """Runs mutants of several kinds up to a number or a time, and updates ``failures`` and ``tallies``."""

    def __init__(self, kinds: Mapping[str, Kind], children: Children, seed: int) -> None:
        """Start a campaign of prepared ``kinds``. Mutant ``i`` of each has the seed ``seed * SEEDS + i``."""
        self.kinds = kinds
        self.seed = seed
        self.tallies = {name: Tally() for name in kinds}
        self.failures: dict[tuple[str, str, str], Failure] = {}
        self.dismissed: list[tuple[str, int, str]] = []
        """Kind, seed and failure of mutants that did not fail again."""
        self._children = children

    def run(self, count: int | None, seconds: float | None) -> Iterator[None]:
        """Judge ``count`` mutants, or as many as ``seconds`` allow. Yield after each."""
        self._try_unchanged()
        deadline = None if seconds is None else time.monotonic() + seconds
        suspects: list[tuple[str, Verdict]] = []
        for name, verdict in self._children.run(self._batches(count, deadline)):
            tally = self.tallies[name]
            tally.mutants += 1
            tally.accepted += verdict.accepted
            tally.seconds += verdict.seconds
            tally.slowest = max(tally.slowest, verdict.seconds)
            tally.growth = max(tally.growth, verdict.growth)
            if verdict.failure in MEASURED:
                suspects.append((name, verdict))
            elif verdict.failure:
                self._note(name, verdict)
            yield
        self._try_again(suspects)

    def _try_unchanged(self) -> None:
        """Check that the unchanged inputs are accepted. Otherwise every mutant would be refused for the same reason."""
        # The first of two runs loads code, which costs memory and time once.
        second = dict(self._children.run(Batch(name, [None, None], RETRY_PATIENCE) for name in self.kinds))
        for name, verdict in second.items():
            if verdict.failure or not verdict.accepted:
                reason = f"{verdict.failure} {verdict.detail} {verdict.written}"
                raise RuntimeError(f"The unchanged input of {name} is refused: {reason}")
            self.tallies[name].unchanged_seconds = verdict.seconds

    def _try_again(self, suspects: list[tuple[str, Verdict]]) -> None:
        first = {(name, verdict.seed): verdict for name, verdict in suspects}
        for name, again in self._children.run(
            Batch(name, [verdict.seed], RETRY_PATIENCE) for name, verdict in suspects
        ):
            if again.failure:
                self._note(name, again)
            else:
                self.dismissed.append((name, again.seed, first[name, again.seed].failure))

    def _batches(self, count: int | None, deadline: float | None) -> Iterator[Batch]:
        """Yield kinds in turn, in proportion to their shares."""
        shares = {name: kind.share or 1 for name, kind in self.kinds.items()}
        total = sum(shares.values())
        given = Counter[str]()
        left = {n: None if count is None else round(count * share / total) for n, share in shares.items()}
        while (deadline is None or time.monotonic() < deadline) and any(left[name] != 0 for name in left):
            name = min((n for n in left if left[n] != 0), key=lambda n: given[n] / shares[n])
            rest = left[name]
            size = self.kinds[name].batch if rest is None else min(self.kinds[name].batch, rest)
            if deadline is not None:  # a batch must end before the deadline
                size = max(1, min(size, int((deadline - time.monotonic()) / (self._pace(name) or 0.02))))
            start = self.seed * SEEDS + given[name]
            given[name] += size
            left[name] = None if rest is None else rest - size
            yield Batch(name, list(range(start, start + size)))

    def _pace(self, name: str) -> float:
        tally = self.tallies[name]
        return tally.seconds / tally.mutants if tally.mutants else tally.unchanged_seconds

    def _note(self, name: str, verdict: Verdict) -> None:
        key = name, verdict.failure, verdict.place
        failure = self.failures.setdefault(key, Failure(*key, [], verdict))
        failure.seeds.append(verdict.seed)

    @property
    def mutants(self) -> int:
        """Return the number of mutants judged so far."""
        return sum(tally.mutants for tally in self.tallies.values())

    def result(self, seconds: float) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "mutants": self.mutants,
            "mutants_per_second": round(self.mutants / seconds, 1) if seconds else None,
            "failures": sum(len(failure.seeds) for failure in self.failures.values()),
            "kinds": {name: _rounded(dataclasses.asdict(tally)) for name, tally in self.tallies.items()},
            "failed": [
                {
                    "failure": failure.failure,
                    "place": failure.place,
                    "replay": [f"{failure.kind}:{seed}" for seed in failure.seeds[:SHOWN]],
                    "times": len(failure.seeds),
                    "changes": failure.example.changes,
                    "detail": failure.example.detail[-3000:],
                }
                for failure in self.failures.values()
            ],
            "not_again": [f"{name}:{seed} {failure}" for name, seed, failure in self.dismissed],
            "processor": _processor(),
            "python": platform.python_version(),
            "versions": {package: found for package in PACKAGES if (found := _version(package))},
        }

    def summary(self) -> str:
        """Return the failures as text. Empty if there are none."""
        lines = []
        for failure in sorted(self.failures.values(), key=lambda f: -len(f.seeds)):
            seeds = " ".join(f"{failure.kind}:{seed}" for seed in failure.seeds[:SHOWN])
            lines.append(f"{failure.failure} ({len(failure.seeds)} times): {failure.place}\n    --replay {seeds}\n")
            lines.append(f"    {'; '.join(failure.example.changes)[:300]}\n")
        return "".join(lines)


def _rounded(tally: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in tally.items()}


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
