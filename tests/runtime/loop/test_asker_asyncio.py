"""Requests in an event loop."""

from __future__ import annotations

import asyncio

import pytest
from fakes.watched_backend import SHORT, BlockedCall, picture
from support.askers import MakeAsker

from fusion_edge.runtime import (
    Answer,
    Asker,
    Cancelled,
    DeadlineExceeded,
    Fusion,
    FusionError,
    Request,
    Sampling,
    Superseded,
)


def test_ask_and_pieces(fusion: Fusion, asker: Asker) -> None:
    async def main() -> None:
        answer = await asker.ask(picture(), "What?", sampling=SHORT)
        assert answer.text == fusion.answer(picture(), "What?", sampling=SHORT).text
        request = asker.submit(picture(), "What?", sampling=SHORT)
        assert "".join([piece async for piece in request]).strip() == answer.text
        assert (await request).text == (await request).text == answer.text

    asyncio.run(main())


def test_many_tasks(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(capacity=1, when_full="wait")
    expected = [fusion.answer(picture(seed), "What?", sampling=SHORT).text for seed in range(3)]

    async def main() -> list[Answer]:
        return await asyncio.gather(*(asker.ask(picture(n % 3), "What?", sampling=SHORT) for n in range(30)))

    assert [answer.text for answer in asyncio.run(main())] == expected * 10


def test_canceling_a_task_cancels_the_run(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "decode")

    async def main() -> None:
        task = asyncio.create_task(asker.ask(picture(), "What?", sampling=Sampling(max_new_tokens=60)))
        assert await asyncio.to_thread(call.reached.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        call.release()
        assert (await asker.ask(picture(), "What?", sampling=SHORT)).text

    asyncio.run(main())
    figures = asker.latencies()
    assert (figures.cancelled, figures.answered) == (1, 1)


def test_a_wait_that_is_canceled_leaves_a_request_alone(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "decode")

    async def main() -> None:
        request = asker.submit(picture(), "What?", sampling=SHORT)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_result(request), 0.01)
        call.release()
        assert (await request).finish_reason != "cancelled"

    asyncio.run(main())


async def _result(request: Request[Answer]) -> Answer:
    return await request


def test_errors(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "encode")

    async def main() -> None:
        running = asker.submit(picture(), "What?", sampling=SHORT)
        assert await asyncio.to_thread(call.reached.wait, 20)
        with pytest.raises(DeadlineExceeded):
            await asker.ask(picture(), "What?", deadline=0.01)
        old = asker.submit(picture(), "What?", key="front")
        canceled = asker.submit(picture(1), "What?", key="front", sampling=SHORT)
        with pytest.raises(Superseded):
            await old
        canceled.cancel()
        with pytest.raises(Cancelled):
            [piece async for piece in canceled]
        call.release()
        assert await running
        with pytest.raises(FusionError, match="does not exist"):
            await asker.ask("no such file.png", "What?")

    asyncio.run(main())


def test_an_abandoned_loop_does_not_matter(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "encode")
    request = asker.submit(picture(), "What?", sampling=SHORT)

    async def main() -> None:
        asyncio.ensure_future(_result(request))  # noqa: RUF006
        assert await asyncio.to_thread(call.reached.wait, 20)

    asyncio.run(main())
    call.release()
    assert request.result(20).text
