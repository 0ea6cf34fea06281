"""Forked processes: they cannot use the parent's ``Fusion``, and free none of its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FORK = """
import gc, os, signal, sys, threading
import numpy as np
from fusion_edge.runtime import FusionError, Sampling, load

picture, short = np.zeros((5, 7, 3), np.uint8), Sampling(max_new_tokens=6)
os.sched_setaffinity(0, range(os.cpu_count()))
fusion = load(sys.argv[1])
expected = fusion.answer(picture, "What?", sampling=short).text
scene = fusion.look(picture, "What?")
conversation, stream = fusion.conversation(picture), fusion.stream(picture, "What?", sampling=short)
next(stream)
stop = threading.Event()
if sys.argv[2] == "busy":
    def ask_on():
        while not stop.is_set():
            fusion.answer(picture, "What?", sampling=short)
    other = threading.Thread(target=ask_on)
    other.start()

def leave():
    with fusion:
        pass

def drop():
    global fusion, conversation, stream, scene
    fusion = conversation = stream = scene = None
    gc.collect()

for code in sys.argv[3:]:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        outcome = "nothing"
        try:
            exec(code)
        except FusionError as error:
            outcome = f"{type(error).__name__}: {error}"
        print(outcome)
        sys.exit(3)  # a normal exit, with the destructors of libraries
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3, (code, status)
stop.set()
if sys.argv[2] == "busy":
    other.join()
assert fusion.answer(picture, "What?", sampling=short).text == expected
fusion.close()
print("parent done", flush=True)
os._exit(0)
"""
IN_CHILD = {  # call and start of its error
    "fusion.close(); fusion.close()": "nothing",
    "fusion.cancel(); stream.cancel()": "nothing",
    "leave()": "nothing",
    "drop()": "nothing",
    'fusion.answer(picture, "What?")': "FusionError",
    'next(fusion.ask(picture, "What?"))': "FusionError",
    "next(stream)": "FusionError",
    'conversation.answer("What?")': "FusionError",
    'next(conversation.ask("What?"))': "FusionError",
    "fusion.conversation(picture)": "FusionError",
    "fusion.encode_image(picture)": "FusionError",
    "fusion.look(picture)": "FusionError",
    'scene.answer("What?")': "FusionError",
    "scene.close()": "nothing",
}


@pytest.mark.parametrize("parent", ["idle", "busy"])
def test_a_fork(tiny_bundle: Path, parent: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_bundle), parent, *IN_CHILD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    *children, last = done.stdout.splitlines() or [""]
    assert last == "parent done", done.stderr
    for outcome, expected in zip(children, IN_CHILD.values(), strict=True):
        assert outcome.partition(":")[0] == expected
        if expected != "nothing":
            assert outcome.startswith("FusionError: This process is a fork of process ")
            assert outcome.endswith(", which loaded the model; load the bundle after the fork.")
