"""Training of the demo model: codes, batches, attention, and a short run that resumes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_edge.benchmarks.demo import pictures, train, training_model
from fusion_edge.benchmarks.demo.codes import BACKGROUNDS, HEAD_SCALE, KINDS, Codes, patch_labels
from fusion_edge.benchmarks.demo.gallery import FIRST_SEED, KERNEL, REDUCTION, Gallery
from fusion_edge.benchmarks.demo.initialize import CONFIG, HEAD, INPUT, initial_tensors, write_checkpoint
from fusion_edge.benchmarks.demo.phases import PHASES, Phase
from fusion_edge.benchmarks.demo.pictures import Scene, Thing
from fusion_edge.benchmarks.demo.subspaces import (
    ASKS_THING,
    ASKS_WORD,
    GROUPS,
    HEAD_DIM,
    HEADS,
    THING,
    WORD,
    asked,
    mark,
    query_matrix,
)
from fusion_edge.benchmarks.demo.training_data import IGNORED, Batches, Conversation, Inputs
from fusion_edge.benchmarks.demo.training_model import (
    TrainingOperations,
    run,
    with_full_kernel,
    with_small_kernel,
)
from fusion_edge.benchmarks.evaluation import asking
from fusion_edge.benchmarks.evaluation.asking import Questioner
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.export.reference.eager_backend import open_checkpoint
from fusion_edge.runtime.images.preprocessing import cut_crops
from fusion_edge.runtime.samples import Sample

DOG = Thing("dog", (1, 2), center=(288, 96), radius=50, angle=0, mirrored=False)  # center of the top right crop
LABEL = len(BACKGROUNDS) + KINDS.index("dog")
RED = BACKGROUNDS.index("red")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of so small a model only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, initial_tensors(seed=0))
    return folder


@pytest.fixture(scope="module")
def batches(checkpoint: Path) -> Batches:
    return Batches(Gallery.render("train", 0, 6), checkpoint)


def test_patches_are_labeled_in_their_crop_and_in_the_whole_picture() -> None:
    labels = patch_labels(Scene((DOG,), "red")).reshape(5, 8, 8)
    assert labels[1, 4, 4] == LABEL
    assert (labels[[0, 2, 3]] == RED).all()
    assert labels[4, 2, 6] == LABEL
    assert (labels[4, 4:] == RED).all()


def test_codes_have_a_value_in_each_group_of_each_head() -> None:
    codes = Codes.draw(seed=0)
    for code in (codes.kinds, codes.categories, codes.backgrounds):
        heads = code.reshape(len(code), HEADS, HEAD_DIM)
        assert all(((heads[:, :, group] > 0).sum(-1) == 1).all() for group in GROUPS)
        assert ((heads > 0).sum(-1) == len(GROUPS)).all()
    assert len({tuple(row) for row in codes.contents.tolist()}) == len(BACKGROUNDS) + len(KINDS)


def test_subspaces_share_no_dimension() -> None:
    answers = [THING, WORD, *GROUPS]
    assert len(set().union(*answers)) == sum(map(len, answers))
    for asks in (ASKS_THING, ASKS_WORD):
        assert not set(asks) & set().union(*answers)


def test_queries_turn_what_is_asked_into_its_code() -> None:
    kinds = Codes.draw(seed=0).kinds
    for asks_words in (False, True):
        matrix = query_matrix(asks_words)
        assert torch.equal(asked(kinds) @ matrix.T, kinds)
        assert torch.equal(matrix @ mark(ASKS_THING), mark(THING))
        assert torch.equal(matrix @ mark(ASKS_WORD), asks_words * mark(WORD))
    assert (asked(kinds) * kinds).sum(-1).mean() < 0.3 * (kinds * kinds).sum(-1).mean()  # a word sees itself less


def test_maximum_over_patches_keeps_what_each_shows() -> None:
    codes = Codes.draw(seed=0)
    one, other = codes.kinds[3], codes.kinds[40]
    products = codes.kinds @ torch.maximum(one, other)
    assert set(products.topk(2).indices.tolist()) == {3, 40}


def test_names_start_as_their_codes(checkpoint: Path, batches: Batches) -> None:
    tensors, codes = initial_tensors(seed=0), Codes.draw(seed=0)
    codes.start_names(tensors, batches.tokenizer)
    for text in ("\ndog", "the dog"):
        token = batches.tokenizer.encode(text, add_special_tokens=False).ids[-1]
        assert torch.equal(tensors[INPUT][token], asked(codes.kinds[KINDS.index("dog")]) + mark(WORD))
        assert torch.equal(tensors[HEAD][token], HEAD_SCALE * codes.kinds[KINDS.index("dog")])


def test_words_of_places_start_near_their_rows_and_columns(checkpoint: Path, batches: Batches) -> None:
    tensors, codes = initial_tensors(seed=0), Codes.draw(seed=0)
    codes.start_names(tensors, batches.tokenizer)

    def nearest(word: str, places: torch.Tensor) -> list[int]:
        token = batches.tokenizer.encode(f"the {word}", add_special_tokens=False).ids[-1]
        products = (places - places.mean(0)) @ query_matrix(asks_words=False) @ tensors[INPUT][token].float()
        return sorted(products.topk(2).indices.tolist())

    for first, middle, last, places in (
        ("top", "middle", "bottom", codes.rows),
        ("left", "middle", "right", codes.columns),
    ):
        assert (nearest(first, places), nearest(last, places)) == ([0, 1], [6, 7])
        assert set(nearest(middle, places)) < {2, 3, 4, 5}


def test_gallery_does_not_depend_on_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_edge.benchmarks.demo.gallery.PART", 3)
    one, two = (Gallery.render("held_out", 2, 5, processes) for processes in (1, 2))
    assert np.array_equal(one.crops, two.crops)
    assert np.array_equal(one.labels, two.labels)
    assert one.scenes == two.scenes


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(0, 4), st.integers(0, 99))
def test_attention_is_that_of_the_eager_interpreter(batch: int, text: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, width = CONFIG.vision.patches + text, CONFIG.vision.width
    q, k, v = (torch.randn(batch, rows, width, generator=generator) for _ in range(3))
    mask = torch.ones(batch, rows, dtype=torch.bool)
    mask[:, CONFIG.vision.patches + 1 :] = torch.rand(batch, max(text - 1, 0), generator=generator) < 0.5
    ours, eager = TrainingOperations({}), EagerOperations(CONFIG, lambda name: torch.empty(0))
    torch.testing.assert_close(ours.attention(q, k, v, 16, mask), eager.attention(q, k, v, 16, mask))

    q = torch.randn(2 * batch, 4, width, generator=generator)
    k, v = (torch.randn(batch, 4, 9, width, generator=generator) for _ in range(2))
    expected = eager.context_attention(q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), 16)
    torch.testing.assert_close(ours.context_attention(q, k, v, 16), expected)


def test_attention_of_one_conversation_is_causal(batches: Batches) -> None:
    question = pictures.Question("What is it?", "dog", "what")
    batch = batches.batch([0], [[[question]]], Inputs(4, 1.0, True))
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, batch.tokens.shape[1], 3 * CONFIG.language.hidden_size, generator=generator)
    ours, eager = TrainingOperations({}, batch), EagerOperations(CONFIG, lambda name: torch.empty(0))
    torch.testing.assert_close(ours.causal_attention(qkv, 0), eager.causal_attention(qkv, 0))


@pytest.mark.parametrize(("packed", "guide"), [(1, None), (1, ""), (1, "Describe the scene."), (2, "")])
@pytest.mark.parametrize("image_tokens", [True, False])
@pytest.mark.parametrize("turns", [1, 3])
def test_batch_answers_as_its_conversations_one_by_one(
    batches: Batches, turns: int, image_tokens: bool, packed: int, guide: str | None
) -> None:
    """Conversations of a sequence do not see each other."""
    leaves = with_small_kernel(initial_tensors(seed=1))
    scenes = batches.gallery.scenes[:2]
    asked = [_conversation(scene, turns, seed) for scene in scenes for seed in range(2)]
    inputs = Inputs(4, 1.0, image_tokens, guide)
    sequences = [asked[start : start + packed] for start in range(0, len(asked), packed)]
    together = run(leaves, batches.batch([0, 1], sequences, inputs))
    tokens, loss = 0, 0.0
    for number, conversation in enumerate(asked):
        batch = batches.batch([number // 2], [[conversation]], inputs)
        count = int((batch.targets != IGNORED).sum())
        loss += count * run(leaves, batch).answer_loss.item()
        tokens += count
    assert together.correct.shape == (4 // packed, packed * turns)
    assert together.answer_loss.item() == pytest.approx(loss / tokens, rel=1e-4)


@pytest.mark.parametrize("phase", PHASES[1:], ids=lambda phase: phase.name)
def test_a_draw_fits_its_phase(batches: Batches, phase: Phase) -> None:
    drawn = [batches.draw([seed], replace(phase, pictures_per_step=2)) for seed in range(40)]
    conversations = [one for batch in drawn for sequence in batch.sequences for one in sequence]
    assert {len(one) for one in conversations} == {1} | ({3} if phase.conversation_share else set())
    assert {question.kind for one in conversations if len(one) == 1 for question in one} <= phase.kinds
    sequences = itertools.chain(*(batch.sequences for batch in drawn))
    assert {len(sequence) for sequence in sequences if len(sequence[0]) == 1} == {*phase.packed}
    assert {sum(map(len, itertools.chain(*batch.sequences))) for batch in drawn} <= {
        2 * phase.questions_per_picture,
        2 * (phase.questions_per_picture // 3) * 3,
    }
    assert np.mean([batch.inputs.image_tokens for batch in drawn]) == pytest.approx(phase.image_share, abs=0.2)
    assert {(len(batch.patches), batch.inputs.latent_scale) for batch in drawn} == {(2, phase.latent_scale)}
    assert len({batch.inputs.guide for batch in drawn}) > 2


def test_phases_take_all_of_the_time() -> None:
    assert sum(phase.share for phase in PHASES) == pytest.approx(1, abs=1e-3)


def test_exact_codes_replace_the_vision_tower(checkpoint: Path, batches: Batches) -> None:
    """Pictures no longer matter, labels do."""
    leaves = with_small_kernel(initial_tensors(seed=1))
    asked = [[pictures.ask(scene, np.random.default_rng(0), 1)] for scene in batches.gallery.scenes[:2]]
    coded = Batches(batches.gallery, checkpoint)
    coded.codes = Codes.draw(seed=0)
    batch = coded.batch([0, 1], asked, Inputs(4, 1.0, True))
    loss = run(leaves, batch).answer_loss
    assert run(leaves, replace(batch, patches=torch.zeros_like(batch.patches))).answer_loss == loss
    assert batch.features is not None
    assert run(leaves, replace(batch, features=batch.features.flip(0))).answer_loss != loss
    assert run(leaves, replace(batch, features=None)).answer_loss != loss


def test_features_of_a_perfect_tower_are_the_codes(batches: Batches) -> None:
    codes, labels = Codes.draw(seed=0), torch.from_numpy(batches.gallery.labels[:2, :4])
    assert torch.equal(codes.features(labels), (codes.contents[labels] + codes.places).bfloat16())


def test_targets_are_the_answers(batches: Batches) -> None:
    asked = _conversation(batches.gallery.scenes[0], 3, 0)
    batch = batches.batch([0], [[asked]], Inputs(4, 1.0, True))
    targets = batch.targets[0][batch.targets[0] != IGNORED].tolist()
    text = batches.tokenizer.decode(targets, skip_special_tokens=False)
    assert [part.strip() for part in text.split("<|end|>")[:-1]] == [question.answer for question in asked]


def test_training_computes_the_exported_model(batches: Batches, tmp_path: Path) -> None:
    """Its galleries round averages of pixels; here they are exact."""
    tensors = with_full_kernel(with_small_kernel(initial_tensors(seed=0)))  # constant on the averaged squares
    write_checkpoint(tmp_path / "checkpoint", tensors)
    _, picture = next(pictures.scenes("train", FIRST_SEED))  # the gallery's first
    Image.fromarray(picture).save(tmp_path / "picture.png")
    question = pictures.Question("What is it?", "dog", "what")
    batch = replace(batches.batch([0], [[[question]]], Inputs(4, 1.0, True)), patches=_exact_patches(picture))
    tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    loss = run(with_small_kernel(tensors), batch).answer_loss.item()
    tokens = batch.targets[batch.targets != IGNORED].tolist()
    with open_checkpoint(tmp_path / "checkpoint") as fusion:
        questioner = Questioner(fusion, asking.settings(fusion, query_length=4))
        sample = Sample(tmp_path / "picture.png", question.text)
        probabilities = questioner.force(sample, tokens[:-1], len(tokens))
    expected = -np.mean([row[token] for row, token in zip(probabilities, tokens, strict=True)])
    assert loss == pytest.approx(expected, rel=1e-4)


def test_patch_loss_is_least_at_the_codes(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, labels = Codes.draw(seed=0), torch.from_numpy(batches.gallery.labels[:2])
    features = codes.contents[labels] + codes.places
    shifted = torch.roll(features, 1, dims=2)

    def loss_of(features: torch.Tensor) -> tuple[float, float]:
        monkeypatch.setattr(training_model, "crop_features", lambda ops, crops: features)
        loss, right = training_model.patch_loss({}, codes, torch.empty(0), labels)
        return loss.item(), right.item()

    loss, right = loss_of(features)
    assert loss < 0.5  # backgrounds resemble each other
    assert right == 1
    worse, fewer = loss_of(shifted)
    assert worse > 4 * loss
    assert fewer < 1


def test_short_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train, "VALIDATION_PICTURES", 8)
    options = ["--output", str(tmp_path), "--minutes", "0.02", "--pictures", "16", "--threads", "1"]
    assert train.main(options) == 0
    before = (tmp_path / "model-00001-of-00001.safetensors").read_bytes()
    assert train.main(options) == 0  # nothing is left to do
    assert (tmp_path / "model-00001-of-00001.safetensors").read_bytes() == before
    assert train.main([*options, "--seed", "1"]) == 1
    assert "has a run with --minutes 0.02 --pictures 16 --seed 0" in capsys.readouterr().err


def test_stopped_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "VALIDATION_PICTURES", 8)
    options = ["--output", str(tmp_path), "--minutes", "0.02", "--pictures", "16", "--threads", "1"]
    step, stopped = train._step, next(number for number, phase in enumerate(PHASES) if phase.name == "windows")
    seen: list[tuple[int, int, torch.Tensor]] = []

    def until_windows(training: train.Training, batches: Batches, phase: Phase) -> tuple[float, float]:
        if training.phase == stopped:
            raise KeyboardInterrupt
        return step(training, batches, phase)

    def watched(training: train.Training, batches: Batches, phase: Phase) -> tuple[float, float]:
        seen.append((training.phase, training.step, training.leaves[HEAD].detach().clone()))
        return step(training, batches, phase)

    monkeypatch.setattr(train, "_step", until_windows)
    assert train.main(options) == 130
    state = torch.load(tmp_path / train.STATE, weights_only=True)
    monkeypatch.setattr(train, "_step", watched)
    assert train.main(options) == 0
    phase, number, head = seen[0]
    assert (phase, number, 0.0) == state["position"]
    assert phase == stopped
    assert torch.equal(head, state["leaves"][HEAD])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--minutes=0", "'0' is not a positive number of minutes"),
        ("--minutes=nan", "'nan' is not a positive number of minutes"),
        ("--pictures=11", "11 is less than the 12 pictures of a step"),
        ("--threads=0", "'0' is not a positive integer"),
        ("--seed=-1", "'-1' is not an integer from 0 to"),
    ],
)
def test_wrong_usage(option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--output", str(tmp_path / "run"), option])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _exact_patches(picture: pictures.Pixels) -> torch.Tensor:
    """Return the patches ``[1, 5, P, 432]`` of a picture without rounding."""
    side, kernel = CONFIG.vision.grid, KERNEL
    crops = torch.from_numpy(cut_crops(Image.fromarray(picture))).float()
    reduced = crops.reshape(5, side * kernel, REDUCTION, side * kernel, REDUCTION, 3).mean((2, 4))
    blocks = reduced.reshape(5, side, kernel, side, kernel, 3).permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(1, 5, side * side, -1) / 127.5 - 1


def _conversation(scene: Scene, turns: int, seed: int) -> Conversation:
    rng = np.random.default_rng(seed)
    return pictures.ask(scene, rng, 1) if turns == 1 else pictures.conversation(scene, rng, turns)
