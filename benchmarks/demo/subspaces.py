"""Where a code has its values, and how a question asks for one.

A feature answers what a word asks: the embedding of a word has the values of its code in other places, and queries of
attention start as a matrix that moves them back. So a word attends to features of what it names, and not to itself.
Rotary embeddings turn the first dimensions of a head fast: codes leave these out, and distance hardly matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEADS, HEAD_DIM = 4, 64  # of the LLM
STRENGTH = 2.0
FAST = 12  # of the pairs (i, i + 32) of a head
_SLOW = [i for i in range(HEAD_DIM) if i % (HEAD_DIM // 2) >= FAST]
THING, WORD = _SLOW[:4], _SLOW[4:8]
"""Dimensions of a head that tell a thing from the background, and a word that says what a question asks for."""
CHOICES = 8  # of which a code has one value
GROUPS = [_SLOW[start : start + CHOICES] for start in range(8, len(_SLOW), CHOICES)]
"""Dimensions of a head; a code has a value in each group."""
ASKS_THING, ASKS_WORD = list(range(4)), list(range(4, 8))
"""Dimensions of a head with which a token looks for those."""


def random_codes(count: int, generator: torch.Generator) -> Tensor:
    """Return random codes ``[count, D]`` with a value in each group of each head."""
    codes = torch.zeros(count, HEADS, HEAD_DIM)
    for group in GROUPS:
        chosen = torch.tensor(group)[torch.randint(CHOICES, (count, HEADS, 1), generator=generator)]
        codes.scatter_(2, chosen, STRENGTH)
    return codes.flatten(1)


def mark(dimensions: list[int]) -> Tensor:
    """Return the code ``[D]`` with values in some dimensions of each head."""
    code = torch.zeros(HEADS, HEAD_DIM)
    code[:, dimensions] = STRENGTH
    return code.flatten()


def query_matrix(asks_words: bool) -> Tensor:
    """Return the matrix ``[D, D]`` of queries: it moves what is asked to where features have it."""
    head = torch.zeros(HEAD_DIM, HEAD_DIM)
    for to, source in zip(GROUPS, [*GROUPS[1:], GROUPS[0]], strict=True):
        head[to, source] = 1
    head[THING, ASKS_THING] = 1
    if asks_words:
        head[WORD, ASKS_WORD] = 1
    return torch.kron(torch.eye(HEADS), head)


def asked(codes: Tensor) -> Tensor:
    """Return codes ``[..., D]`` as words ask for them: :func:`query_matrix` gives the codes."""
    return codes @ query_matrix(asks_words=True)
