"""Batches whose rows have prompts of different lengths, built by hand, and what each row must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import families
import tiny
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from softprompt.base_model import find_way
from softprompt.call import Call
from softprompt.config import Placement
from softprompt.facts import Facts, LayerShape
from softprompt.injection.contract import Way
from softprompt.join import Mixed
from softprompt.prompt import KV, Embeddings
from softprompt.running import Run

LENGTHS = (3, 0, 5, 1)
ROWS = (2, 0, 1, 3, 2, 1)  # which prompt each row has: 5, 3, 0, 1, 5 and 0 virtual tokens
TOKENS = (5, 3, 6, 4, 2, 6)
PLAIN: dict[str, Any] = {"do_sample": False, "pad_token_id": tiny.PAD, "eos_token_id": None, "max_new_tokens": 5}

Leaves = list[Tensor]
"""A prompt's own tensors, without padding, which gradients are taken of."""


class Model:
    """A tiny base model of one family with its door, and prompts for it."""

    def __init__(self, family: str, task: str = "CAUSAL_LM") -> None:
        self.base: PreTrainedModel = families.build(family, task)
        self.base.requires_grad_(False)
        found = find_way(self.base)
        self.way: Way = found[0]
        self.facts: Facts = found[1]

    def run(self, prompt: Any, placement: Placement = Placement.FRONT, slots: Tensor | None = None) -> Run:
        return Run(self.way, self.facts, prompt, placement, slots)

    def vectors(self, seed: int = 0) -> list[Leaves]:
        """The vectors `[p, d]` of each prompt, about as large as the words'."""
        generator = torch.Generator().manual_seed(seed)
        width = self.facts.hidden_size
        return [[(0.3 * torch.randn(length, width, generator=generator)).requires_grad_()] for length in LENGTHS]

    def keys(self, seed: int = 0) -> list[Leaves]:
        """Keys and values `[h, p, k]` of every attention layer, for each prompt."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(layer.heads, size) for layer in self._layers() for size in (layer.key_size, layer.value_size)]
        return [
            [torch.randn(heads, length, size, generator=generator).requires_grad_() for heads, size in shapes]
            for length in LENGTHS
        ]

    def _layers(self) -> tuple[LayerShape, ...]:
        return self.facts.layers + self.facts.cross_layers + self.facts.encoder_layers

    def embeddings(self, leaves: list[Leaves], rows: Any = ROWS, lengths: tuple[int, ...] = LENGTHS) -> Embeddings:
        """All prompts for one batch, the shorter ones padded in front."""
        longest = max(lengths)
        parts = [pad(vectors, (0, 0, longest - len(vectors), 0)) for (vectors,) in leaves]
        return Embeddings(torch.stack(parts), torch.tensor(rows), lengths)

    def kv(self, leaves: list[Leaves], rows: Any = ROWS, lengths: tuple[int, ...] = LENGTHS) -> KV:
        longest = max(lengths)
        flat = [torch.stack([pad(each, (0, 0, longest - each.shape[1], 0)) for each in part])
                for part in zip(*leaves, strict=True)]  # fmt: skip
        return replace(self._as_kv(flat), rows=torch.tensor(rows), lengths=lengths)

    def _as_kv(self, flat: list[Tensor]) -> KV:
        pairs = tuple(zip(flat[::2], flat[1::2], strict=True))
        own, cross = len(self.facts.layers), len(self.facts.cross_layers)
        return KV(pairs[:own], pairs[own : own + cross], pairs[own + cross :])

    def alone(self, leaves: Leaves, kind: str) -> Embeddings | KV | None:
        """One prompt by itself, without padding or rows; None where it has no virtual token."""
        if not leaves[0].shape[0 if kind == "vectors" else 1]:
            return None
        flat = [each[None] for each in leaves]
        return Embeddings(flat[0]) if kind == "vectors" else self._as_kv(flat)

    def prompts(self, kind: str) -> tuple[list[Leaves], Any, list[Any]]:
        """The leaves, the prompt of the batch, and for each row what it has alone. `kind`: vectors, keys or both.

        `both`: the first and the third prompt are vectors, the last keys and values.
        """
        if kind != "both":
            leaves = self.vectors() if kind == "vectors" else self.keys()
            joined = self.embeddings(leaves) if kind == "vectors" else self.kv(leaves)
            return leaves, joined, [self.alone(leaves[row], kind) for row in ROWS]
        vectors, keys = self.vectors(), self.keys()
        words = [[part[:0] if index == 3 else part for part in each] for index, each in enumerate(vectors)]
        states = [[part if index == 3 else part[:, :0] for part in each] for index, each in enumerate(keys)]
        of_words = tuple(len(each[0]) for each in words)
        joined = Mixed(self.kv(states, lengths=(0, 0, 0, LENGTHS[3])), self.embeddings(words, lengths=of_words))
        single = [self.alone(keys[3], "keys") if row == 3 else self.alone(vectors[row], "vectors") for row in ROWS]
        return vectors[:3] + keys[3:], joined, single

    def forward_alone(self, prompt: Any, placement: Placement = Placement.FRONT, **inputs: Any) -> Any:
        """The output of one row with its own prompt, or of the base model."""
        return self.base(**inputs) if prompt is None else self.run(prompt, placement).forward(Call.of(inputs))


def each_row(batch: dict[str, Tensor]) -> list[Tensor]:
    """The real tokens of each row, `[1, t]`."""
    return [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=tolerance)


def same_gradients(got: Tensor, expected: Tensor, leaves: list[Leaves]) -> None:
    """Both losses have the same gradients of every prompt's tensors, and all prompts with virtual tokens have one."""
    tensors = [each for part in leaves for each in part if each.numel()]
    mine = torch.autograd.grad(got, tensors, allow_unused=True)
    theirs = torch.autograd.grad(expected, tensors, allow_unused=True)
    assert all(each is not None and bool(each.abs().sum() > 0) for each in mine)
    for one, other in zip(mine, theirs, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def poisoned(make: Callable[[list[Leaves]], Any], leaves: list[Leaves], which: int) -> Any:
    """The same prompt with one of its parts not a number."""
    with torch.no_grad():
        changed = [[torch.full_like(each, torch.nan) if index == which else each for each in part]
                   for index, part in enumerate(leaves)]  # fmt: skip
        return make(changed)
