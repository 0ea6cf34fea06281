"""Mutate bundles: manifest, tokenizer, report, graphs and data, with corrected checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from support.checkpoints import TINY, write_checkpoint

from fusion_edge.export import cli
from fusion_edge.runtime.bundle.graphs import graph_specs
from fusion_edge.runtime.bundle.manifest import MANIFEST, QUANTIZATION, TOKENIZER, Manifest
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.cli import run as cli_run
from fuzz.checkpoint_mutants import change_file, link
from fuzz.graph_mutants import mutate_graph
from fuzz.judge import GROWTH, SECONDS, Mutant
from fuzz.mutations import NUMBERS, Json, mutate_bytes, mutate_json, near, read, replace, to_json_bytes, tried
from fuzz.tokenizer_mutants import edit_tokenizer_json

BASES = {
    "int4": ["--int4"],
    "int8": ["--int8", "--kv-cache", "int8"],
    "fp32": ["--fp32"],
    "nf4": ["--nf4", "--group-size", "32"],
}
"""Options of ``fusion-export`` by the name of the unchanged bundle."""
PATHS = ("../secret", "/etc/hostname", "", ".", "bundle.json", "sub/llm.data", "a\0b", "x" * 300, "LLM.DATA", "\ud800")
SETTINGS = ("max_context", "image_side", "query_lengths", "cache", "activations", "target", "accuracy_level")
"""Fields of the manifest that the graphs depend on."""
SETTING_VALUES: tuple[Json, ...] = (
    "int8", "float16", "float32", "float64", "cpu", "cuda", "tensorrt", 0, 1, 512, 2**31, [4], [9],
)  # fmt: skip
MAX_LAYERS = 1000
"""Maximum number of LLM layers for which graphs are written: a huge number would not end."""


class Bundles:
    """See :class:`fuzz.judge.Kind`."""

    share = 18
    batch = 100
    seconds = SECONDS
    growth = GROWTH

    def prepare(self, folder: Path) -> None:
        checkpoint = write_checkpoint(folder / "checkpoint", TINY)
        self.bases = [folder / name for name in BASES]
        with contextlib.redirect_stdout(None):
            for base, options in zip(self.bases, BASES.values(), strict=True):
                if cli.main([str(checkpoint), "-o", str(base), *options]):
                    raise RuntimeError(f"The {base.name} bundle could not be written.")
        self.picture = folder / "picture.png"
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8)).save(self.picture)

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        bundle = folder / "bundle"
        asked = [
            str(bundle),
            "--image",
            str(self.picture),
            "--ask=What is it?",
            "--max-new-tokens=2",
            "--threads=1",
            "--device=cpu",
        ]
        if draw is None:
            link(self.bases[0], bundle)
            return Mutant((), lambda: cli_run.main(asked))
        base = draw.choice(self.bases)
        link(base, bundle)
        changes = [base.name, *(tried(_change, draw, bundle) for _ in range(draw.choice([1, 1, 1, 2])))]
        if draw.random() < 0.95 and (bundle / MANIFEST).is_file():
            changes.append(tried(_put_right, draw, bundle))
        if draw.random() < 0.15:
            return Mutant((*changes, "fusion-info"), lambda: cli_info.main([str(bundle)]))
        return Mutant(tuple(changes), lambda: cli_run.main(asked))


def _change(draw: Random, folder: Path) -> str:
    what = draw.randrange(20)
    if what <= 4:
        return _manifest(draw, folder / MANIFEST)
    if what <= 7:
        return edit_tokenizer_json(draw, folder / TOKENIZER)
    if what == 8 and (folder / QUANTIZATION).is_file():
        path = folder / QUANTIZATION
        tree, change = mutate_json(draw, json.loads(read(path)))
        content, written = to_json_bytes(draw, tree)
        replace(path, content)
        return f"{path.name}{change}{written}"
    if what <= 15:
        path = draw.choice(sorted(folder.glob("*.onnx")))
        content, change = mutate_graph(draw, read(path))
        replace(path, content)
        return f"{path.name}: {change}"
    if what <= 18:
        path = draw.choice(sorted(folder.glob("*.data")))
        content, change = mutate_bytes(draw, read(path))
        replace(path, content)
        return f"{path.name}: {change}"
    return change_file(draw, draw.choice(sorted(folder.iterdir())))


def _manifest(draw: Random, path: Path) -> str:
    """Change any value, or a size of the model with matching graphs."""
    tree = json.loads(read(path))
    what = draw.randrange(10)
    if what <= 3:
        place = tree["model"]
        section = draw.choice(["vision", "language", "alignment", "model"])
        place = place if section == "model" else place[section]
        key = draw.choice([key for key, held in place.items() if isinstance(held, int | float | list)])
        held = place[key]
        if isinstance(held, list):
            place[key] = draw.choice([[], held[:1], held * 2, [draw.choice(NUMBERS)], [near(draw, n) for n in held]])
        else:
            place[key] = draw.choice([near(draw, held), near(draw, held), draw.choice(NUMBERS)])
        change = f" {section}.{key} = {repr(place[key])[:60]}{_with_graphs(tree)}"
    elif what == 4:
        key = draw.choice(SETTINGS)
        tree[key] = draw.choice(SETTING_VALUES)
        change = f" {key} = {tree[key]}{_with_graphs(tree)}"
    elif what == 5:
        embedding = tree["embedding"]
        key = draw.choice(sorted(embedding))
        embedding[key] = draw.choice([*NUMBERS, "fp16", "fp32", "int8", "int4"])
        change = f" embedding.{key} = {embedding[key]}"
    elif what == 6:
        entry = draw.choice(tree["files"])
        key = draw.choice(["path", "path", "size", "sha256"])
        entry[key] = draw.choice(PATHS) if key == "path" else draw.choice([0, -1, 2**63, "", "0" * 64, None, 1.0])
        change = f" files {key} = {repr(entry[key])[:40]}"
    else:
        tree, change = mutate_json(draw, tree)
    content, written = to_json_bytes(draw, tree)
    replace(path, content)
    return f"{path.name}{change}{written}"


def _with_graphs(tree: Json) -> str:
    """Write graphs that match the changed sizes, so that they contradict only the other files."""
    try:
        manifest = from_json(Manifest, tree)
        if manifest.model.language.layers > MAX_LAYERS:
            return ""
        specs = graph_specs(manifest.model, manifest.target, manifest.activations, manifest.cache)
        tree["graphs"] = {spec.name: spec.to_json() for spec in specs}
    except (ValueError, ArithmeticError, TypeError, MemoryError):
        return ""
    return ", graphs too"


def _put_right(draw: Random, folder: Path) -> str:
    """Update the sizes and checksums of all files."""
    path = folder / MANIFEST
    tree = json.loads(read(path))
    for entry in tree["files"] if isinstance(tree, dict) and isinstance(tree.get("files"), list) else []:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = read(folder / entry["path"])
            wrong = entry["size"] != len(content) or entry["sha256"] != hashlib.sha256(content).hexdigest()
            if wrong and (folder / entry["path"]).parent == folder:
                entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    replace(path, json.dumps(tree).encode("utf-8", "surrogatepass"))
    return "checksums right"
