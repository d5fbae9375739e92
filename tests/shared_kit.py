"""Attention with a prefix written out row by row, and batches of every kind to try the shared one with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from softprompt.attention import Prefix, groups_of

BATCH, LENGTH, SIZE = 4, 5, 8
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}  # of queries, of keys and values
SPANS = {"whole": (5, 5), "one": (1, 6), "chunk": (3, 7)}  # queries, own keys
ROWS: dict[str, tuple[list[int] | None, tuple[int, ...] | None]] = {  # each row's prompt, the prompts' lengths
    "one for all": (None, None),
    "one each": ([0, 1, 2, 3], None),
    "pairs": ([0, 0, 1, 1], None),
    "pairs, crosswise": ([1, 0, 1, 0], None),
    "groups of different size": ([1, 0, 1, 1], None),
    "ragged": ([2, 0, 3, 1], (3, 1, 5, 2)),
    "ragged pairs": ([2, 2, 0, 0], (4, 5, 1)),
    "ragged, of different size": ([1, 1, 0, 2], (4, 5, 1)),
    "some empty": ([2, 0, 3, 1], (3, 0, 5, 2)),
    "all shorter than the padding": ([0, 1, 1, 0], (3, 2)),
    "all empty": ([0, 1, 1, 0], (0, 0)),
    "one empty one": (None, (0,)),
}


@dataclass(frozen=True)
class Batch:
    """Queries `[B, hq, T, k]`, keys and values of rows `[B, h, t, ·]` and of prompts `[N, h, p, ·]`.

    `bias` `[B|1, hq|1, T, t]` and `before` `[B|1, hq|1, T, p]` are added to the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    rows: list[int] | None = None
    lengths: tuple[int, ...] | None = None
    bias: Tensor | None = None
    before: Tensor | None = None
    causal: bool = False
    scale: float = 0.3

    @property
    def states(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.prefix_key, self.prefix_value

    @property
    def prefix(self) -> Prefix:
        batch, length = len(self.query), self.prefix_key.shape[2]
        groups = groups_of(batch, length, self.rows, self.lengths, self.query.device)
        return Prefix(self.prefix_key, self.prefix_value, groups, self.before)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Prefix, Tensor | None, bool, float]:
        """What `attend` and `plain` take."""
        return self.query, self.key, self.value, self.prefix, self.bias, self.causal, self.scale

    def with_states(self, *states: Tensor) -> Batch:
        names = ("query", "key", "value", "prefix_key", "prefix_value")
        return replace(self, **dict(zip(names, states, strict=True)))

    def to(self, dtype: torch.dtype) -> Batch:
        changed = self.with_states(*(each.detach().to(dtype) for each in self.states))
        bias, before = (None if each is None else each.to(dtype) for each in (self.bias, self.before))
        return replace(changed, bias=bias, before=before)

    def leaves(self) -> Batch:
        return self.with_states(*(each.detach().clone().requires_grad_() for each in self.states))


def batch(heads: str = "GQA", span: str = "whole", kind: str = "one for all", **more: object) -> Batch:
    """A random batch in float64, whose shorter prompts are padded with zeros in front."""
    (of_query, of_key), (queries, keys), (rows, lengths) = HEADS[heads], SPANS[span], ROWS[kind]
    count = len(lengths) if lengths is not None else 1 if rows is None else max(rows) + 1
    shapes = [
        (BATCH, of_query, queries, SIZE),
        *[(BATCH, of_key, keys, SIZE)] * 2,
        *[(count, of_key, LENGTH, SIZE)] * 2,
    ]
    states = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    for number, length in enumerate(lengths or ()):
        for part in states[3:]:
            part[number, :, : LENGTH - length] = 0
    made = Batch(*states, rows=rows, lengths=lengths)
    return replace(made, **more)


def naive(given: Batch, dropout: float = 0.0) -> Tensor:
    """Row by row: its own prompt's keys and values before its own, a softmax over both."""
    return torch.cat([_row(given, number, dropout) for number in range(len(given.query))])


def _row(given: Batch, number: int, dropout: float) -> Tensor:
    query, key = given.query[number], given.key[number]
    prompt = 0 if given.rows is None else given.rows[number]
    length = given.prefix_key.shape[2] if given.lengths is None else given.lengths[prompt]
    key, value = in_front(given, number)
    scores, own = query @ key.mT * given.scale, given.key.shape[2]
    if given.bias is not None:
        scores = scores + pad(_of_row(given.bias, number), (length, 0))
    if given.before is not None and length:
        scores = scores + pad(_of_row(given.before, number)[..., -length:], (0, own))
    if given.causal:
        later = torch.ones(query.shape[1], own, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(pad(later, (length, 0)), -torch.inf)
    weights = torch.dropout(scores.softmax(-1), dropout, train=dropout > 0)
    return (weights @ value)[None]


def _of_row(bias: Tensor, number: int) -> Tensor:
    return bias[number if len(bias) > 1 else 0]


def in_front(given: Batch, number: int) -> tuple[Tensor, Tensor]:
    """All keys and values `[hq, p + t, k]` that one row sees, its heads repeated."""
    prompt, shared = 0 if given.rows is None else given.rows[number], given.query.shape[1] // given.key.shape[1]
    begin = 0 if given.lengths is None else given.prefix_key.shape[2] - given.lengths[prompt]
    pairs = ((given.prefix_key, given.key), (given.prefix_value, given.value))
    key, value = (torch.cat([before[prompt][:, begin:], own[number]], dim=1) for before, own in pairs)
    return key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)


def gradients(output: Tensor, given: Batch) -> tuple[Tensor, ...]:
    """Of a sum of the output with fixed weights, by queries, keys, values and the prefix's keys and values."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    total = (output * weights.to(output.dtype)).sum()
    return torch.autograd.grad(total, given.states, materialize_grads=True, allow_unused=True)


def hidden(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A mask that is added, half of it the lowest number; the first query of the first row sees nothing of its own."""
    mask = torch.rand(shape) < 0.5
    mask[0, :, 0] = True
    return torch.zeros(shape, dtype=dtype).masked_fill(mask, torch.finfo(dtype).min)


def biases(given: Batch) -> list[Tensor | None]:
    """What may be added to the prefix's scores: nothing, numbers of four shapes, the lowest one for some."""
    rows, heads, queries = given.query.shape[:3]
    shapes = [(1, 1), (1, heads), (rows, 1), (rows, heads)]
    found: list[Tensor | None] = [torch.randn(*shape, queries, LENGTH, dtype=torch.float64) for shape in shapes]
    far = torch.zeros(rows, 1, queries, LENGTH, dtype=torch.float64)
    far[1:3, ..., : LENGTH - 1] = torch.finfo(torch.float64).min
    return [None, *found, far]
