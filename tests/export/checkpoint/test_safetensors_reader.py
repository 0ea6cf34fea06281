"""Reading safetensors: values equal those of the reference library, and every kind of damage is named."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import GOLDEN

from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.runtime.errors import FusionError

CHECKPOINTS = [GOLDEN / "FUSION-tiny-Phi", GOLDEN / "FUSION-X-tiny-LLaMA"]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: dict[str, Any] | str, data: bytes) -> bytes:
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def write_single(folder: Path, header: dict[str, Any] | str, data: bytes = b"") -> Path:
    (folder / "model.safetensors").write_bytes(file_bytes(header, data))
    return folder


def write_sharded(folder: Path, weight_map: Any) -> Path:
    """Write two shards: ``a`` is in one.safetensors, ``b`` in two.safetensors."""
    for name, file in (("a", "one.safetensors"), ("b", "two.safetensors")):
        (folder / file).write_bytes(file_bytes({name: entry("F32", [1], 0, 4)}, bytes(4)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return np.array([np.uint32(value) << np.uint32(16) for value in bits.ravel()], np.uint32).view(np.float32)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_golden_checkpoints_match_reference_library(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("safetensors.torch")
    expected = {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in reference.load_file(file).items()
    }
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.folder == folder
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            info = checkpoint.tensors[name]
            assert (info.name, info.dtype, info.shape) == (name, "BF16", tuple(tensor.shape))
            read = checkpoint.read(name)
            assert read.dtype == np.float32
            assert read.shape == info.shape
            assert np.array_equal(read, tensor.to(torch.float32).numpy())
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in expected.values())


@given(
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    rows=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_read_any_rows(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int], seed: int, rows: st.DataObject
) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, 4 if dtype == "F32" else 2), np.uint8)
    first = bytes(6)  # the tensor does not start at offset 0
    header = {
        "__metadata__": {"format": "pt"},
        "tensor": entry(dtype, shape, len(first), len(first) + bits.nbytes),
        "first": entry("F16", [3], 0, len(first)),
    }
    folder = write_single(tmp_path_factory.getbasetemp(), header, first + bits.tobytes())
    if dtype == "BF16":
        expected = bfloat16_to_float32(bits.view(np.uint16)).reshape(shape)
    else:
        expected = bits.view(np.float32 if dtype == "F32" else np.float16).reshape(shape).astype(np.float32)
    start = rows.draw(st.integers(0, shape[0]))
    stop = rows.draw(st.integers(start, shape[0]))
    with Checkpoint(folder) as checkpoint:
        read = checkpoint.read_rows("tensor", start, stop)
        assert read.shape == (stop - start, *shape[1:])
        assert np.array_equal(read, expected[start:stop], equal_nan=True)
        assert np.array_equal(checkpoint.read("tensor"), expected, equal_nan=True)


LARGE = np.random.default_rng(0).integers(0, 1 << 16, (700, 2048), np.uint16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a bfloat16 tensor of 700 x 2048: several chunks, the last one partial."""
    header = {"tensor": entry("BF16", [700, 2048], 0, LARGE.nbytes)}
    return write_single(tmp_path_factory.mktemp("large"), header, LARGE.tobytes())


def test_more_than_one_chunk(large: Path) -> None:
    expected = LARGE.astype(np.uint32) << 16
    with Checkpoint(large) as checkpoint:
        assert np.array_equal(checkpoint.read("tensor").view(np.uint32), expected)
        assert np.array_equal(checkpoint.read_rows("tensor", 3, 699).view(np.uint32), expected[3:699])


def test_reading_allocates_result_and_one_chunk(large: Path) -> None:
    with Checkpoint(large) as checkpoint:
        tracemalloc.start()
        result = checkpoint.read("tensor")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < result.nbytes + (1 << 20) + 50_000


def test_concurrent_reads(large: Path) -> None:
    with Checkpoint(large) as checkpoint:
        expected = checkpoint.read("tensor").view(np.uint32)
        wrong: list[int] = []

        def read_all(offset: int) -> None:
            for row in range(offset, 700, 4):
                if not np.array_equal(checkpoint.read_rows("tensor", row, row + 1).view(np.uint32)[0], expected[row]):
                    wrong.append(row)

        threads = [threading.Thread(target=read_all, args=(offset,)) for offset in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_scalar_and_empty_tensors(tmp_path: Path) -> None:
    header = {"scalar": entry("F32", [], 0, 4), "empty": entry("BF16", [0, 3], 0, 0)}
    with Checkpoint(write_single(tmp_path, header, np.float32(1.5).tobytes())) as checkpoint:
        assert checkpoint.read("scalar") == 1.5
        assert checkpoint.read("scalar").shape == ()
        assert checkpoint.read("empty").shape == (0, 3)
        with pytest.raises(IndexError):
            checkpoint.read_rows("scalar", 0, 1)


def test_wrong_rows_or_name_or_closed_checkpoint(large: Path) -> None:
    with Checkpoint(large) as checkpoint:
        for start, stop in ((-1, 2), (3, 2), (0, 701)):
            with pytest.raises(IndexError, match="tensor has shape"):
                checkpoint.read_rows("tensor", start, stop)
        with pytest.raises(KeyError):
            checkpoint.read("other")
        with pytest.raises(TypeError):
            checkpoint.tensors["other"] = checkpoint.tensors["tensor"]  # type: ignore[index]
    with pytest.raises(KeyError):
        checkpoint.read("tensor")


def test_descriptors_are_closed(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("counts open files through /proc")
    before = len(list(descriptors.iterdir()))
    with Checkpoint(CHECKPOINTS[0]):
        assert len(list(descriptors.iterdir())) > before
    with pytest.raises(FusionError):
        Checkpoint(write_sharded(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"}))
    assert len(list(descriptors.iterdir())) == before


# --- Damaged headers ------------------------------------------------------------------------------

TENSOR = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ("not json", b"", "corrupt safetensors header: it is not valid JSON"),
        ("[1]", b"", "corrupt safetensors header: it is not a JSON object"),
        ("[" * 100_000, b"", "corrupt safetensors header: it is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", b"", "corrupt safetensors header: it is not valid JSON"),
        ({"a": 3}, b"", "the entry of a does not have exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "the entry of a does not have exactly dtype"),
        ({"a": TENSOR | {"shape": [-2]}}, bytes(8), "shape [-2] or data_offsets [0, 8] of a are not sizes"),
        ({"a": TENSOR | {"shape": [2.0]}}, bytes(8), "of a are not sizes"),
        ({"a": TENSOR | {"shape": [True, 2]}}, bytes(8), "of a are not sizes"),
        ({"a": TENSOR | {"shape": [2**60] * 500}}, bytes(8), "of a are not sizes"),
        ({"a": TENSOR | {"shape": [2**62] * 8}}, bytes(8), "a takes 8 bytes, but F32 of shape"),
        ({"a": TENSOR | {"data_offsets": [0, 8, 9]}}, bytes(8), "of a are not sizes"),
        ({"a": TENSOR | {"data_offsets": [8, 0]}}, bytes(8), "a takes -8 bytes"),
        ({"a": TENSOR | {"shape": [3]}}, bytes(8), "a takes 8 bytes, but F32 of shape [3] needs 12"),
        ({"a": TENSOR | {"dtype": "F4", "shape": [1]}}, bytes(8), "a in "),
        ({"a": TENSOR | {"dtype": "F4", "shape": [1]}}, bytes(8), "has the type F4; supported are BF16"),
        ({"a": TENSOR | {"dtype": ["F32"]}}, bytes(8), "has the type ['F32']; supported are BF16"),
        ({"a": TENSOR, "b": entry("F32", [2], 4, 12)}, bytes(12), "b overlaps the tensor before it"),
        ({"a": TENSOR, "b": entry("F32", [2], 0, 8)}, bytes(8), "b overlaps the tensor before it"),
        ({"a": TENSOR, "b": entry("F32", [2], 12, 20)}, bytes(20), "b leaves a gap before it"),
        ({"a": entry("F32", [2], 4, 12)}, bytes(12), "a leaves a gap before it"),
        ({"a": TENSOR}, bytes(9), "1 bytes at the end of the file belong to no tensor"),
        ({"a": TENSOR}, bytes(7), "is truncated: tensor a ends at byte"),
        (f'{{"a": {json.dumps(TENSOR)}, "a": {json.dumps(TENSOR)}}}', bytes(8), "duplicate field 'a'"),
    ],
)
def test_damaged_header(tmp_path: Path, header: dict[str, Any] | str, data: bytes, message: str) -> None:
    write_single(tmp_path, header, data)
    with pytest.raises(FusionError, match=re.escape(message)) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x02\0\0", (9).to_bytes(8, "little") + b"{}", (2**63).to_bytes(8, "little") + b"{}", bytes(8)]
)
def test_invalid_header_length(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FusionError, match=r"model\.safetensors is truncated or not a safetensors file"):
        Checkpoint(tmp_path)


def test_header_over_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(200_000_100)  # sparse
    with pytest.raises(FusionError, match="the limit"):
        Checkpoint(tmp_path)


SMALL = file_bytes({"a": entry("BF16", [2, 3], 0, 12), "b": entry("F32", [1], 12, 16)}, bytes(16))


@given(length=st.integers(0, len(SMALL) - 1))
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "model.safetensors").write_bytes(SMALL[:length])
    with pytest.raises(FusionError, match="truncated"):
        Checkpoint(folder)


@given(position=st.integers(0, len(SMALL) - 1), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_damaged_byte_gives_no_traceback(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    damaged = bytearray(SMALL)
    damaged[position] = byte
    folder = tmp_path_factory.getbasetemp()
    (folder / "model.safetensors").write_bytes(damaged)
    with contextlib.suppress(FusionError), Checkpoint(folder) as checkpoint:
        assert checkpoint.total_bytes == 16
        assert sum(checkpoint.read(name).size for name in checkpoint.tensors) in range(4, 9)


def test_file_shrinks_while_open(large: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((large / "model.safetensors").read_bytes())
    with Checkpoint(tmp_path) as checkpoint:
        with file.open("r+b") as opened:
            opened.truncate(1_000_000)
        with pytest.raises(FusionError, match="ends inside tensor tensor: it has shrunk"):
            checkpoint.read("tensor")


def test_folder_instead_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FusionError, match=r"model\.safetensors is a folder, pipe or device"):
        Checkpoint(tmp_path)


# --- Index and folder -----------------------------------------------------------------------------


def test_two_shards(tmp_path: Path) -> None:
    with Checkpoint(write_sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})) as checkpoint:
        files = {name: info.file.name for name, info in checkpoint.tensors.items()}
    assert files == {"a": "one.safetensors", "b": "two.safetensors"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "The shard three.safetensors is missing from"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "two.safetensors lacks tensor c, which"),
        ({"a": "one.safetensors"} | {"b": "one.safetensors"}, "one.safetensors lacks tensor b, which"),
        ({"a": "../one.safetensors"}, "places tensor a in '../one.safetensors'; expected a .safetensors file"),
        ({"a": "/one.safetensors"}, "places tensor a in '/one.safetensors'; expected a .safetensors file"),
        ({"a": "..\\one.safetensors"}, "expected a .safetensors file in the same folder"),
        ({"a": "sub/one.safetensors"}, "expected a .safetensors file in the same folder"),
        ({"a": ".."}, "places tensor a in '..'; expected a .safetensors file"),
        ({"a": "pytorch_model.bin"}, "places tensor a in 'pytorch_model.bin'; expected a .safetensors"),
        ({"a": 3}, "places tensor a in 3; expected a .safetensors file"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_wrong_index(tmp_path: Path, weight_map: Any, message: str) -> None:
    with pytest.raises(FusionError, match=re.escape(message)) as caught:
        Checkpoint(write_sharded(tmp_path, weight_map))
    assert str(tmp_path) in str(caught.value)


def test_shard_has_tensor_missing_from_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    both = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 4, 8)}
    (tmp_path / "two.safetensors").write_bytes(file_bytes(both, bytes(8)))
    with pytest.raises(FusionError, match=r"two\.safetensors holds tensor a, which .* does not place there"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_index_must_be_a_json_object(tmp_path: Path, content: str) -> None:
    raw = content.encode("utf-8", "surrogateescape")
    (tmp_path / "model.safetensors.index.json").write_bytes(raw)
    with pytest.raises(FusionError, match=r"model\.safetensors\.index\.json (is not valid JSON|holds a JSON list)"):
        Checkpoint(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match=r"has no weights; expected model\.safetensors, or"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "weights.pt"])
def test_pickle_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FusionError, match=rf"only pickle weights \({re.escape(name)}\)"):
        Checkpoint(tmp_path)


def conversion_command(folder: Path) -> str:
    with pytest.raises(FusionError) as caught:
        Checkpoint(folder)
    [command] = re.findall("`(.*)`", str(caught.value))
    return str(command)


def test_conversion_command_works(tmp_path: Path, run_shell: Callable[[str, Path], None]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    tied = torch.arange(6.0).reshape(2, 3)
    torch.save({"embed": tied, "head": tied}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"rest": tied.T.to(torch.bfloat16)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    run_shell(conversion_command(tmp_path), tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == {"embed", "head", "rest"}
        assert np.array_equal(checkpoint.read("head"), tied.numpy())
        assert np.array_equal(checkpoint.read("rest"), tied.T.numpy())


@pytest.fixture
def run_shell() -> Callable[[str, Path], None]:
    def run(command: str, folder: Path) -> None:
        # "python" is the interpreter of the tests.
        assert command.startswith("python -c ")
        subprocess.run(f"'{sys.executable}'{command.removeprefix('python')}", shell=True, cwd=folder, check=True)

    return run
