"""The attention door: every attention layer sees p extra keys and values in front of its own.

The door is a function registered with transformers' `AttentionInterface` that wraps the backend the user chose. While
it is open for one call of the model, the layers get the prefix and real tokens stand at positions p, p+1, …; the
cache and the attention mask know only real tokens. Closed, the model is exactly as it was.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from softprompt.doors.opening import Opening, Recording, current, entered
from softprompt.doors.positions import true_positions
from softprompt.doors.routing import routed
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.prompt import KV


class AttentionDoor:
    """The door of one base model.

    `modules` are its attention modules, in order, once `Geometry` has been probed: self-attention (an
    encoder-decoder's decoder), cross-attention, encoder.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.modules: tuple[list[nn.Module], list[nn.Module], list[nn.Module]] = ([], [], [])
        self.sharing: dict[nn.Module, nn.Module] = {}
        self.tables: dict[nn.Module, Any] = {}
        self.encoder_decoder = is_encoder_decoder(base)
        self.text = text_decoder(base)
        self.takes_positions = "position_ids" in inspect.signature(self.text.forward).parameters
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.position_offset = 0
        self.learned_positions: int | None = None
        self._configs = _configs(base)
        self._checkpointed = [each for each in base.modules() if "gradient_checkpointing" in dir(each)]

    def bind(self, own: list[nn.Module], cross: list[nn.Module], encoder: list[nn.Module]) -> None:
        """Take in which modules attend, and where T5-like ones find their position table (one for a whole stack)."""
        self.modules = (own, cross, encoder)
        if not any(self.modules):
            self._configs = []  # code that asks for its backend by name, as Falcon's does, is left alone
        for stack in (own, encoder):
            table = None
            for module in stack:
                table = module if getattr(module, "has_relative_attention_bias", False) else table
                if table is not None:
                    self.tables[module] = table

    @contextmanager
    def open(self, prefix: KV | None, recording: Recording | None = None, generating: bool = False) -> Iterator[None]:
        """Inside the block every call of the base model sees `prefix` (`[N, h, p, k]` per layer).

        `generating`: positions that come along are not the caller's but those of transformers' `generate`.
        """
        opening = self._opening(prefix, recording, generating)
        with self._active(opening), self._recomputed(opening):
            hooks = [] if recording is not None else self._hook(opening)
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def call(self, prefix: KV | None, inputs: dict[str, Any]) -> Any:
        """One call of the base model that sees `prefix`, on keyword inputs."""
        if self.text is not self.base or self.encoder_decoder:
            with self.open(prefix):
                return self.base(**inputs)
        opening = self._opening(prefix)
        if self.takes_positions:
            inputs = self._shifted(opening, inputs)
        with self._active(opening), self._recomputed(opening):
            output = self.base(**inputs)
        if torch.compiler.is_compiling() and len(opening.runs) < len(opening.pairs):
            raise UnsupportedError(
                f"{type(self.base).__name__} cannot take a prefix when it is compiled; call it as it is."
            )
        return output

    def _opening(self, prefix: KV | None, recording: Recording | None = None, generating: bool = False) -> Opening:
        return Opening(
            prefix, self._pairs(prefix), self.tables, recording, generating=generating, sharing=bool(self.sharing)
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

    def _hook(self, opening: Opening) -> list[RemovableHandle]:
        """What moves real tokens behind the prefix: positions given to the model, or read by its decoder."""
        if not self.encoder_decoder:
            shift = self._shift_positions(opening)
            return [self.text.register_forward_pre_hook(shift, with_kwargs=True)] if self.takes_positions else []
        hooks = [self.base.register_forward_pre_hook(self._note_seen(opening), with_kwargs=True)]
        for table in self._decoder_tables():
            hooks.append(table.register_forward_pre_hook(self._shift_decoder(opening), with_kwargs=True))
            if opening.prefix is not None and opening.prefix.lengths is not None:
                hooks.append(table.register_forward_hook(_by_rows(opening), with_kwargs=True))
        return hooks

    def _decoder_tables(self) -> list[nn.Module]:
        """The position tables of a BART-like decoder."""
        if not self.encoder_decoder:
            return []
        return [each for name, each in self.base.get_decoder().named_modules() if name == "embed_positions"]

    def _note_seen(self, opening: Opening) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            if current() is opening:
                opening.begin()
                seen = cache.get_seq_length() if cache is not None else 0
                opening.seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts in place

        return hook

    def _shift_decoder(self, opening: Opening) -> Callable[..., Any]:
        """A pre-hook on the position table of a BART-like decoder, which is called with `position_ids` `[T]`.

        Where prompts differ in length it gets those of all rows in turn, `[B·T]`; `_by_rows` takes them apart.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if current() is not opening or not opening.longest:
                return None
            positions = kwargs.get("position_ids")
            if not isinstance(positions, Tensor):
                raise UnsupportedError(
                    f"the decoder of {type(self.base).__name__} is told no positions, so its tokens cannot be moved "
                    "behind a prefix; set decoder_prefix=False, or train prompt_tuning."
                )
            positions = positions + opening.shift(_rows_of(args, opening), positions.device)
            self._check_room(positions, _sum(opening.longest, opening.seen, positions.shape[-1]))
            return args, {**kwargs, "position_ids": positions.flatten()}

        return hook

    @contextmanager
    def _active(self, opening: Opening) -> Iterator[None]:
        """Route attention through the door and make the opening the current one; undo both."""
        with routed(self.base, self._configs), entered(opening):
            yield

    def _shift_positions(self, opening: Opening) -> Callable[..., Any]:
        """A pre-hook on the base model: positions counted from the mask, moved behind the prefix.

        A multimodal model may give its text decoder several positions per token, `[3|4, B, T]`.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if current() is not opening:  # another thread's call of the same model
                return args, kwargs
            return args, self._shifted(opening, kwargs, args[0] if args else None)

        return hook

    def _shifted(self, opening: Opening, kwargs: dict[str, Any], ids: Tensor | None = None) -> dict[str, Any]:
        """The inputs of a call with the positions of its tokens; `ids` are its ids if they are not among them."""
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        inputs = ids if inputs is None else inputs
        assert inputs is not None
        given, mask, cache = (kwargs.get(name) for name in ("position_ids", "attention_mask", "past_key_values"))
        if opening.generating and self.position_offset:
            given = None  # counted from 0 there, which such a model's own positions are not
        positions = true_positions(inputs, mask, cache) if given is None else given
        positions = positions + opening.shift(inputs.shape[0], positions.device)
        if given is not None and self.position_offset:
            positions = positions - self.position_offset
        longest: int | None = None
        if given is None or opening.generating:
            seen = 0 if cache is None or isinstance(mask, Tensor) else cache.get_seq_length()
            longest = _sum(opening.longest, seen, mask.shape[-1] if isinstance(mask, Tensor) else inputs.shape[1])
        self._check_room(positions, longest)
        opening.begin(positions if positions.ndim < 3 else positions[0], None if longest is None else longest - 1)
        return {**kwargs, "position_ids": positions + self.position_offset if self.position_offset else positions}

    def _check_room(self, positions: Tensor, longest: int | None) -> None:
        """Learned positions end: say so before the table is read beyond its end.

        `longest` is what is known without looking at the values, which a GPU would have to wait for.
        """
        limit = self.learned_positions
        if limit is None or (longest is not None and longest <= limit) or torch.compiler.is_compiling():
            return  # (compiled code reads the table with checks of its own)
        last = int(positions.max())
        if last >= limit:
            raise ConfigError(
                f"{last + 1} tokens, the virtual ones included, do not fit into this model's {limit} learned "
                "positions; shorten the text or use fewer virtual tokens."
            )

    @contextmanager
    def _recomputed(self, opening: Opening) -> Iterator[None]:
        """Make recomputation in the backward pass see this opening, whenever and however checkpointing was enabled.

        The prefix goes along as explicit arguments, so that re-entrant checkpointing gives it gradients as well. While
        recording, layers run without checkpointing (it is short and must keep its graph).
        """
        changed: list[tuple[nn.Module, Callable[..., Any]]] = []
        for module in self._checkpointed:
            run = module.__dict__.get("_gradient_checkpointing_func")
            if run is not None and getattr(module, "gradient_checkpointing", False):
                changed.append((module, run))
                direct = opening.recording is not None
                module.__dict__["_gradient_checkpointing_func"] = _direct if direct else self._bound(run, opening)
        try:
            yield
        finally:
            for module, run in changed:
                module.__dict__["_gradient_checkpointing_func"] = run

    def _bound(self, run: Callable[..., Any], opening: Opening) -> Callable[..., Any]:
        prefix = opening.prefix
        tensors = [part for pair in prefix.pairs for part in pair] if prefix is not None else []

        def checkpointed(layer: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if current() is not opening:
                return run(layer, *args, **options)
            positions, seen, before = opening.positions, opening.seen, dict(opening.runs)

            def replay(*everything: Any) -> Any:
                given, parts = everything[: len(args)], iter(everything[len(args) :])
                again = None if prefix is None else prefix.map(lambda _: next(parts))
                inner = Opening(again, self._pairs(again), self.tables, positions=positions, seen=seen)
                inner.runs = dict(before)
                with self._active(inner):
                    output = layer(*given)
                opening.runs.update(inner.runs)
                return output

            return run(replay, *args, *tensors, **options)

        return checkpointed


def _rows_of(args: tuple[Any, ...], opening: Opening) -> int:
    """How many rows a position table is called for, with their ids, their shape, or None for rows of vectors."""
    given = args[0] if args else None
    if given is None:
        rows = None if opening.prefix is None else opening.prefix.rows
        return 1 if rows is None else len(rows)
    return len(given) if isinstance(given, Tensor) else int(given[0])


def _by_rows(opening: Opening) -> Callable[..., Any]:
    """A hook on a position table that `_shift_decoder` has given all rows' positions: its result as `[B, T, d]`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if current() is not opening or not opening.longest:
            return output
        return output.reshape(_rows_of(args, opening), -1, output.shape[-1])

    return hook


def _sum(prompt: int, seen: Any, columns: int) -> int | None:
    """How many tokens there are; None where a static cache counts on the device, which is not waited for."""
    return None if isinstance(seen, Tensor) else prompt + int(seen) + columns


def _direct(layer: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return layer(*args)


def _configs(base: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every distinct config object that a part of the model reads its attention backend from."""
    found: dict[int, PreTrainedConfig] = {}
    for module in base.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


def text_decoder(base: PreTrainedModel) -> nn.Module:
    """The part of a model that positions are given to: the whole, or the text decoder behind images and sounds."""
    multimodal = base.config.get_text_config() is not base.config and not base.config.is_encoder_decoder
    return base.get_decoder() if multimodal else base


def is_encoder_decoder(base: PreTrainedModel) -> bool:
    """Whether a model has both stacks; T5 for tokens, say, keeps only the encoder of its config."""
    return bool(base.config.is_encoder_decoder) and "decoder_input_ids" in inspect.signature(base.forward).parameters
