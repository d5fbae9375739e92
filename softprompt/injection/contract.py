"""The contract of a way into a model: how keys and values get in front of what its attention layers see.

`AttentionWay` goes through transformers' attention interface, `CacheWay` through the cache that layers read. Whoever
uses one branches on neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.call import Call
from softprompt.errors import ConfigError
from softprompt.injection.scope import Recording
from softprompt.prompt import KV

Modules = tuple[list[nn.Module], list[nn.Module], list[nn.Module]]
"""Attention modules, in order: self-attention (an encoder-decoder's decoder), cross-attention, encoder."""


@dataclass(frozen=True)
class Limits:
    """How far a model's positions go: `position_offset` is what is added to one before the model is given it, `room`
    how many tokens there are positions for, where they end with a table that would be read beyond its end.

    `reach` is from how many columns on a row's masks or scores depend on columns, which padding between its tokens
    moves: a window, a chunk, or 1 with ALiBi that is counted by columns.
    """

    position_offset: int = 0
    room: int | None = None
    reach: int | None = None


class Way(ABC):
    """One way of one base model; what it knows of it is told by `bind` and `limit`, once the model has been probed."""

    name: ClassVar[str]
    encoder_decoder: bool
    takes_positions: bool
    """Whether the model is told positions, and not left to count them."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.modules: Modules = ([], [], [])
        self.sharing: dict[nn.Module, nn.Module] = {}
        self.limits = Limits()
        self.keeps_logits = api.takes(base.forward, "logits_to_keep")

    def bind(self, own: list[nn.Module], cross: list[nn.Module], encoder: list[nn.Module]) -> None:
        """Take in which modules attend."""
        self.modules = (own, cross, encoder)

    @property
    def position_offset(self) -> int:
        return self.limits.position_offset

    @property
    def learned_positions(self) -> int | None:
        return self.limits.room

    @abstractmethod
    def open(self, prefix: KV | None, generating: bool = False) -> AbstractContextManager[None]:
        """Inside the block every call of the base model in this thread sees `prefix` (`[N, h, p, k]` per layer).

        `generating`: positions that come along are not the caller's but those of transformers' `generate`.
        """

    @abstractmethod
    def recorded(self, recording: Recording) -> AbstractContextManager[None]:
        """Inside the block the base model is as it is, and what each layer attends to is taken down."""

    @abstractmethod
    def call(self, prefix: KV | None, call: Call) -> Any:
        """One call of the base model that sees `prefix`."""

    def check_room(self, positions: Tensor | None, known: int | None) -> None:
        """ConfigError where positions end: before a table is read beyond its end.

        `known` is how many tokens there are at most, as far as that is known without looking at values, which a GPU
        would have to wait for.
        """
        if self.fits(known):
            return
        last = known if positions is None else int(positions.max()) + 1
        if last is not None and self.limits.room is not None and last > self.limits.room:
            raise ConfigError(
                f"{last} tokens, the virtual ones included, do not fit into this model's {self.limits.room} positions; "
                "shorten the text or use fewer virtual tokens."
            )

    def check_holes(self, call: Call, generating: bool) -> None:
        """ConfigError for padding between a row's tokens where distances are counted by columns.

        A step of `generate` adds one token to rows that its first call has shown.
        """
        mask, reach = call.flat_mask, self.limits.reach
        if mask is None or reach is None or mask.shape[1] <= reach or torch.compiler.is_compiling():
            return
        if generating and call.rows.shape[1] == 1:
            return
        real = mask != 0
        begins = (real[:, 1:] & ~real[:, :-1]).sum(dim=1) + real[:, 0]
        if bool((begins > 1).any()):
            raise ConfigError(
                f"attention_mask hides tokens between the real ones of row {int(begins.argmax())}, but "
                f"{type(self.base).__name__} counts how far tokens are apart by columns; leave these tokens out and "
                "pad all rows on one side."
            )

    def fits(self, known: int | None) -> bool:
        """Whether so many tokens fit for certain."""
        room = self.limits.room
        return room is None or (known is not None and known <= room)
