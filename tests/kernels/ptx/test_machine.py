"""The interpreter's checks, one kernel of a few instructions each."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.handwritten_ptx import THREADS, Array, kernel

from fusion_edge.kernels.ptx.errors import (
    DataRace,
    DivergentThreads,
    InvalidLaunch,
    InvalidPtx,
    Misaligned,
    OutOfBounds,
    PtxError,
    UndefinedResult,
    Uninitialized,
    UnknownInstruction,
)
from fusion_edge.kernels.ptx.machine import run

OWN = "mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.b32 %r2, shared; add.s32 %r3, %r2, %r1;"
"""%r0: thread; %r3: its four bytes of shared memory."""
ADDRESS = "ld.param.b64 %d0, [p0]; mov.u32 %r0, %tid.x; mad.wide.u32 %d1, %r0, 4, %d0;"
"""%d1: the thread's four bytes of the buffer."""
BLOCKS = "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.s32 %r3, %r1, %r2, %r0; mad.wide.u32 %d2, %r3, 4, %d0;"
"""%d2: the bytes of the thread among those of all blocks."""


def launch(
    body: str, *arguments: Array | int, blocks: int = 1, shared_bytes: int = 4 * THREADS, threads: int = THREADS
) -> None:
    bits = [64 if isinstance(argument, np.ndarray) else 32 for argument in arguments]
    ptx = kernel(body, *bits, threads=threads)
    run(ptx, grid=blocks, block=threads, arguments=arguments, shared_bytes=shared_bytes)


def numbers(count: int = THREADS) -> Array:
    return np.arange(count, dtype=np.uint32)


@pytest.mark.parametrize(
    ("body", "error", "reason"),
    [
        (f"{ADDRESS} ld.global.b32 %r4, [%d1+4];", OutOfBounds, r"\(byte 128 of buffer 0\) are outside of every"),
        (f"{ADDRESS} ld.global.b32 %r4, [%d1+-4];", OutOfBounds, r"\(byte -4 of buffer 0\)"),
        ("mov.b64 %d0, 64; ld.global.b32 %r4, [%d0];", OutOfBounds, r"4 bytes at address 0x40 \(no buffer\)"),
        (f"{ADDRESS} ld.global.b64 %d2, [%d1];", Misaligned, "address 0x10000000014 is no multiple of 8 bytes"),
        (f"{ADDRESS} st.global.b16 [%d0+1], 0;", Misaligned, "is no multiple of 2 bytes"),
        (f"{OWN} st.shared.b32 [%r3+4], 0;", OutOfBounds, "4 bytes at offset 128 are outside of 128 bytes of shared"),
        (f"{OWN} st.shared.b32 [%r1], 0;", OutOfBounds, "offset -16"),
        (f"{OWN} ld.shared.b32 %r4, [%r3];", Uninitialized, "it reads shared memory that nothing wrote"),
        (f"{OWN} st.shared.b16 [%r3], 0; ld.shared.b32 %r4, [%r3];", Uninitialized, "nothing wrote"),
        (f"{OWN} st.shared.b32 [%r3], %r9;", Uninitialized, "it depends on a register that has no value"),
        (f"{OWN} add.s32 %r4, %r9, 1; st.shared.b32 [%r3], %r4;", Uninitialized, "has no value"),
        (f"{OWN} ld.shared.b32 %r4, [%r9];", Uninitialized, "has no value"),
        ("@%p0 bra $done; $done:", Uninitialized, "has no value"),
        (f"{OWN} rem.s32 %r4, 7, %r0;", UndefinedResult, "it divides by zero"),
        (f"{OWN} setp.eq.u32 %p0, %r0, 3; @%p0 bar.sync 0;", DivergentThreads, "not all threads of the block reach it"),
        (
            f"{OWN} setp.eq.u32 %p0, %r0, 3; @%p0 bra $skip; bar.sync 0; $skip:",
            DivergentThreads,
            "not all threads of the block reach it",
        ),
        (
            f"{OWN} setp.eq.u32 %p0, %r0, 3; @%p0 shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;",
            DivergentThreads,
            "not all threads of the warp execute it",
        ),
        (
            f"{OWN} st.shared.b32 [%r3], 0; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r5}}, [%r3];",
            Misaligned,
            "a row's address is no multiple of 16 bytes",
        ),
        (
            f"{OWN} st.shared.b32 [%r3], 0; shl.b32 %r5, %r0, 3; add.s32 %r6, %r2, %r5; "
            "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r6];",
            Misaligned,
            "a row's address is no multiple of 16 bytes",
        ),
    ],
)  # fmt: skip
def test_what_an_access_must_be(body: str, error: type[PtxError], reason: str) -> None:
    arguments = [numbers()] if "p0]" in body else []
    with pytest.raises(error, match=reason) as raised:
        launch(body, *arguments)
    assert re.match(r"Line \d+, '.*', block \(0, 0, 0\), thread \d+: ", str(raised.value))
    assert type(raised.value) is error


def test_an_error_names_the_instruction_and_the_thread() -> None:
    body = f"{ADDRESS} {BLOCKS} ld.global.b32 %r4, [%d2];"
    message = r"^Line 13, 'ld.global.b32 %r4, \[%d2\]', block \(1, 0, 0\), thread 8: 4 bytes at address 0x100000000b0 "
    with pytest.raises(OutOfBounds, match=message):
        launch(body, numbers(40), blocks=2)


@pytest.mark.parametrize("between", ["", "bar.sync 0;"])
@pytest.mark.parametrize("distance", [1, 16, 32])
@pytest.mark.parametrize(
    "accesses",
    [
        "st.shared.b32 [%r3], %r0; BETWEEN ld.shared.b32 %r4, [%r7];",
        "st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r4, [%r7]; BETWEEN st.shared.b32 [%r3], 7;",
        "st.shared.b32 [%r3], %r0; BETWEEN st.shared.b32 [%r7], %r0;",
    ],
    ids=["read after write", "write after read", "write after write"],
)
def test_a_barrier_orders_threads(accesses: str, distance: int, between: str) -> None:
    """Threads of one warp and of two."""
    threads = 2 * THREADS
    other = f"{OWN} xor.b32 %r5, %r0, {distance}; shl.b32 %r6, %r5, 2; add.s32 %r7, %r2, %r6; "
    body = other + accesses.replace("BETWEEN", between)
    if between:
        launch(body, threads=threads, shared_bytes=4 * threads)
        return
    with pytest.raises(DataRace, match="another thread accesses the same bytes, and no barrier orders the two"):
        launch(body, threads=threads, shared_bytes=4 * threads)


def test_two_readers_and_a_writer() -> None:
    """A cell that several threads read has no one reader that may write it."""
    body = (
        f"{OWN} st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r4, [shared]; "
        "setp.eq.u32 %p0, %r0, 31; @%p0 st.shared.b32 [shared], 7;"
    )
    with pytest.raises(DataRace):
        launch(body)
    launch(body.replace("setp", "bar.sync 0; setp"))


def test_a_thread_needs_no_barrier_for_its_own_memory() -> None:
    launch(f"{OWN} st.shared.b32 [%r3], 1; ld.shared.b32 %r4, [%r3]; st.shared.b32 [%r3], 2;")


def test_stores_of_several_threads_to_one_place() -> None:
    launch(f"{OWN} st.shared.b32 [shared], 7;")
    launch(f"{OWN} st.shared.b32 [shared], 7; bar.sync 0; ld.shared.b32 %r4, [shared];")
    with pytest.raises(DataRace):
        launch(f"{OWN} st.shared.b32 [shared], %r0;")
    with pytest.raises(DataRace):
        launch(f"{OWN} st.shared.b32 [shared], 7; ld.shared.b32 %r4, [shared];")
    for last in (0, THREADS - 1):  # one of those that stored is not the only one
        again = f"setp.eq.u32 %p0, %r0, {last}; @%p0 st.shared.b32 [shared], 8;"
        launch(f"{OWN} st.shared.b32 [shared], 7; bar.sync 0; {again}")
        with pytest.raises(DataRace):
            launch(f"{OWN} st.shared.b32 [shared], 7; {again}")


@pytest.mark.parametrize(
    "accesses",
    [
        "st.global.b32 [%d1], %r3;",
        "st.global.b32 [%d2], 7; bar.sync 0; ld.global.b32 %r4, [%d1];",
        "ld.global.b32 %r4, [%d1]; bar.sync 0; st.global.b32 [%d2], 7;",
    ],
    ids=["write after write", "read after write", "write after read"],
)
def test_no_barrier_orders_blocks(accesses: str) -> None:
    launch(f"{ADDRESS} {BLOCKS} {accesses}", numbers())
    with pytest.raises(DataRace):
        launch(f"{ADDRESS} {BLOCKS} {accesses}", numbers(2 * THREADS), blocks=2)


def test_blocks_have_shared_memory_of_their_own() -> None:
    launch(f"{OWN} mov.u32 %r4, %ctaid.x; st.shared.b32 [%r3], %r4;", blocks=3)
    with pytest.raises(Uninitialized, match=r"block \(1, 0, 0\)"):
        launch(
            f"{OWN} mov.u32 %r4, %ctaid.x; setp.eq.u32 %p0, %r4, 0; @%p0 st.shared.b32 [%r3], %r4; "
            "ld.shared.b32 %r5, [%r3];",
            blocks=2,
        )


def test_undefined_values_that_nobody_uses() -> None:
    """Half of a packed register, and threads whose result is not stored."""
    half = f"{ADDRESS} ld.global.b32 %r1, [%d1]; mov.b64 %d3, {{%r1, %r8}}; add.f32x2 %d4, %d3, %d3; "
    launch(f"{half} mov.b64 {{%r2, _}}, %d4; st.global.b32 [%d1], %r2;", numbers())
    with pytest.raises(Uninitialized, match="has no value"):
        launch(f"{half} mov.b64 {{_, %r2}}, %d4; st.global.b32 [%d1], %r2;", numbers())
    some = f"{ADDRESS} setp.lt.u32 %p0, %r0, 16; @%p0 ld.global.b32 %r5, [%d1]; add.s32 %r6, %r5, 1; "
    launch(f"{some} @%p0 st.global.b32 [%d1], %r6;", numbers())
    with pytest.raises(Uninitialized, match="thread 16: it depends on a register that has no value"):
        launch(f"{some} st.global.b32 [%d1], %r6;", numbers())


def test_bytes_that_a_vector_load_does_not_use() -> None:
    own = "mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 3; mov.b32 %r2, shared; add.s32 %r3, %r2, %r1;"
    load = '.pragma "used_bytes_mask 0xf"; ld.shared.v2.b32 {%r4, %r5}, [%r3];'
    body = f"{own} st.shared.b32 [%r3], %r0; {load}"
    size = 8 * THREADS
    launch(f"{body} st.shared.b32 [%r3], %r4;", shared_bytes=size)
    with pytest.raises(Uninitialized, match="has no value"):
        launch(f"{body} st.shared.b32 [%r3], %r5;", shared_bytes=size)
    with pytest.raises(Uninitialized, match="nothing wrote"):
        launch(body.replace("0xf", "0xff"), shared_bytes=size)


def test_threads_that_branch_apart_meet_again() -> None:
    """A loop of as many rounds as the thread's number, then a barrier."""
    buffer = np.zeros(THREADS, np.uint32)
    launch(
        f"{ADDRESS} mov.b32 %r1, 0; mov.b32 %r2, 0;\n"
        "$loop: setp.ge.u32 %p0, %r1, %r0; @%p0 bra $end; add.s32 %r1, %r1, 1; add.s32 %r2, %r2, %r1; bra.uni $loop;\n"
        "$end: bar.sync 0; st.global.b32 [%d1], %r2;",
        buffer,
    )
    assert buffer.tolist() == [thread * (thread + 1) // 2 for thread in range(THREADS)]


def test_threads_exchange_registers() -> None:
    buffer = numbers()
    launch(f"{ADDRESS} shfl.sync.bfly.b32 %r4, %r0, 5, 31, -1; st.global.b32 [%d1], %r4;", buffer)
    assert buffer.tolist() == [thread ^ 5 for thread in range(THREADS)]


def test_an_exchanged_register_without_a_value() -> None:
    """Only thread 3 has none, so only its partner gets none."""
    body = (
        f"{ADDRESS} setp.ne.u32 %p0, %r0, 3; @%p0 mov.b32 %r4, 7; shfl.sync.bfly.b32 %r5, %r4, 5, 31, -1; "
        "setp.ne.u32 %p1, %r0, PARTNER; @%p1 st.global.b32 [%d1], %r5;"
    )
    buffer = numbers()
    launch(body.replace("PARTNER", "6"), buffer)
    assert buffer.tolist() == [6 if thread == 6 else 7 for thread in range(THREADS)]
    with pytest.raises(Uninitialized, match="has no value"):
        launch(body.replace("PARTNER", "3"), numbers())


def test_matrices() -> None:
    """Eight rows of eight halves; thread t has the halves 2t and 2t + 1 in row order. Rows lie in reverse."""
    buffer = numbers()
    rows = (
        "and.b32 %r5, %r0, 7; shl.b32 %r5, %r5, 4; sub.s32 %r6, 112, %r5; mov.b32 %r7, shared; add.s32 %r8, %r7, %r6;"
    )
    store = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r8], {%r0}; bar.sync 0;"
    own = "shl.b32 %r1, %r0, 2; add.s32 %r3, %r7, %r1; ld.shared.b32 %r4, [%r3];"
    launch(f"{ADDRESS} {rows} {store} {own} st.global.b32 [%d1], %r4;", buffer)
    assert buffer.reshape(8, 4)[::-1].ravel().tolist() == list(range(THREADS))
    back = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r8];"
    launch(f"{ADDRESS} {rows} {store} {back} st.global.b32 [%d1], %r4;", buffer)
    assert buffer.tolist() == list(range(THREADS))


def test_vectors_and_parameters() -> None:
    buffer = np.zeros((THREADS, 4), np.uint16)
    body = (
        "ld.param.b64 %d0, [p0]; ld.param.b32 %r1, [p1]; mov.u32 %r0, %tid.x; mad.wide.u32 %d1, %r0, 8, %d0; "
        "mov.b32 {%h0, %h1}, %r1; mov.b32 %r2, {%h1, %h0}; st.global.v2.b32 [%d1], {%r1, %r2}; "
    )
    launch(body, buffer, -2)
    assert (buffer == [0xFFFE, 0xFFFF, 0xFFFF, 0xFFFE]).all()
    launch(body + "ld.global.v4.b16 {%h2, %h3, %h4, %h5}, [%d1]; st.global.b16 [%d1], %h3;", buffer, 5 << 16)
    assert (buffer == [5, 5, 5, 0]).all()


def test_a_grid_of_three_dimensions() -> None:
    buffer = np.zeros((4, 3, 2, THREADS), np.uint32)
    body = (
        "ld.param.b64 %d0, [p0]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z; "
        "mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y; mad.lo.s32 %r5, %r2, %r4, %r1; mad.lo.s32 %r5, %r5, %r3, %r0; "
        "mov.u32 %r6, %tid.x; mov.u32 %r7, %ntid.x; mad.lo.s32 %r5, %r5, %r7, %r6; mad.wide.u32 %d1, %r5, 4, %d0; "
        "st.global.b32 [%d1], %r5;"
    )
    run(kernel(body, 64), grid=(2, 3, 4), block=THREADS, arguments=[buffer])
    assert buffer.ravel().tolist() == list(range(buffer.size))


def test_arrays_do_not_change_if_the_kernel_is_wrong() -> None:
    buffer = numbers()
    with pytest.raises(OutOfBounds):
        launch(f"{ADDRESS} st.global.b32 [%d1], 7; st.global.b32 [%d1+4], 7;", buffer)
    assert buffer.tolist() == list(range(THREADS))


def test_one_array_as_two_arguments() -> None:
    buffer = numbers()
    body = f"{ADDRESS} ld.param.b64 %d3, [p1]; sub.s64 %d4, %d1, %d0; add.s64 %d5, %d3, %d4; "
    launch(f"{body} st.global.b32 [%d1], 7; ld.global.b32 %r1, [%d5]; st.global.b32 [%d5], %r1;", buffer, buffer)
    assert set(buffer.tolist()) == {7}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([numbers()], "1 arguments, expected the 2 of test"),
        ([numbers(), 1, 2], "3 arguments, expected the 2 of test"),
        ([1, 1], "p0 is int, expected an array"),
        ([numbers(), numbers()], "p1 is ndarray, expected an integer of 32 bits"),
        ([numbers(), 2**32], "p1 is int, expected an integer of 32 bits"),
        ([numbers()[::2], 1], "must be a contiguous, writable array of an even number of bytes"),
        ([np.zeros(3, np.uint8), 1], "an even number of bytes"),
    ],
)
def test_arguments_must_fit(arguments: list[Array | int], reason: str) -> None:
    with pytest.raises(InvalidLaunch, match=reason):
        run(kernel("", 64, 32), grid=1, block=THREADS, arguments=arguments)


def test_buffers_must_not_overlap() -> None:
    buffer = numbers()
    with pytest.raises(InvalidLaunch, match="Two buffers overlap"):
        run(kernel("", 64, 64), grid=1, block=THREADS, arguments=[buffer, buffer[4:]])


@pytest.mark.parametrize("grid", [0, (1, 0), (), (1, 1, 1, 1)])
def test_grid_must_fit(grid: int | tuple[int, ...]) -> None:
    with pytest.raises(InvalidLaunch, match="expected one to three numbers of blocks, each at least 1"):
        run(kernel(""), grid=grid, block=THREADS, arguments=[])


def test_block_must_fit() -> None:
    with pytest.raises(InvalidLaunch, match="The block has 64 threads, expected the 32 of test"):
        run(kernel(""), grid=1, block=64, arguments=[])


@pytest.mark.parametrize(
    ("body", "error", "reason"),
    [
        ("add.s128 %r0, 1, 2;", UnknownInstruction, r"Line 13, 'add.s128 %r0, 1, 2': .* no add.s128 of 2"),
        ("add.s32 %r0, 1, 2, 3;", UnknownInstruction, "no add.s32 of 3 sources"),
        ("atom.global.add.u32 %r0, [%d0], 1;", UnknownInstruction, "atom.global.add.u32"),
        ("mov.f16 %h0, 1;", UnknownInstruction, "does not know this instruction"),
        ("mov.b64 {%h0, %h1, %h2}, %d0;", UnknownInstruction, "no vectors of 21 bits"),
        ("ld.const.b32 %r0, [%d0];", UnknownInstruction, "does not know this instruction"),
        ("ld.global.nc.b32 %r0, [%d0];", UnknownInstruction, "does not know this instruction"),
        ("bar.sync 1;", UnknownInstruction, "barrier 0 only"),
        ("bar.arrive 0, 32;", UnknownInstruction, "does not know this instruction"),
        ("shfl.sync.down.b32 %r0, %r1, 1, 31, -1;", UnknownInstruction, "does not know this instruction"),
        ("shfl.sync.bfly.b32 %r0, %r1, 1, 31, 3;", UnknownInstruction, "shuffles of whole warps only"),
        ("shfl.sync.bfly.b32 %r0, %r1, %r2, 31, -1;", UnknownInstruction, "constant distances below 32 only"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0}, [%r1];", UnknownInstruction, "does not know"),
        ("mov.b32 %r0, %d0;", InvalidPtx, "%d0 has 64 bits, expected 32"),
        ("mov.b64 %r0, %d0;", InvalidPtx, "%r0 cannot hold the result"),
        ("mov.u32 %tid.x, 1;", InvalidPtx, "%tid.x cannot hold the result"),
        ("mov.u32 %r0, %tid.w;", InvalidPtx, "%tid.w"),
        ("mov.u32 7, %r0;", InvalidPtx, "is not a register"),
        ("mov.u32 %r0;", InvalidPtx, "it has 1 operands"),
        ("ret 1; not.pred;", InvalidPtx, "it has 0 operands"),
        ("ld.param.b32 %r0, [p7];", InvalidPtx, "there is no such parameter of 32 bits"),
        ("ld.global.b32 %r0, %d0;", InvalidPtx, "expected an address"),
        ("mov.b16 %h0, 0; ld.global.b32 %r0, [%h0];", InvalidPtx, "an address has 16 bits"),
        ("ld.global.v2.b32 {%r0}, [%d0];", InvalidPtx, "expected a vector of 2"),
        ("bra $nowhere;", InvalidPtx, "it has no label of this kernel"),
        ("mov.u32 %r77, 1;", InvalidPtx, "%r77 is not declared"),
        ("mov.u32 %r0, 1.5;", InvalidPtx, r"1\.5 is no operand"),
        (".local .b32 x;", InvalidPtx, r"Line 13, '.local .b32 x': unknown directive"),
        ("mov.u32 %r0, (1);", InvalidPtx, "is no operand"),
        ("?;", InvalidPtx, "not an instruction"),
    ],
)  # fmt: skip
def test_what_the_interpreter_refuses(body: str, error: type[PtxError], reason: str) -> None:
    ptx = kernel(body.replace("ret 1;", "").strip())
    with pytest.raises(error, match=reason):
        run(ptx, grid=1, block=THREADS, arguments=[])


@pytest.mark.parametrize(
    ("ptx", "reason"),
    [
        ("", "has 0 kernels with parameters and .reqntid, expected one"),
        (kernel("") * 2, "has 2 kernels"),
        (kernel("").replace("ret;", "bar.sync 0;"), "test does not end with ret"),
        (kernel("").replace("ret;", "@%p0 ret;"), "test does not end with ret"),
        (kernel("bra $end;").replace("ret;", "ret; $end:"), "it has no label of this kernel"),
        (kernel("", 16), r"A parameter is '\.param \.u16 p0', expected one of 32 or 64 bits"),
    ],
)
def test_modules_that_are_refused(ptx: str, reason: str) -> None:
    with pytest.raises(InvalidPtx, match=reason):
        run(ptx, grid=1, block=THREADS, arguments=[])
