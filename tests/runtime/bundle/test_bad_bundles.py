"""Invalid bundles: fusion-info, fusion-run and ``load`` refuse them with one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from fusion_edge.runtime import FusionError, Sampling, UsageError, load
from fusion_edge.runtime.bundle.manifest import MANIFEST, QUANTIZATION, Manifest
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.cli import run as cli_run

FILES = (
    "tokenizer.json",
    "vision_encoder.onnx",
    "vision_encoder.data",
    "alignment_decoder.onnx",
    "alignment_decoder.data",
    "llm.onnx",
    "llm.data",
    "embeddings.data",
    "quantization.json",
)
Refuse = Callable[..., str]
Json = dict[str, Any]


@pytest.fixture
def broken(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def refuse(broken: Path, tmp_path: Path, refused: Refuse) -> Refuse:
    """``refuse(folder=broken)`` returns the error, the same of fusion-info and fusion-run."""
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")

    def run(folder: object = broken) -> str:
        message = refused(cli_info.main, folder)
        assert refused(cli_run.main, folder, "--image", tmp_path / "image.png", "--ask=What?", "--threads=1") == message
        return message

    return run


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    """Change the manifest."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# Paths -----------------------------------------------------------------------------------------------------


def test_a_missing_folder(refuse: Refuse, tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path / "image.png", "x" * 300):
        assert "is not a folder; expected a bundle" in refuse(folder)


def test_folders_that_are_not_bundles(refuse: Refuse, tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tiny_checkpoint):
        expected = f"{folder} is not a bundle: it has no bundle.json. Pass the folder that fusion-export wrote."
        assert expected in refuse(folder)


def test_a_newer_schema(broken: Path, refuse: Refuse) -> None:
    edit(broken, lambda manifest: manifest.update(schema_version=2, invention=1))
    message = refuse()
    assert "has bundle schema 2, newer than 1" in message
    assert "upgrade fusion-edge" in message


# Files ------------------------------------------------------------------------------------------------------


def test_a_bundle_has_exactly_these_files(tiny_bundle: Path) -> None:
    assert {path.name for path in tiny_bundle.iterdir()} == {MANIFEST, *FILES}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_bit(broken: Path, refuse: Refuse, name: str, position: int) -> None:
    flip(broken / name, position)
    assert f"{broken / name} has been altered: its SHA-256 is not the one in bundle.json" in refuse()


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".onnx")])  # graphs are small
def test_a_large_file_is_verified_by_fusion_info(
    broken: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, refused: Refuse
) -> None:
    monkeypatch.setattr("fusion_edge.runtime.bundle.reader.ALWAYS_VERIFIED_BYTES", 0)
    assert cli_info.main([str(broken)]) == 0
    flip(broken / name)
    assert f"{broken / name} has been altered" in refused(cli_info.main, broken)
    assert open_bundle(broken).folder == broken  # opening does not read large files


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(broken: Path, refuse: Refuse, name: str) -> None:
    (broken / name).unlink()
    assert f"{broken / name} is missing though bundle.json lists it" in refuse()


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(broken: Path, refuse: Refuse, name: str) -> None:
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[:-1])
    assert f"has {len(content) - 1} bytes; bundle.json says {len(content)}" in refuse()


@pytest.mark.parametrize("name", [name for name in FILES if name != QUANTIZATION])
def test_a_file_that_is_not_listed_is_not_read(broken: Path, tmp_path: Path, name: str, refused: Refuse) -> None:
    edit(broken, lambda manifest: manifest.update(files=[e for e in manifest["files"] if e["path"] != name]))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    message = refused(cli_run.main, broken, "--image", tmp_path / "image.png", "--ask=What?", "--threads=1")
    assert f"bundle.json lists no {name}" in message


def test_a_folder_in_place_of_a_file(broken: Path, refuse: Refuse) -> None:
    (broken / "llm.data").unlink()
    (broken / "llm.data").mkdir()
    assert "llm.data is missing though bundle.json lists it" in refuse()


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "sub/../../secret", "..", "a\0b", "\ud800", "x" * 300])
def test_a_path_that_leads_outside(broken: Path, refuse: Refuse, path: str) -> None:
    (broken.parent / "secret").write_text("secret", encoding="utf-8")
    edit(broken, lambda manifest: manifest["files"].append({"path": path, "size": 6, "sha256": "0" * 64}))
    reason = "is missing" if path == "x" * 300 else f"lists {path!r}, which leads outside its folder; do not use"
    assert reason in refuse()


def test_a_link_that_leads_outside(broken: Path, refuse: Refuse) -> None:
    shutil.move(broken / "llm.data", broken.parent / "llm.data")
    (broken / "llm.data").symlink_to("../llm.data")
    assert "lists 'llm.data', which leads outside its folder" in refuse()
    (broken / "llm.data").unlink()
    (broken / "llm.data").symlink_to("llm.data")
    assert "llm.data" in refuse()


# bundle.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff", b"[" * 100_000, b"{}"])
def test_invalid_manifests(broken: Path, refuse: Refuse, content: bytes) -> None:
    (broken / MANIFEST).write_bytes(content)
    message = refuse()
    assert str(broken / MANIFEST) in message
    assert "export the bundle again" in message


def test_a_folder_in_place_of_the_manifest(broken: Path, refuse: Refuse) -> None:
    (broken / MANIFEST).unlink()
    (broken / MANIFEST).mkdir()
    assert "cannot be read" in refuse()


def put(*path: str | int, value: object) -> Callable[[Json], None]:
    """Return a change that sets one inner value, or removes it for ``...``."""

    def change(manifest: Any) -> None:
        *outer, last = path
        for key in outer:
            manifest = manifest[key]
        if value is ...:
            del manifest[last]
        else:
            manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("schema_version", value=0), "schema_version is 0"),
        (put("schema_version", value=True), "schema_version is True, not an integer"),
        (put("schema_version", value=...), "schema_version is missing"),
        (put("invention", value=1), "invention is unknown"),
        (put("model", "vision", "width", value=...), "model.vision.width is missing"),
        (put("model", "vision", "width", value="32"), "model.vision.width is '32', not an integer"),
        (put("model", "vision", value=[]), "model.vision is [], not an object"),
        (put("model", "language", "norm_eps", value=None), "model.language.norm_eps is None, not a float"),
        (put("model", "eos_token_ids", 1, value="x"), "model.eos_token_ids[1] is 'x', not an integer"),
        (put("weights", "llm.lm_head", value=8), "weights['llm.lm_head'] is 8, not a string"),
        (put("files", 0, "size", value=...), "files[0].size is missing"),
        (put("files", value={}), "files is {}, not a list"),
        (put("model", "template", value="vicuna"), "model.template is 'vicuna', not phi_3 or llama_3"),
        (put("model", "vision", "patch_size", value=0), "model.vision.patch_size is 0"),
        (put("model", "vision", "patch_size", value=64), "does not match the model's sizes"),
        (put("model", "language", "vocab_size", value=1207), "graphs.llm does not match the model's sizes"),
        (put("model", "language", "layers", value=10**12), "model.language.layers is 1000000000000"),
        (put("activations", value="float16"), "does not match the model's sizes"),
        (put("graphs", "llm", value=...), "graphs.llm does not match"),
        (put("image_side", value=5), "image_side is 5, not 1 to 4, the vision grid's side"),
        (put("image_side", value=0), "image_side is 0"),
        (put("max_context", value=513), "max_context is 513, not 1 to 512, the model's max_length"),
        (put("query_lengths", value=[]), "query_lengths are [], not among the model's"),
        (put("query_lengths", value=[16, 36]), "query_lengths are [16, 36]"),
    ],
)
def test_invalid_values_of_the_manifest(
    broken: Path, refuse: Refuse, change: Callable[[Json], None], message: str
) -> None:
    edit(broken, change)
    message = refuse()
    assert f"{broken / MANIFEST} does not follow bundle schema 1 (" in message
    assert message in message


def test_a_tensorrt_bundle_of_an_older_version(tiny_tensorrt_bundle: Path, tmp_path: Path, refuse: Refuse) -> None:
    """Its LLM has no input ``slots``."""
    folder = Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "old"))

    def without_slots(manifest: Json) -> None:
        inputs = manifest["graphs"]["llm"]["inputs"]
        inputs[:] = [tensor for tensor in inputs if tensor["name"] != "slots"]

    edit(folder, without_slots)
    reason = "graphs.llm does not match the model's sizes, or is of another version of fusion-edge"
    assert f"({reason}); export the bundle again." in refuse(folder)


@pytest.mark.parametrize(
    "change",
    [
        put("embedding", "kind", value="int4"),
        put("embedding", "kind", value="fp16"),
        put("embedding", "group_size", value=0),
        put("embedding", "group_size", value=-128),
        put("embedding", "group_size", value=10**30),
        put("embedding", "scales_offset", value=10**30),
        put("embedding", "scales_offset", value=159_744),
        put("embedding", "values_offset", value=-1),
    ],
)
def test_invalid_embedding_tables(broken: Path, change: Callable[[Json], None]) -> None:
    edit(broken, change)
    with pytest.raises(FusionError, match="export the bundle again"):
        load(broken, threads=1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_place_of_any_value(tiny_bundle: Path, broken: Path, data: st.DataObject) -> None:
    """Any JSON is an error or a valid manifest of the right types."""
    manifest = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    inner: Any = manifest
    while True:
        keys = sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(inner[key], dict | list) or not inner[key] or data.draw(st.integers(0, 3)) == 0:
            break
        inner = inner[key]
    inner[key] = data.draw(JSON)
    (broken / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    try:
        opened = open_bundle(broken)
    except FusionError:
        return
    assert from_json(Manifest, json.loads(opened.manifest.to_text())) == opened.manifest


@pytest.mark.parametrize(
    "change",
    [
        put("model", "vision", "width", value=64),
        put("model", "vision", "layers", value=3),
        put("model", "bos_token_id", value=0),
        put("model", "language", "norm_eps", value=1.0),
        put("accuracy_level", value=4),
        put("weights", value={"llm": "x", "a": "", "b": ""}),
        put("image_side", value=3),
        put("max_context", value=90),
        put("producer", value=""),
    ],
)
def test_descriptive_fields_do_not_change_the_answer(broken: Path, change: Callable[[Json], None]) -> None:
    edit(broken, change)
    with load(broken, threads=1) as fusion:
        assert fusion.answer(Image.new("RGB", (8, 8)), "What?", sampling=Sampling(max_new_tokens=2)).token_ids
    assert cli_info.main([str(broken)]) == 0


# load() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "Unknown device 'tpu'; expected auto, tensorrt, tensorrt-rtx, cuda or cpu"),
        ({"device": ""}, "Unknown device ''"),
        ({"device": ["cpu"]}, "Unknown device"),
        ({"device": None}, "Unknown device None"),
        ({"threads": 0}, "threads is 0; expected an integer from 1, or None"),
        ({"threads": "2"}, "threads is '2'"),
        ({"threads": 1.5}, "threads is 1.5"),
    ],
)
def test_wrong_arguments(tiny_bundle: Path, arguments: Json, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(tiny_bundle, **arguments)


@pytest.mark.parametrize("folder", [3, None, b"bundle", ["bundle"]])
def test_wrong_types_of_the_path(folder: Any) -> None:
    with pytest.raises(UsageError, match="expected the path of a folder"):
        load(folder)


def test_an_empty_path(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse) -> None:
    """An empty path is not the current folder, which may be a bundle."""
    monkeypatch.chdir(tiny_bundle)
    with pytest.raises(UsageError, match="The bundle's path is empty"):
        load("")
    assert "The bundle's path is empty" in refused(cli_info.main, "", code=2)


def test_a_template_that_does_not_fit_the_tokenizer(broken: Path) -> None:
    edit(broken, lambda manifest: manifest["model"].update(template="llama_3"))
    with pytest.raises(FusionError, match=r"has no <\|eot_id\|>, which ends an answer in the template llama_3"):
        load(broken)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("target", "tpu", "(target is 'tpu', not cpu or cuda or tensorrt)"),
        ("target", "\x85", r"(target is '\x85', not cpu or cuda or tensorrt)"),
        ("precision", "int3", "(precision is 'int3', not int4 or int8 or nf4 or fp16 or fp32)"),
        ("precision", "\x1b[2J\n", r"(precision is '\x1b[2J\n', not int4"),
    ],
)
def test_an_unknown_name(broken: Path, name: str, value: str, expected: str) -> None:
    edit(broken, lambda manifest: manifest.update({name: value}))
    with pytest.raises(FusionError) as refusal:
        load(broken)
    assert expected in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_control_characters_are_escaped(tiny_tensorrt_bundle: Path, tmp_path: Path) -> None:
    """A checkpoint's folder may have any name; the message stays one printable line."""
    shutil.copytree(tiny_tensorrt_bundle, tmp_path / "bundle")
    edit(tmp_path / "bundle", lambda manifest: manifest.update(source="a\x85b\x1b[2J"))
    with pytest.raises(FusionError) as refusal:
        load(tmp_path / "bundle", device="cuda")
    assert r"fusion-export a\x85b\x1b[2J -o FOLDER" in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_a_tokenizer_of_a_newer_library(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse, tmp_path: Path
) -> None:
    def from_buffer(_: bytes) -> Tokenizer:
        raise Exception("data did not match any variant of untagged enum ModelWrapper")

    monkeypatch.setattr(Tokenizer, "from_buffer", from_buffer)
    message = refused(cli_run.main, tiny_bundle, "--image", tmp_path / "image.png", "--ask=What?", "--threads=1")
    assert "tokenizer.json cannot be loaded as a tokenizer (tokenizers " in message
    assert "upgrade tokenizers" in message
