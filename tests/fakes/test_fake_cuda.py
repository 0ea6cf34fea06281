"""The fake of CUDA raises ``Misuse`` where CUDA is undefined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fakes.fake_cuda import FakeCuda, Misuse

from fusion_edge.runtime.backends.cuda import Cuda


def test_misuse_is_detected() -> None:
    fake = FakeCuda()
    cuda = Cuda(fake)
    stream, device, host = cuda.stream(), cuda.allocate(256), cuda.allocate_pinned(256)
    misuses: list[tuple[str, Callable[[], object]]] = [
        ("257 bytes at", lambda: cuda.to_device(device, host, 257, stream)),
        ("8 bytes at", lambda: cuda.to_host(host, device + 250, 8, stream)),
        ("is not host memory", lambda: cuda.to_device(device, device, 8, stream)),
        ("There is no memory", lambda: cuda.to_device(1, host, 8, stream)),
        ("Left: memory", fake.check_all_freed),
    ]
    for message, misuse in misuses:
        with pytest.raises(Misuse, match=message):
            misuse()
    cuda.begin_capture(stream)
    cuda.to_device(device, host, 8, stream)
    for forbidden in (lambda: cuda.wait(stream), lambda: cuda.allocate(1), lambda: cuda.destroy_stream(stream)):
        with pytest.raises(Misuse):
            forbidden()
    graph = cuda.end_capture(stream)
    fake.view(host, 8, on_device=False)[...] = 7
    cuda.launch(graph, stream)
    assert not fake.view(device, 8).any()  # no work runs before the wait
    cuda.wait(stream)
    assert (fake.view(device, 8) == 7).all()
    cuda.to_host(host, device, 8, stream)
    cuda.destroy_graph(graph)
    with pytest.raises(Misuse, match="after it was destroyed"):
        cuda.launch(graph, stream)
    cuda.free(device)
    with pytest.raises(Misuse, match="after it was freed"):
        fake.view(device, 8)
    with pytest.raises(Misuse, match="freed twice"):
        cuda.free(device)
    cuda.free_pinned(host)
    cuda.destroy_stream(stream)
    fake.check_all_freed()
