"""Parity with the outputs of the released code: of the eager interpreter, and of bundles run through the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.logits import first_logits
from support.paths import GOLDEN
from torch import Tensor

from fusion_edge.export import cli as export_cli
from fusion_edge.export.model import architecture
from fusion_edge.export.model.architecture import Alignment
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend, open_checkpoint
from fusion_edge.runtime import Fusion, Sampling, Turn, load
from fusion_edge.runtime.backends.base import Floats, ImageAlignment, Integers
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import run as run_cli
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image

PHI, LLAMA = CHECKPOINTS = ("FUSION-tiny-Phi", "FUSION-X-tiny-LLaMA")
NEW_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A golden case: description and arrays."""

    name: str
    facts: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def image(self) -> Path:
        return GOLDEN / f"{self.name}.png"

    @property
    def image_tokens(self) -> int | None:
        grid = self.facts["image_grid"]
        return None if grid is None else int(grid) ** 2

    def turns(self) -> Iterator[tuple[int, str, list[Turn]]]:
        """Yield number, question and history of every turn."""
        history: list[Turn] = []
        for number, turn in enumerate(self.facts["turns"]):
            yield number, turn["question"], list(history)
            history.append(Turn(turn["question"], turn["reply"]))


def read_case(name: str) -> Case:
    facts = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return Case(name, facts, dict(np.load(GOLDEN / f"{name}.npz")))


CASES = [read_case(name) for name in ("llama_one_turn", "phi_grid12", "phi_one_turn", "phi_two_turns")]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def assert_close(actual: npt.ArrayLike, expected: npt.NDArray[Any], share_of_deviation: float) -> None:
    """Assert that the largest difference is within a share of the expected values' standard deviation."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= share_of_deviation * expected.std()


class Recorder(EagerBackend):
    """An eager backend that records the arrays of the golden files."""

    seen: dict[str, npt.NDArray[Any]]

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.seen = {}

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> Floats:
        features = super().encode(pixels, text_embeds, text_mask)
        if len(features) == 1:  # the local crop, before FUSION-L resizes it
            self.seen["image_tokens"] = features[0, ::3]
        return features

    @torch.inference_mode()
    def align(self, features: Floats, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        operations = self.operations()
        crops, cells = torch.from_numpy(features), torch.from_numpy(context_cells)
        image = operations.global_map(crops, self.config.vision.grid)
        width = image.shape[-1]
        self.seen |= {
            "global_features": image.reshape(-1, width)[::9].numpy(),
            "global_ctx": operations.pool(image, cells).reshape(-1, width).numpy(),
        }
        aligned = super().align(features, latent_cells, context_cells)
        self.seen["latents"] = aligned.latents
        return aligned

    def hidden(self, embeddings: Floats, alignment: Alignment[Tensor] | None) -> Tensor:
        hidden = super().hidden(embeddings, alignment)
        if alignment is not None:  # the prompt
            rows = architecture.logits(self.operations(), self.config, hidden[0, ::16])
            last = architecture.logits(self.operations(), self.config, hidden[0, -1])
            self.seen |= {
                "vision_pos": alignment.latent_positions.reshape(-1).numpy(),
                "instruct_pos": alignment.question_positions.numpy(),
                "last_logits": last.numpy(),
                "logits_every_16th": rows.numpy(),
            }
        return hidden


@contextmanager
def eager(case: Case) -> Iterator[tuple[Fusion, Recorder]]:
    """Open the checkpoint of a case with the eager interpreter as the backend."""
    with open_checkpoint(GOLDEN / case.facts["checkpoint"], Recorder, case.image_tokens) as fusion:
        assert isinstance(fusion.backend, Recorder)
        yield fusion, fusion.backend


@each_case
def test_eager_interpreter_reproduces_every_array(case: Case) -> None:
    expected = case.arrays
    crops = cut_crops(load_image(case.image)).transpose(0, 3, 1, 2)[..., ::8, ::8]
    assert np.abs(crops.astype(int) - expected["crops_uint8_every_8th"]).max() <= 1
    with eager(case) as (fusion, backend):
        for number, question, history in case.turns():
            answer = fusion.answer(
                case.image,
                question,
                history=history,
                query_length=case.facts["query_len"],
                sampling=Sampling(max_new_tokens=NEW_TOKENS),
            )
            seen = backend.seen
            assert_close(seen["global_features"], expected["global_features"], 2e-4)
            for name in ("image_tokens", "global_ctx", "latents", "last_logits", "logits_every_16th"):
                assert_close(seen[name], expected[f"t{number}_{name}"], 2e-4)
            for name in ("vision_pos", "instruct_pos"):
                np.testing.assert_array_equal(seen[name], expected[f"t{number}_{name}"])
            assert list(answer.token_ids) == expected[f"t{number}_output_ids"].tolist()


def export(checkpoint: str, output: Path, *options: str) -> Path:
    assert export_cli.main([str(GOLDEN / checkpoint), "-o", str(output), *options]) == 0
    return output


@each_case
def test_fp32_bundle_gives_the_released_answers(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Floats] = []
    prefill = OnnxRuntimeBackend.prefill

    def watch(self: OnnxRuntimeBackend, *inputs: Any) -> Floats:
        seen.append(prefill(self, *inputs).copy())
        return seen[-1]

    monkeypatch.setattr(OnnxRuntimeBackend, "prefill", watch)
    tokens = [] if case.image_tokens is None else ["--image-tokens", str(case.image_tokens)]
    lengths = ["--query-len", str(case.facts["query_len"])]
    bundle = export(case.facts["checkpoint"], tmp_path / "bundle", "--fp32", *tokens, *lengths)
    for number, question, history in case.turns():
        past = tmp_path / "history.json"
        past.write_text(json.dumps([vars(turn) for turn in history]), encoding="utf-8")
        capsys.readouterr()
        command = [str(bundle), "--image", str(case.image), "--ask", question, "--history", str(past), "--json"]
        assert run_cli.main([*command, "--max-new-tokens", str(NEW_TOKENS)]) == 0
        (answer,) = json.loads(capsys.readouterr().out)["answers"]
        assert answer["token_ids"] == case.arrays[f"t{number}_output_ids"].tolist()
        assert_close(seen[-1], case.arrays[f"t{number}_last_logits"], 1e-3)
        if len(case.facts["turns"]) == 1:
            assert answer["text"] == case.facts["turns"][number]["reply"].strip()


@pytest.mark.parametrize(
    ("checkpoint", "precision"),
    [
        (PHI, "--fp16"),
        (PHI, "--int4"),
        (PHI, "--int4 --asym"),
        (PHI, "--int4 --group-size channel --rule vision.*=int4"),  # some inputs of vision span several blocks
        (LLAMA, "--int8"),
        (LLAMA, "--int4"),
        (LLAMA, "--int4 --asym --group-size channel --rule vision.*=uint4"),
    ],
)
def test_quantized_bundle_is_the_eager_interpreter_on_its_weights(
    checkpoint: str, precision: str, tmp_path: Path
) -> None:
    """At accuracy level 0 only the weights' values differ from fp32, not the arithmetic."""
    case = next(case for case in CASES if case.facts["checkpoint"] == checkpoint and case.image_tokens is None)
    _, question, history = next(case.turns())
    options = ["--group-size", "32", *precision.split(), "--query-len", "16", "--accuracy-level", "0"]
    folder = export(checkpoint, tmp_path / "bundle", *options)
    bundle = open_bundle(folder)
    with load(folder) as fusion:
        logits = first_logits(fusion, case.image, question, history)
        backend = EagerBackend(fusion.config, BundleWeights(bundle))
        reference = Fusion(bundle.manifest, backend, fusion.tokenizer, backend.embed)
        assert_close(logits, first_logits(reference, case.image, question, history), 1e-3)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_int8_arithmetic_stays_close(checkpoint: str, tmp_path: Path) -> None:
    """Accuracy level 4 quantizes activations to int8 in every matmul, with an error of 0.5 % each."""
    case = next(case for case in CASES if case.facts["checkpoint"] == checkpoint and case.image_tokens is None)
    _, question, history = next(case.turns())
    logits = []
    for level in ("0", "4"):
        options = ["--int4", "--query-len", "16", "--accuracy-level", level]
        with load(export(checkpoint, tmp_path / level, *options)) as fusion:
            logits.append(first_logits(fusion, case.image, question, history).astype(np.float64))
    cosine = logits[0] @ logits[1] / np.linalg.norm(logits[0]) / np.linalg.norm(logits[1])
    assert cosine > 0.995
