"""Values of ``bundle.json``: a bundle answers, or is refused with one sentence in bounded time."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.hub_cache import in_hub_cache

from fusion_edge.runtime import FusionError, Sampling, load
from fusion_edge.runtime.bundle.files import digest
from fusion_edge.runtime.bundle.graphs import graph_specs
from fusion_edge.runtime.bundle.json_file import LARGEST, read_json
from fusion_edge.runtime.bundle.manifest import MANIFEST, QUANTIZATION, Manifest
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.cli import info as cli_info

Json = dict[str, Any]
Refuse = Callable[..., str]
HUGE = 2**62
LANGUAGE = ("model", "language")


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def change(folder: Path, path: tuple[str | int, ...], value: object) -> None:
    """Set one value, and update the shapes of the graphs."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    inner: Any = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    write(folder, manifest)


def write(folder: Path, manifest: Json) -> None:
    """Return the manifest with updated shapes of the graphs."""
    with suppress(ValueError, ZeroDivisionError):
        parsed = from_json(Manifest, manifest)
        if abs(parsed.model.language.layers) < 1000:
            specs = graph_specs(parsed.model, parsed.target, parsed.activations, parsed.cache)
            manifest["graphs"] = {spec.name: spec.to_json() for spec in specs}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "values", "reason"),
    [
        ((*LANGUAGE, "vocab_size"), [0, -1, 2**63, HUGE], "model.language.vocab_size is"),
        ((*LANGUAGE, "vocab_size"), [64], "eos_token_ids is 1204, not 0 to 63"),
        ((*LANGUAGE, "hidden_size"), [0, -32, HUGE], "model.language.hidden_size is"),
        ((*LANGUAGE, "hidden_size"), [33], "hidden_size is 33, not a multiple of 16"),
        ((*LANGUAGE, "heads"), [0, -2, 3], "model.language.heads is"),
        ((*LANGUAGE, "kv_heads"), [0, -2, HUGE], "model.language.kv_heads is"),
        ((*LANGUAGE, "kv_heads"), [3], "model.language.heads is 2, not a multiple of 3"),
        ((*LANGUAGE, "head_dim"), [0, 15, HUGE], "model.language"),
        ((*LANGUAGE, "layers"), [0, -1, HUGE, 10**12], "model.language.layers is"),
        ((*LANGUAGE, "norm_eps"), [float("nan"), float("inf"), 0.0, -1.0], "model.language.norm_eps is"),
        ((*LANGUAGE, "rotary_scale"), [float("nan"), -1.0, float("-inf")], "model.language.rotary_scale is"),
        ((*LANGUAGE, "rotary_inverse_frequencies"), [[], [1.0] * 7, [1.0] * 9], "rotary_inverse_frequencies has"),
        ((*LANGUAGE, "rotary_inverse_frequencies", 3), [float("nan"), float("inf"), 0.0], "frequencies[3] is"),
        (("model", "alignment", "window_size"), [0, -3, HUGE], "model.alignment.window_size is"),
        (("model", "alignment", "stride"), [0, -1, HUGE], "model.alignment"),
        (("model", "alignment", "start"), [-1, 2, HUGE], "model.alignment"),
        (("model", "alignment", "layers"), [0, 3], "model.alignment"),
        (("model", "alignment", "query_lengths"), [[4, 16, 17], [0], [-4], [HUGE]], "query_lengths"),
        (("query_lengths",), [[36], [16, 36]], "query_lengths are"),
        (("model", "vision", "width"), [0, 24], "model.vision.width is"),
        (("model", "vision", "patch_size"), [0, -1, 385, HUGE], "model.vision.patch_size is"),
        (("model", "eos_token_ids"), [[], [1208], [-1], [1, 2**40]], "model.eos_token_ids is"),
        (("model", "bos_token_id"), [1208, -1, HUGE], "model.bos_token_id is"),
        (("model", "max_length"), [0, -1, HUGE], "max_"),
        (("max_context",), [0, -1, 513, HUGE], "max_context is"),
        (("max_context",), [9], "query_lengths[0] is 16, not 1 to 9, max_context"),
        (("activations",), ["float64", "", "object"], "activations is"),
        (("cache",), ["int4", "str"], "cache is"),
        (("accuracy_level",), [-1, 5, HUGE], "accuracy_level is"),
        (("embedding", "values_offset"), [-1, 1, 4096, HUGE, 2**63, 1 << 20], "embedding is at bytes"),
        (("embedding", "scales_offset"), [-1, 0, 4096, HUGE, 159_744], "embedding is at bytes"),
        (("embedding", "group_size"), [0, -1, HUGE], "embedding is"),
        (("embedding", "kind"), ["int4", "fp16", "fp32"], "embedding is of the kind"),
        (("graphs", "mine"), [{}], "graphs"),
        (("files", 1, "path"), ["tokenizer.json"], "files[1].path is 'tokenizer.json', which is listed twice"),
        (("files", 0, "path"), ["./tokenizer.json", "a//b", "a/", ""], "not a plain path"),
        (("files", 0, "size"), [-1, 2**63], "files[0].size is"),
        (("files", 0, "sha256"), ["", "0" * 63, "G" * 64], "not 64 hexadecimal digits"),
        (("weights",), [{}], "more than there are weights"),
    ],
)
def test_impossible_values_are_refused(
    copy: Path, refused: Refuse, path: tuple[str | int, ...], values: list[Any], reason: str
) -> None:
    for value in values:
        if path[0] == "graphs":
            manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
            manifest["graphs"]["mine"] = value
            (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        else:
            change(copy, path, value)
        started = time.process_time()
        error = refused(cli_info.main, copy)
        assert time.process_time() - started < 2
        assert f"{copy / MANIFEST} does not follow bundle schema 1 (" in error
        assert reason in error
        assert len(error) < 1000


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*LANGUAGE, "kv_heads"), 1),
        ((*LANGUAGE, "vocab_size"), 1207),
        (("model", "alignment", "window_size"), 2),
        (("model", "vision", "patch_size"), 64),
        (("target",), "tensorrt"),
        (("cache",), "float16"),
    ],
)
def test_graphs_that_do_not_match_the_model(copy: Path, path: tuple[str | int, ...], value: object) -> None:
    """The manifest is consistent, but does not match the graph."""
    change(copy, path, value)
    with pytest.raises(FusionError, match=r"bundle.json and \w+.onnx do not belong together"):
        load(copy, device="cpu", threads=1)


LEAVES = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([0, -1, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**400]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["float32", "float16", "int8", "cpu", "cuda", "tensorrt", "fp16", "fp32", "llama_3", "../x"]),
    st.none(),
    st.booleans(),
    st.lists(st.integers(-1, 1300), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)


@given(st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_answers_or_is_refused(tiny_bundle: Path, copy: Path, data: st.DataObject) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    inner: Any = manifest
    while True:
        keys = sorted(inner.keys() - {"graphs", "weights"}) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(inner[key], dict | list) or not inner[key] or data.draw(st.integers(0, 3)) == 0:
            break
        inner = inner[key]
    inner[key] = data.draw(LEAVES)
    write(copy, manifest)
    try:
        with load(copy, threads=1) as fusion:
            fusion.answer(Image.new("RGB", (8, 8)), "What?", sampling=Sampling(max_new_tokens=2))
    except FusionError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 2}', "'a' is a duplicate key"),
        (b'{"model": {"b": 1, "b": 1}}', "'b' is a duplicate key"),
        (b" " * (LARGEST + 1), f"it has more than {LARGEST} bytes"),
        (b'{"a":' * 100_000, "recursion"),
        (b"[" + b"{}," * (LARGEST // 3 - 2) + b"{}]", "is [{}, {}"),
        (b"1" * 5000, "digit"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
)
@pytest.mark.parametrize("name", [MANIFEST, QUANTIZATION])
def test_json_within_bounds(copy: Path, refused: Refuse, name: str, content: bytes, reason: str) -> None:
    (copy / name).write_bytes(content)
    if name == QUANTIZATION:
        manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
        entry = next(entry for entry in manifest["files"] if entry["path"] == name)
        entry.update(size=len(content), sha256=digest(copy / name))
        (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    started = time.process_time()
    error = refused(cli_info.main, copy)
    assert str(copy / name) in error
    assert reason in error or "is missing" in error or "not an object" in error
    assert time.process_time() - started < 2


def test_a_manifest_that_is_not_a_regular_file(copy: Path, refused: Refuse) -> None:
    """A pipe would block, and a device would never end."""
    (copy / MANIFEST).unlink()
    os.mkfifo(copy / MANIFEST)
    assert "it is not a regular file" in refused(cli_info.main, copy)
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).symlink_to("/dev/zero")
    assert "it is not a regular file" in refused(cli_info.main, copy)
    (copy / MANIFEST).unlink()
    with (copy / MANIFEST).open("wb") as file:
        file.truncate(1 << 30)
    assert "it has more than" in refused(cli_info.main, copy)
    with pytest.raises(ValueError, match="more than"):
        read_json(copy / MANIFEST)


def test_escape_sequences_do_not_reach_the_terminal(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copy, ("source",), "x\x1b[2Jy\nz\ud800")
    assert cli_info.main([str(copy)]) == 0
    assert "x\\x1b[2Jy\\nz\\ud800\n" in capsys.readouterr().out


# Links of the hub cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "int4", "a/b"])
def test_a_snapshot_of_the_hub_cache(tiny_bundle: Path, tmp_path: Path, inside: str) -> None:
    snapshot = in_hub_cache(tiny_bundle, tmp_path / "models--me--bundle", inside)
    with load(snapshot, threads=1) as fusion:
        assert fusion.answer(Image.new("RGB", (8, 8)), "What?", sampling=Sampling(max_new_tokens=2)).token_ids
    assert cli_info.main([str(snapshot)]) == 0
    (tmp_path / "link").symlink_to(snapshot)
    assert open_bundle(tmp_path / "link").manifest.files


def test_the_root_of_the_hub_cache(tiny_bundle: Path, tmp_path: Path, refused: Refuse) -> None:
    root = tmp_path / "models--me--bundle"
    snapshot = in_hub_cache(tiny_bundle, root)
    assert f"It is a repository in the hub cache: pass its snapshot {snapshot}." in refused(cli_info.main, root)


def test_an_altered_blob(tiny_bundle: Path, tmp_path: Path, refused: Refuse) -> None:
    snapshot = in_hub_cache(tiny_bundle, tmp_path / "models--me--bundle")
    content = bytearray((snapshot / "llm.data").read_bytes())
    content[-1] ^= 1
    (snapshot / "llm.data").resolve().write_bytes(content)
    assert "llm.data has been altered" in refused(cli_info.main, snapshot)


@pytest.mark.parametrize("target", ["../../llm.data", "../../../secret", "/etc/hostname", "../../blobs/../llm.data"])
def test_other_links_are_refused(tiny_bundle: Path, tmp_path: Path, refused: Refuse, target: str) -> None:
    snapshot = in_hub_cache(tiny_bundle, tmp_path / "models--me--bundle")
    for place in (tmp_path / "models--me--bundle" / "llm.data", tmp_path / "secret"):
        shutil.copy(tiny_bundle / "llm.data", place)
    (snapshot / "llm.data").unlink()
    (snapshot / "llm.data").symlink_to(target)
    assert "lists 'llm.data', which leads outside its folder" in refused(cli_info.main, snapshot)
