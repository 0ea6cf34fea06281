"""That the campaign finds what it is there to find; ``.ci/run`` has one of two minutes, with new mutants every day."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz.kinds import kinds
from fuzz.mutations import mutate_bytes, mutate_json, to_json_bytes
from fuzz.planted import FAULTS, RIGHT

CHECKOUT = Path(__file__).parents[1]


pytestmark = pytest.mark.xdist_group("fuzz")  # one process runs the campaign


def fuzz(*options: object) -> subprocess.CompletedProcess[str]:
    """``python -m tests.fuzz`` in a process of its own: it forks, which a process with threads should not."""
    command = [sys.executable, "-m", "tests.fuzz", *map(str, options)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The result of a campaign on planted faults, and what was printed."""
    path = tmp_path_factory.mktemp("fuzz") / "result.json"
    ran = fuzz("--kind=planted", "--count=90", "--seed=3", f"--json={path}")
    assert ran.returncode == 1, ran.stderr
    return json.loads(path.read_text(encoding="utf-8")), ran.stdout


def test_every_planted_fault_is_found(planted: tuple[dict[str, Any], str]) -> None:
    result, printed = planted
    found = {failed["changes"][0]: failed["failure"] for failed in result["failed"]}
    assert found == {name: failure for name, (failure, _) in FAULTS.items()}
    assert result["mutants"] == result["kinds"]["planted"]["mutants"] == 90
    for failed in result["failed"]:
        assert failed["replay"][0] in printed


def test_what_is_right_is_no_failure(planted: tuple[dict[str, Any], str]) -> None:
    result, _ = planted
    right = 90 - result["failures"]
    assert 0 < result["kinds"]["planted"]["accepted"] < right
    assert not {failed["changes"][0] for failed in result["failed"]} & set(RIGHT)


def test_a_mutant_is_replayed(planted: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    by_failure = {failed["failure"]: failed for failed in planted[0]["failed"]}
    for failed in by_failure.values():
        ran = fuzz("--replay", failed["replay"][0], "--keep", tmp_path / failed["failure"])
        assert ran.returncode == 1
        assert f"changed: {failed['changes'][0]}\n" in ran.stdout
        assert f'"failure": "{failed["failure"]}"' in ran.stdout
        if failed["failure"] == "exception":
            assert "ValueError: a planted fault" in ran.stdout
    assert list((tmp_path / "files").iterdir()) == [tmp_path / "files" / "output"]


def test_seeds_that_are_none() -> None:
    for wrong in ("image", "image:x", "nothing:1"):
        ran = fuzz("--replay", wrong)
        assert (ran.returncode, ran.stderr) == (2, f"error: {wrong} is not a KIND:SEED, such as image:3.\n")


def test_a_seed_gives_the_same_mutant_again() -> None:
    tree = {"a": [1, 2.5, "text"], "b": {"c": None, "d": True}}
    for seed in range(200):
        once, again = Random(seed), Random(seed)
        assert mutate_bytes(once, bytes(range(99))) == mutate_bytes(again, bytes(range(99)))
        (changed, told), same = mutate_json(once, tree), mutate_json(again, tree)
        assert (repr(changed), told) == (repr(same[0]), same[1])
        assert to_json_bytes(once, changed) == to_json_bytes(again, changed)
    assert tree == {"a": [1, 2.5, "text"], "b": {"c": None, "d": True}}


def test_a_campaign_has_every_kind_of_input() -> None:
    shares = {name: kind.share for name, kind in kinds().items() if kind.share}
    assert set(shares) == {"checkpoint", "tokenizer", "bundle", "image", "history"}
    assert sum(shares.values()) == 100
