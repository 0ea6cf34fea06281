"""Measure the demo model on held-out questions: a checkpoint through the eager interpreter, or a bundle.

    python -m fusion_edge.benchmarks.demo.evaluate --checkpoint FOLDER --questions 1000
    python -m fusion_edge.benchmarks.demo.evaluate --bundle FOLDER --questions 1000
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.benchmarks.demo.pictures import KINDS, Example, Pixels, examples
from fusion_edge.export import architecture
from fusion_edge.export.checkpoint import read_config, read_parameters
from fusion_edge.export.eager import EagerOperations, KeyValueCache
from fusion_edge.export.safetensors_file import Checkpoint
from fusion_edge.export.tokenizer import tokenizer_json
from fusion_edge.export.weights import CheckpointWeights, read_parameter
from fusion_edge.runtime import load
from fusion_edge.runtime.config import GLOBAL_CROPS, FusionConfig, side
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.grids import pooling_cells
from fusion_edge.runtime.images import cut_crops, normalize
from fusion_edge.runtime.prompts import TEMPLATES, encode_prompt

SEED = 0
"""Of the held-out split; training validates on another one."""
QUESTIONS_A_PICTURE = 5
MAX_NEW_TOKENS = 32

Answerer = Callable[[Pixels, str], str]
"""From an RGB picture and a question to the answer's text."""


@dataclass(frozen=True)
class Score:
    """Exact answers, overall and by kind of question."""

    asked: Mapping[str, int]
    right: Mapping[str, int]

    @property
    def accuracy(self) -> float:
        """Share of exact answers."""
        return sum(self.right.values()) / sum(self.asked.values())

    def __str__(self) -> str:
        kinds = [
            f"{kind} {self.right.get(kind, 0) / self.asked[kind]:.1%}" for kind in KINDS if kind in self.asked
        ]
        total = f"{sum(self.right.values())} of {sum(self.asked.values())} answers exact"
        return f"{total}: {self.accuracy:.1%} ({', '.join(kinds)})"


def held_out(questions: int) -> Iterable[Example]:
    """The first held-out questions, five about each picture."""
    return itertools.islice(examples("held_out", SEED, QUESTIONS_A_PICTURE), questions)


def evaluate(answer: Answerer, asked: Iterable[Example]) -> Score:
    """Ask everything; an answer counts only if it is the right one to the letter."""
    counts: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for example in asked:
        counts[example.kind] += 1
        right[example.kind] += answer(example.picture, example.question) == example.answer
    return Score(counts, right)


class EagerAnswerer:
    """Greedy answers of a checkpoint by the eager interpreter, in float32."""

    def __init__(self, folder: Path, query_length: int | None = None, align: bool = True) -> None:
        """Read a checkpoint folder.

        ``query_length`` is the checkpoint's least unless given; ``align=False`` switches the interaction layers
        off. Raises :class:`FusionError` for a checkpoint that cannot be read and :class:`UsageError` for a
        query length that it does not offer.
        """
        with Checkpoint(folder) as checkpoint:
            self.config: FusionConfig = read_config(checkpoint)
            weights = CheckpointWeights(checkpoint, read_parameters(checkpoint, self.config))
            names = weights.parameters
            parameters = {name: torch.from_numpy(read_parameter(weights, name)) for name in names}
        self._get = parameters.__getitem__
        self._tokenizer = Tokenizer.from_str(tokenizer_json(folder))
        offered = self.config.alignment.query_lengths
        self._query_length = offered[0] if query_length is None else query_length
        if self._query_length not in offered:
            raise UsageError(
                f"{folder} offers no query length {query_length}; choose one of {', '.join(map(str, offered))}."
            )
        self._align = align
        self._picture: Pixels | None = None

    def __call__(self, picture: Pixels, question: str) -> str:
        """The answer's text. The latest picture's latents, keys and values are kept."""
        with torch.inference_mode():
            if self._picture is not picture:
                self._look(picture)
                self._picture = picture
            return self._answer(question)

    def _look(self, picture: Pixels) -> None:
        """Everything that depends on the picture alone."""
        ops, config = EagerOperations(self.config, self._get), self.config
        pixels = torch.from_numpy(normalize(cut_crops(Image.fromarray(picture))))
        self._local, crops = pixels[GLOBAL_CROPS:], pixels[:GLOBAL_CROPS]
        no_text = torch.zeros(GLOBAL_CROPS, 0, config.language.hidden_size)
        features = architecture.vision_encoder(ops, config, crops, no_text, no_text[..., 0])
        size, cells = 2 * config.vision.grid, side(self._query_length)
        tables = (
            torch.from_numpy(pooling_cells(size, n)) for n in (cells, cells * config.alignment.window_size)
        )
        self._latents, self._keys, self._values = architecture.alignment_decoder(ops, config, features, *tables)

    def _answer(self, question: str) -> str:
        config, cache = self.config, KeyValueCache()
        ops = EagerOperations(config, self._get, cache)
        prompt = encode_prompt(self._tokenizer, TEMPLATES[config.template], [], question)
        layout = prompt.layout(config.vision.patches, self._query_length)
        instruct = self._embed(prompt.instruct_ids)
        mask = torch.from_numpy(prompt.instruct_ids != 0)[None].float()
        x = torch.empty(1, layout.length, config.language.hidden_size)
        image = slice(layout.image_start, layout.image_start + config.vision.patches)
        x[0, image] = architecture.vision_encoder(ops, config, self._local, instruct, mask)[0]
        x[0, layout.text_positions] = self._embed(layout.text_ids)[0]
        latents, questions = map(torch.from_numpy, (layout.latent_positions, layout.instruct_positions))
        x[0, latents[0]] = self._latents[0]
        alignment = architecture.Alignment(latents, questions, self._keys, self._values)
        x = architecture.decoder(ops, config, x, alignment if self._align else None)
        ids: list[int] = []
        while len(ids) < MAX_NEW_TOKENS:
            token = int(architecture.logits(ops, config, ops.last_row(x)).argmax())
            if token in config.eos_token_ids:
                break
            ids.append(token)
            x = architecture.decoder(ops, config, self._embed(np.array([token])), None)
        return str(self._tokenizer.decode(ids)).strip()

    def _embed(self, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        """Token embeddings ``[1, T, D]``."""
        return self._get("llm.embed_tokens.weight")[torch.from_numpy(ids)][None]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="folder of a FUSION checkpoint")
    source.add_argument("--bundle", type=Path, help="folder of an exported bundle")
    parser.add_argument("--questions", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--query-length", type=int, help="latents (default: the fewest offered)")
    parser.add_argument(
        "--without-alignment", action="store_true", help="switch a checkpoint's interaction layers off"
    )
    options = parser.parse_args(arguments)
    try:
        sys.stdout.write(f"{_score(options)}\n")
    except FusionError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _score(options: argparse.Namespace) -> Score:
    if options.questions < 1:
        raise UsageError(f"--questions is {options.questions}; expected at least 1.")
    asked = held_out(options.questions)
    if options.checkpoint is not None:
        align = not options.without_alignment
        return evaluate(EagerAnswerer(options.checkpoint, options.query_length, align), asked)
    if options.without_alignment:
        raise UsageError("--without-alignment needs --checkpoint: a bundle's graphs always align.")
    with load(options.bundle) as fusion:
        return evaluate(
            lambda picture, question: fusion.answer(picture, question, query_length=options.query_length).text,
            asked,
        )


if __name__ == "__main__":
    sys.exit(main())
