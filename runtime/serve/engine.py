"""The model behind the server: loads in the background, queues questions for one worker, and drains."""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.choices import Choice
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.loop.asker import Asker
from fusion_edge.runtime.loop.request import Request
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.metrics import Metrics
from fusion_edge.runtime.serve.question import Question, Runner
from fusion_edge.runtime.serve.settings import ServeSettings
from fusion_edge.runtime.serve.token_logprobs import LogprobWriter

Asked = Request[Answer | Choice]
_Queued = asyncio.Future[tuple[Question, Asked]]
"""A request once it waits for the worker; or why it does not get so far."""

_RECENT = 32  # runs whose median predicts the next one
_LOADING_SECONDS = 1
_LOGGER = logging.getLogger("fusion_edge")


class Model:
    """A loaded model with the worker that asks it."""

    def __init__(self, fusion: Fusion, settings: ServeSettings) -> None:
        self.fusion = fusion
        self.asker = Asker(fusion, capacity=settings.queue + 1, when_full="refuse")
        self.runner = Runner(fusion, settings.cached_images)
        self.logprobs = LogprobWriter(fusion)

    def close(self) -> None:
        """Cancel what runs, and free the model."""
        self.asker.close()
        self.fusion.close()


class Engine:
    """One model and its queue, for one event loop.

    A request takes a place of the queue before its picture is decoded, so a burst of refused requests costs no memory.
    A task of its own has the place, prepares the request, queues it and waits for its end, also once the client has
    left: a thread that decodes a picture cannot be interrupted. The place comes back, once, when that task ends.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self.metrics.read(self.running, self.waiting, self.image_cache)
        self._model: Model | None = None
        self._error: BaseException | None = None
        self._is_draining = self._is_closed = False
        self._taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._live: set[Asked] = set()
        self._tasks: dict[asyncio.Task[None], _Queued] = {}
        """The task of every place."""
        self._seconds = deque[float](maxlen=_RECENT)
        self.loaded: asyncio.Future[Fusion] = asyncio.get_running_loop().create_future()
        """The model, once it is loaded, or the error of the load."""
        self.loaded.add_done_callback(lambda future: future.cancelled() or future.exception())  # seen
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._load, args=(loop,), name="fusion-edge load", daemon=True).start()

    @property
    def state(self) -> str:
        """``loading``, ``ready``, ``draining`` or ``failed``."""
        if self._error is not None:
            return "failed"
        if self._is_draining:
            return "draining"
        return "loading" if self._model is None else "ready"

    def model(self) -> Model:
        """Return the model. Raise :class:`ApiError` while it loads, once the server drains, and if the load failed."""
        if self._is_draining:
            self.metrics.refused.labels("draining").inc()
            raise shutting_down()
        if self._error is not None:
            raise ApiError(503, "The model could not be loaded; see the server's messages.", code="load_failed")
        if self._model is None:
            self.metrics.refused.labels("loading").inc()
            headers = {"Retry-After": str(_LOADING_SECONDS)}
            raise ApiError(503, "The model is being loaded; try again.", code="loading", headers=headers)
        return self._model

    async def submit(
        self, prepare: Callable[[], Awaitable[Question]], due: float, arrived: float
    ) -> tuple[Question, Asked]:
        """Take a place of the queue, prepare a question and queue it.

        Args:
            prepare: Returns the question; called only if there is a place. Cancelled once the client has left, the
                deadline has passed or a drain ends; the place comes back when it has ended.
            due: When the request ends, in seconds of ``time.monotonic``; infinite without a deadline.
            arrived: When the request arrived, in the same seconds.

        Raises:
            ApiError: The queue is full (429), the model does not answer (503), or the deadline has passed (504).
        """
        model = self.model()
        if due <= time.monotonic():
            raise self._late("before the request had arrived")
        if self._taken > self._settings.queue:  # one more runs
            raise self._full()
        self._taken += 1
        self._idle.clear()
        queued: _Queued = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._attend(model, prepare, queued, due, arrived))
        self._tasks[task] = queued
        task.add_done_callback(self._give_back)
        try:
            await asyncio.wait([queued], timeout=None if math.isinf(due) else max(0.0, due - time.monotonic()))
            if not queued.done():
                raise self._late("while the request was prepared")
            return queued.result()
        except asyncio.CancelledError:
            if not queued.done():
                self.metrics.cancelled.inc()
            elif queued.exception() is None:
                queued.result()[1].cancel()
            raise
        finally:
            if not queued.done():
                queued.cancel()
                task.cancel()

    def running(self) -> int:
        """Number of questions that the worker runs."""
        return sum(request.started is not None and request.outcome is None for request in tuple(self._live))

    def waiting(self) -> int:
        """Number of requests that wait for the worker or are being prepared, also for a client that has left."""
        return max(0, self._taken - self.running())

    def image_cache(self) -> tuple[int, int]:
        """Return the hits and misses of the image cache."""
        if self._model is None:
            return 0, 0
        images = self._model.fusion.pipeline.images
        return images.hits, images.misses

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait for the others at most ``seconds``, then cancel them."""
        self._is_draining = True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        for task, queued in tuple(self._tasks.items()):
            if not queued.done():
                self.metrics.cancelled.inc()
                queued.set_exception(shutting_down())
                task.cancel()
        for request in tuple(self._live):
            request.cancel()
        await self._idle.wait()

    async def close(self) -> None:
        """Cancel what runs, and free the model. One that still loads is freed when it is loaded."""
        with self._lock:
            self._is_draining = self._is_closed = True
            model = self._model
        if model is not None:
            await asyncio.to_thread(model.close)

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        settings = self._settings
        try:
            fusion = load(
                settings.bundle,
                device=settings.device,
                threads=settings.threads,
                spin=settings.spin,
                preload=settings.preload,
                lock_memory=settings.lock_memory,
                cached_images=settings.cached_images,
            )
        except BaseException as error:
            self._error = error
            outcome = partial(self.loaded.set_exception, error)
        else:
            model = Model(fusion, settings)
            with self._lock:
                self._model, is_closed = model, self._is_closed
            if is_closed:
                model.close()
            outcome = partial(self.loaded.set_result, fusion)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(outcome)

    async def _attend(
        self, model: Model, prepare: Callable[[], Awaitable[Question]], queued: _Queued, due: float, arrived: float
    ) -> None:
        """Prepare a request and queue it. Wait for its end, also if its client has left; then record it."""
        begun = time.monotonic()
        try:
            question = await prepare()
            del prepare  # it has the request
            if queued.done() or (seconds := due - time.monotonic()) <= 0:
                return  # the deadline has passed, or is about to end the wait of :meth:`submit`
            prepared_in = time.monotonic() - begun
            deadline = None if math.isinf(seconds) else seconds
            request = model.asker.submit_run(partial(model.runner.run, question), deadline)
        except Exception as error:
            if not queued.done():
                queued.set_exception(error)
            return
        self._live.add(request)
        queued.set_result((question, request))
        del question  # the request lets go of it
        with suppress(Exception):  # whoever asked gets it, too
            await request
        await asyncio.sleep(0)  # the answer is sent first
        if request.started is not None:
            self._seconds.append(time.monotonic() - request.started)
        self._live.discard(request)
        self.metrics.observe(request, arrived, prepared_in)

    def _give_back(self, task: asyncio.Task[None]) -> None:
        """Give back the place of a task that has ended."""
        queued = self._tasks.pop(task)
        if queued.done() and not queued.cancelled():
            queued.exception()  # seen, also if the client has left meanwhile
        if not task.cancelled() and (defect := task.exception()) is not None:
            _LOGGER.error("A request was not recorded.", exc_info=defect)
        self._taken -= 1
        if not self._taken:
            self._idle.set()

    def _late(self, place: str) -> ApiError:
        """Count a request whose deadline passed before it was queued, and return its error."""
        self.metrics.late.inc()
        return late(place)

    def _full(self) -> ApiError:
        """Return the error of a full queue. Its ``Retry-After`` is when the requests that wait will have run."""
        self.metrics.refused.labels("queue_full").inc()
        seconds = statistics.median(self._seconds or [1.0]) * self.waiting()
        headers = {"Retry-After": str(math.ceil(seconds)), "Retry-After-Ms": str(math.ceil(1000 * seconds))}
        message = f"{self.waiting()} requests wait, the limit of this server; ask again in {seconds:.1f} s."
        return ApiError(429, message, code="queue_full", headers=headers)


def late(place: str) -> ApiError:
    """Return the error of a request whose deadline passed before its answer began. OpenAI's clients do not retry it."""
    message = f"The deadline passed {place}; allow more time."
    return ApiError(504, message, code="deadline_exceeded", headers={"X-Should-Retry": "false"})


def shutting_down() -> ApiError:
    """Return the error of a request that a shutdown refused or ended."""
    headers = {"Connection": "close"}
    return ApiError(503, "The server shuts down; ask another one.", code="shutting_down", headers=headers)
