"""Answers to questions about frames: an asker, and a thread that follows its requests. Needs no ROS."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable
from concurrent import futures
from typing import Any

from fusion_edge import Asker, Fusion, FusionError, Latencies, Request, Sampling
from fusion_edge_ros.frames import Frame
from fusion_edge_ros.questions import Question, Reply, reply_of_error, reply_of_result

_LOGGER = logging.getLogger("fusion_edge_ros")


class Answering:
    """Asks a model, and calls back. No method but :meth:`close` waits.

    One thread follows all requests in an event loop, because an answer's pieces are awaited. Callbacks run there, and
    must not wait.
    """

    def __init__(self, fusion: Fusion, *, capacity: int, max_new_tokens: int, query_length: int | None) -> None:
        """Start the threads.

        Args:
            fusion: The model, which stays open.
            capacity: Limit of questions that wait; a further one ends as ``refused``.
            max_new_tokens: Limit of generated tokens for questions without one.
            query_length: Number of latents. Default: the bundle's first.
        """
        self._asker = Asker(fusion, capacity=capacity, when_full="refuse")
        self._max_new_tokens, self._query_length = max_new_tokens, query_length
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fusion-edge answers", daemon=True)
        self._thread.start()
        self._followed: set[futures.Future[None]] = set()

    def ask(
        self,
        question: Question,
        frame: Frame,
        when_ended: Callable[[Reply], object],
        *,
        key: Hashable = None,
        priority: int = 0,
        when_stage: Callable[[str], object] | None = None,
        when_piece: Callable[[str], object] | None = None,
    ) -> Request[Any] | None:
        """Ask a question.

        Args:
            question: The question.
            frame: What it is about.
            when_ended: Called once, with the reply.
            key: A newer question of an equal key replaces one that waits.
            priority: Higher runs earlier.
            when_stage: Called in the model's thread with each stage as it begins.
            when_piece: Called with each piece of the text; only texts have pieces.

        Returns:
            The request, to cancel it; None if the question has ended.
        """
        try:
            request = self._submit(question, frame, key, priority, when_stage)
        except FusionError as error:
            when_ended(reply_of_error(error))
            return None
        followed = asyncio.run_coroutine_threadsafe(self._follow(request, question, when_piece, when_ended), self._loop)
        self._followed.add(followed)
        followed.add_done_callback(self._followed.discard)
        return request

    def latencies(self) -> Latencies:
        """Return the latencies of the latest answers, and the number of questions by how they ended."""
        return self._asker.latencies()

    def close(self) -> None:
        """End all questions, call back for each, and wait for the threads. The model stays open."""
        self._asker.close()
        futures.wait(tuple(self._followed))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(
        self,
        question: Question,
        frame: Frame,
        key: Hashable,
        priority: int,
        when_stage: Callable[[str], object] | None,
    ) -> Request[Any]:
        options: dict[str, Any] = {
            "key": key,
            "priority": priority,
            "deadline": question.deadline or None,
            "on_stage": when_stage,
            "query_length": self._query_length,
            "color": frame.color,
        }
        if question.choices:
            return self._asker.submit_choose(frame.picture, question.question, question.choices, **options)
        options["sampling"] = Sampling(max_new_tokens=question.max_new_tokens or self._max_new_tokens)
        if question.schema is not None:
            return self._asker.submit_json(frame.picture, question.question, question.schema, **options)
        return self._asker.submit(frame.picture, question.question, **options)

    async def _follow(
        self,
        request: Request[Any],
        question: Question,
        when_piece: Callable[[str], object] | None,
        when_ended: Callable[[Reply], object],
    ) -> None:
        try:
            if when_piece is not None:
                async for piece in request:
                    when_piece(piece)
            reply = reply_of_result(await request, question)
        except FusionError as error:
            reply = reply_of_error(error)
        except Exception as error:  # a defect: the question must end all the same
            _LOGGER.exception("A question ended by an unexpected exception.")
            reply = reply_of_error(error)
        when_ended(reply)
