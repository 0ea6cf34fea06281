"""Metrics for Prometheus. Names are vLLM's, with the prefix ``fusion_``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.choices import Choice
from fusion_edge.runtime.errors import Stopped
from fusion_edge.runtime.loop.request import Request

Reading = Callable[[], int]
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
"""Buckets: from the demo model on a desktop to long answers of a 3B model on a small processor."""

REFUSALS = ("queue_full", "loading", "draining", "too_many_bytes")
"""Why a request was not queued."""


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"fusion_{name}_seconds", text, labels, buckets=_SECONDS, registry=self._registry)

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fusion_{name}", text, labels, registry=self._registry)

        self._first = seconds("time_to_first_token", "From the arrival of a request to its first text.")
        self._per_token = seconds("time_per_output_token", "Decode time of a token after the first one.")
        self._total = seconds("e2e_request_latency", "From the arrival of a request to its end.")
        self._waited = seconds("request_queue_time", "From the arrival of a request to the start of its run.")
        self._stages = seconds("stage", "Time of a request in a stage, its preparation included.", "stage")
        self._prompt = count("prompt_tokens", "Tokens of prompts: text, image tokens and latents.")
        self._generated = count("generation_tokens", "Generated tokens.")
        self._answered = count("request_success", "Requests that were answered.", "finished_reason")
        self.cancelled = count("request_cancelled", "Requests whose client left, or that a shutdown ended.")
        self.late = count("request_late", "Requests that their deadline ended.")
        self._failed = count("request_failed", "Requests that the model could not answer.")
        self.refused = count("request_refused", "Requests that were not queued.", "reason")
        """Requests that were not queued, by one of :data:`REFUSALS`."""
        for reason in REFUSALS:  # a counter that is absent is not 0
            self.refused.labels(reason)
        for reason in ("stop", "length"):
            self._answered.labels(reason)

    def read(self, running: Reading, waiting: Reading, images: Callable[[], tuple[int, int]]) -> None:
        """Read these values whenever the metrics are read. ``images`` are the image cache's hits and misses."""
        self._registry.register(_Readings(running, waiting, images))

    def observe(self, request: Request[Answer | Choice], arrived: float, prepared_in: float) -> None:
        """Record a request that was queued and has ended.

        Args:
            request: The request.
            arrived: When it arrived, in seconds of ``time.monotonic``.
            prepared_in: Seconds from its place in the queue to the question that the model takes.
        """
        reached: Answer | Choice | None = None
        try:
            reached = request.result()
        except Stopped as stopped:
            reached = stopped.partial
        except Exception:  # counted as a failure
            pass
        self._observe_times(request, reached, arrived, prepared_in)
        if isinstance(reached, Answer | Choice):
            self._prompt.inc(reached.prompt_tokens)
        if isinstance(reached, Answer):
            self._generated.inc(len(reached.token_ids))
        if request.outcome == "answered":
            reason = reached.finish_reason if isinstance(reached, Answer) else "stop"
            self._answered.labels(reason).inc()
        elif request.outcome == "cancelled":
            self.cancelled.inc()
        elif request.outcome == "late":
            self.late.inc()
        else:
            self._failed.inc()

    def _observe_times(
        self, request: Request[Answer | Choice], reached: Answer | Choice | None, arrived: float, prepared_in: float
    ) -> None:
        self._total.observe(time.monotonic() - arrived)
        if request.started is not None:
            self._waited.observe(request.started - arrived)
        if request.first_piece is not None:
            self._first.observe(request.first_piece - arrived)
        if reached is None or request.started is None:
            return
        for stage, milliseconds in reached.timings_ms.items():
            before = prepared_in if stage == "preprocess" else 0.0
            self._stages.labels(stage).observe(before + milliseconds / 1000)
        if isinstance(reached, Answer) and reached.tokens_per_second:
            self._per_token.observe(1 / reached.tokens_per_second)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _Readings(Collector):
    """Values that are read, not counted."""

    def __init__(self, running: Reading, waiting: Reading, images: Callable[[], tuple[int, int]]) -> None:
        self._running, self._waiting, self._images = running, waiting, images

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("fusion_num_requests_running", "Requests that run.", self._running())
        yield GaugeMetricFamily("fusion_num_requests_waiting", "Requests that wait.", self._waiting())
        hits, misses = self._images()
        yield CounterMetricFamily("fusion_image_cache_queries", "Pictures that a run needed encoded.", hits + misses)
        yield CounterMetricFamily("fusion_image_cache_hits", "Pictures that were encoded before.", hits)
