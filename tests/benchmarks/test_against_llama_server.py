"""What the comparison with llama-server reads and reckons."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.benchmarks.serving.against_llama_server import has_text, memory, processor_seconds, summary
from fusion_edge.benchmarks.serving.server_process import ServerProcess


def event(**delta: str | None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
START = event(role="assistant", content=None) + event(content="")


@given(st.text(min_size=1), st.data())
def test_a_stream_has_text_from_its_first_complete_event_with_text_on(text: str, data: st.DataObject) -> None:
    whole = HEAD + START + event(content=text)
    cut = data.draw(st.integers(0, len(whole)))
    assert has_text(whole[:cut]) == (cut >= len(whole) - 1)  # the event's line is complete


def test_other_events_are_no_text() -> None:
    assert not has_text(HEAD + START + b'data: {"choices": []}\n\ndata: [DONE]\n\n')


def test_a_summary_keeps_the_extremes() -> None:
    assert summary([3.0, 1.0, 8.125]) == {"median": 3.0, "min": 1.0, "max": 8.12, "count": 3}
    assert summary([]) is None


def test_figures_of_a_process() -> None:
    program = "held = b'1' * 50_000_000; print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = ServerProcess(child, 0)
        sizes, before = memory(process), processor_seconds(process)
        due = time.monotonic() + 60
        while processor_seconds(process) - before < 0.05:  # soon, if nothing else runs
            assert time.monotonic() < due
            time.sleep(0.01)
        child.kill()
    assert 50 < sizes["anonymous"] <= sizes["proportional"] <= sizes["resident"] < 100
