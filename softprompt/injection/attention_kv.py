"""The attention way: every attention layer sees p extra keys and values in front of its own.

It goes through a function registered with transformers' `AttentionInterface` that wraps the backend the user chose
(`interface`). While a scope is open, the layers get the prefix and real tokens stand at positions p, p+1, …; the cache
and the attention mask know only real tokens. Closed, the model is exactly as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.call import Call
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.injection.checkpointing import recomputed, run_checkpointed
from softprompt.injection.contract import Way
from softprompt.injection.interface import routed
from softprompt.injection.positions import true_positions
from softprompt.injection.scope import Recording, Scope, apart, entered
from softprompt.prompt import KV


@final
class AttentionWay(Way):
    """Through the attention interface."""

    name = "attention"

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base)
        self.tables: dict[nn.Module, Any] = {}
        self.encoder_decoder = is_encoder_decoder(base)
        self.text = text_decoder(base)
        self.takes_positions = api.takes(self.text.forward, "position_ids")
        self._chunked = self._tempered = False
        self._configs = api.configs_of(base)
        self._checkpointed = [each for each in base.modules() if api.can_checkpoint(each)]

    def bind(self, own: list[nn.Module], cross: list[nn.Module], encoder: list[nn.Module]) -> None:
        """Take in which modules attend, and where T5-like ones find their position table (one for a whole stack)."""
        super().bind(own, cross, encoder)
        self._chunked = any(api.chunk_of(module) for module in own)
        self._tempered = any(api.tempers(module) for module in own)
        if not any(self.modules):
            self._configs = []  # code that asks for its backend by name, as Falcon's does, is left alone
        for stack in (own, encoder):
            table = None
            for module in stack:
                table = module if api.has_relative_table(module) else table
                if table is not None:
                    self.tables[module] = table

    @contextmanager
    def open(self, prefix: KV | None, generating: bool = False) -> Iterator[None]:
        scope = self._scope(prefix, generating=generating)
        self._move(scope)
        with self._active(scope):
            yield

    @contextmanager
    def recorded(self, recording: Recording) -> Iterator[None]:
        with apart(self.base), self._active(self._scope(None, recording)):
            yield

    def call(self, prefix: KV | None, call: Call) -> Any:
        if self.text is not self.base or self.encoder_decoder:
            with self.open(prefix):
                return self.base(**call.keywords(self.base))
        scope = self._scope(prefix)
        if self.takes_positions:
            call = self._shifted(scope, call)
        with self._active(scope):
            output = self.base(**call.keywords(self.base))
        if torch.compiler.is_compiling() and len(scope.runs) < len(scope.pairs):
            raise UnsupportedError(
                f"{type(self.base).__name__} cannot take a prefix when it is compiled; call it as it is."
            )
        return output

    # ---- a scope -----------------------------------------------------------------------------------------------------

    def _scope(self, prefix: KV | None, recording: Recording | None = None, generating: bool = False) -> Scope:
        return Scope(
            prefix,
            self._pairs(prefix),
            self.tables,
            recording,
            generating=generating,
            sharing=bool(self.sharing),
            checkpointed=self._layer_again,
        )

    def _pairs(self, prefix: KV | None) -> dict[nn.Module, list[tuple[Tensor, Tensor]]]:
        """Which layer gets which keys and values."""
        if prefix is None:
            return {}
        parts, found = (prefix.layers, prefix.cross, prefix.encoder), {}
        for modules, pairs in zip(self.modules, parts, strict=True):
            for module, pair in zip(modules, pairs, strict=bool(pairs)):
                found.setdefault(module, []).append(pair)
        return found | {module: found[other] for module, other in self.sharing.items() if other in found}

    @contextmanager
    def _active(self, scope: Scope) -> Iterator[None]:
        """Route attention through ours and make the scope the current one; undo both."""
        recomputed(self._checkpointed)
        with routed(self._configs), entered(scope):
            yield

    def _layer_again(
        self, scope: Scope, run: Callable[..., Any], layer: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        """A checkpointed layer: recomputation sees this scope, whenever it comes."""
        if scope.recording is not None:  # short, and its graph must be kept
            return layer(*args)
        positions, last, seen, before = scope.positions, scope.last, scope.seen, dict(scope.runs)

        def with_prefix(again: KV | None) -> Callable[..., Any]:
            def part(*given: Any) -> Any:
                inner = self._scope(again)
                inner.positions, inner.last, inner.seen, inner.runs = positions, last, seen, dict(before)
                with routed(self._configs), entered(inner):
                    output = layer(*given)
                scope.runs.update(inner.runs)
                return output

            return part

        return run_checkpointed(run, scope.prefix, with_prefix, args, options)

    # ---- positions ---------------------------------------------------------------------------------------------------

    def _move(self, scope: Scope) -> None:
        """Have real tokens moved behind the prefix: by positions given to the model, or read by its decoder."""
        if not self.encoder_decoder:
            if self.takes_positions:
                scope.at(self.text, before=self._shift_positions(scope))
            return
        scope.at(self.base, before=self._note_seen(scope))
        ragged = scope.prefix is not None and scope.prefix.lengths is not None
        for table in api.decoder_tables(self.base):
            scope.at(table, before=self._shift_decoder(scope), after=_by_rows(scope) if ragged else None)

    def _note_seen(self, scope: Scope) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            scope.begin()
            scope.see(api.seen_tokens(Call.to(module, args, kwargs).cache))

        return hook

    def _shift_decoder(self, scope: Scope) -> Callable[..., Any]:
        """Before the position table of a BART-like decoder, which is called with `position_ids` `[T]`.

        Where prompts differ in length it gets those of all rows in turn, `[B·T]`; `_by_rows` takes them apart.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not scope.longest:
                return None
            positions = kwargs.get("position_ids")
            if not isinstance(positions, Tensor):
                raise UnsupportedError(
                    f"the decoder of {type(self.base).__name__} is told no positions, so its tokens cannot be moved "
                    "behind a prefix; set decoder_prefix=False, or train prompt_tuning."
                )
            positions = positions + scope.shift(_rows_of(args, scope), positions.device)
            self.check_room(positions, _sum(scope.longest, scope.seen, positions.shape[-1]))
            return args, {**kwargs, "position_ids": positions.flatten()}

        return hook

    def _shift_positions(self, scope: Scope) -> Callable[..., Any]:
        """Before the model: positions counted from the mask, moved behind the prefix.

        A multimodal model may give its text decoder several positions per token, `[3|4, B, T]`.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (), self._shifted(scope, Call.to(module, args, kwargs)).keywords(module)

        return hook

    def _shifted(self, scope: Scope, call: Call) -> Call:
        """The call with the positions of its tokens."""
        self.check_holes(call, scope.generating)
        rows, given, offset = call.rows, call.positions, self.limits.position_offset
        if scope.generating and offset:
            given = None  # counted from 0 there, which such a model's own positions are not
        if self._chunked and given is not None and call.packed:
            raise ConfigError(
                f"{type(self.base).__name__} attends in chunks, whose borders rows of several sequences (position_ids "
                "that start again) would move; give each sequence a row of its own."
            )
        positions = true_positions(rows, call.mask, call.cache) if given is None else given
        positions = positions + scope.shift(rows.shape[0], positions.device)
        if given is not None and offset:
            positions = positions - offset
        longest: int | None = None
        if given is None or scope.generating:
            masked = isinstance(call.mask, Tensor)
            seen = 0 if masked else api.seen_tokens(call.cache)
            longest = _sum(scope.longest, seen, call.mask.shape[-1] if masked else rows.shape[1])
        if not torch.compiler.is_compiling():  # (compiled code reads a table with checks of its own)
            self.check_room(positions, longest)
        scope.begin(positions if positions.ndim < 3 else positions[0], None if longest is None else longest - 1)
        if self._tempered:
            scope.see(api.seen_tokens(call.cache))
        return call.but(positions=positions + offset if offset else positions)


def _rows_of(args: tuple[Any, ...], scope: Scope) -> int:
    """How many rows a position table is called for, with their ids, their shape, or None for rows of vectors."""
    given = args[0] if args else None
    if given is None:
        rows = None if scope.prefix is None else scope.prefix.rows
        return 1 if rows is None else len(rows)
    return len(given) if isinstance(given, Tensor) else int(given[0])


def _by_rows(scope: Scope) -> Callable[..., Any]:
    """After a position table that `_shift_decoder` has given all rows' positions: its result as `[B, T, d]`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not scope.longest:
            return output
        return output.reshape(_rows_of(args, scope), -1, output.shape[-1])

    return hook


def _sum(prompt: int, seen: Any, columns: int) -> int | None:
    """How many tokens there are; None where a static cache counts on the device, which is not waited for."""
    return None if isinstance(seen, Tensor) else prompt + int(seen) + columns


def text_decoder(base: PreTrainedModel) -> nn.Module:
    """The part of a model that positions are given to: the whole, or the text decoder behind images and sounds."""
    multimodal = api.text_config(base) is not base.config and not base.config.is_encoder_decoder
    return base.get_decoder() if multimodal else base


def is_encoder_decoder(base: PreTrainedModel) -> bool:
    """Whether a model has both stacks; T5 for tokens, say, keeps only the encoder of its config."""
    return bool(base.config.is_encoder_decoder) and api.takes(base.forward, "decoder_input_ids")
