"""The cache door: the prefix reaches the layers through the cache they read, on families without AttentionInterface.

Bloom, MPT, Falcon and GPT-J attend in code of their own, but every layer hands its keys and values to the cache and
attends to what it gets back. While the door is open for one call, that cache is a stand-in which puts the prefix before
the real tokens. The caller's cache, and so generation, beams and static caches, hold real tokens only.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from softprompt.doors.attending import BACKENDS
from softprompt.doors.attention import AttentionDoor
from softprompt.doors.lengths import own_lengths
from softprompt.doors.opening import Recording
from softprompt.doors.positions import true_positions
from softprompt.doors.prefixed_cache import (
    PrefixedCache,
    additive,
    count_columns,
    filled,
    left_padding,
    of_sequences,
    widen,
)
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.inputs import packed
from softprompt.prompt import KV

CACHE_NAMES = ("layer_past", "past_key_values")
"""What layers call their cache; transformers sets it to None under gradient checkpointing."""


@dataclass
class Opening:
    """One use of the door; `cache` is the stand-in of its latest call."""

    prefix: KV | None
    recording: Recording | None = None
    cache: PrefixedCache | None = None
    generating: bool = False


_OPENING: ContextVar[Opening | None] = ContextVar("softprompt_cache_opening", default=None)


class CacheDoor:
    """The door of one base model. `modules` are its attention modules, in order, once `Geometry` has been probed.

    It stands at the model's body, which every head calls. `learned_positions` is how many tokens the body has room
    for, where it ends.
    """

    encoder_decoder = False

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.body = _body(base)
        self.modules: tuple[list[nn.Module], list[nn.Module], list[nn.Module]] = ([], [], [])
        self._names = list(inspect.signature(self.body.forward).parameters)
        self.takes_positions = "position_ids" in self._names
        self._reads_positions = self.takes_positions and "position_ids" in inspect.signature(base.forward).parameters
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.position_offset = 0
        self.learned_positions: int | None = _room(self.body)
        self.takes_square_masks = True

    def bind(self, own: list[nn.Module], cross: list[nn.Module], encoder: list[nn.Module]) -> None:
        """Take in which modules attend."""
        self.modules = (own, cross, encoder)

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """UnsupportedError unless tokens put through the door do what they do in the row; `ids` `[1, 2]` are any two.

        Tried with and without padding on the left, since a family may count positions in ways of its own.
        """
        first, rest = ids[:, [0, 1, 1]], ids[:, [1, 0]]
        whole = self.body(input_ids=torch.cat([first, rest], dim=1), use_cache=False, return_dict=True)[0][0, -2:]
        recording = Recording()
        with self.open(None, recording):
            self.body(input_ids=first, use_cache=False, return_dict=True)
        for padding in (0, 3):
            row = torch.cat([first[:, :padding], rest], dim=1)
            mask = torch.ones_like(row)
            mask[:, :padding] = 0
            with self.open(KV(tuple(recording.layers))):
                parts = self.body(input_ids=row, attention_mask=mask, use_cache=False, return_dict=True)[0][0, -2:]
            tolerance = 1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.1
            if not bool((parts - whole).float().norm() <= tolerance * whole.float().norm()):
                raise UnsupportedError(
                    f"{type(self.base).__name__} does not attend through transformers' AttentionInterface, and keys "
                    "and values in its cache do not do what tokens do; use a family such as gpt2, llama, mistral, "
                    "qwen, gemma, opt, bloom, mpt, falcon or gptj."
                )
        self.takes_square_masks = self._takes(of_sequences(torch.arange(2, device=ids.device)[None]), ids)

    def _takes(self, mask: Tensor, ids: Tensor) -> bool:
        """Whether the body runs with a mask; some count the positions of ALiBi from one of two dimensions."""
        try:
            self.body(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
        except (ValueError, RuntimeError):
            return False
        return True

    @contextmanager
    def open(self, prefix: KV | None, recording: Recording | None = None, generating: bool = False) -> Iterator[None]:
        """Inside the block every call of the base model sees `prefix`; arguments as at the attention door."""
        backend = _backend(self.body)
        if backend not in BACKENDS:
            raise UnsupportedError(
                f"attention backend {backend!r} cannot take a prefix on {type(self.base).__name__}; load it with "
                "attn_implementation='sdpa' or 'eager'."
            )
        opening = Opening(prefix if prefix is not None and prefix.layers else None, recording, generating=generating)
        with ExitStack() as stack:
            attending = self._attending(stack) if recording is not None else None
            if not self._reads_positions:
                stack.callback(self.base.register_forward_pre_hook(self._refuse_packed, with_kwargs=True).remove)
            enter = self._enter(opening, attending)
            stack.callback(self.body.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(self.body.register_forward_hook(self._leave(opening)).remove)
            stack.callback(self._checkpointing(opening))
            token = _OPENING.set(opening)
            stack.callback(_OPENING.reset, token)
            yield

    def call(self, prefix: KV | None, inputs: dict[str, Any]) -> Any:
        """One call of the base model that sees `prefix`, on keyword inputs."""
        with self.open(prefix):
            return self.base(**inputs)

    def _refuse_packed(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook on a model that ignores positions, and so would let one sequence see another."""
        if _OPENING.get() is not None and packed(kwargs):
            raise ConfigError(
                f"{type(self.base).__name__} takes no position_ids, so a row cannot hold several sequences; give each "
                "a row of its own."
            )

    def _attending(self, stack: ExitStack) -> Callable[[int], nn.Module]:
        """Which module fills a layer of the cache: known once probed, until then the innermost one that runs."""
        if self.modules[0]:
            return self.modules[0].__getitem__
        running: list[nn.Module] = []

        def entered(module: nn.Module, _: Any) -> None:
            running.append(module)

        def left(*_: Any) -> None:
            running.pop()

        for module in self.body.modules():
            stack.callback(module.register_forward_pre_hook(entered).remove)
            stack.callback(module.register_forward_hook(left).remove)
        return lambda _: running[-1]

    def _enter(self, opening: Opening, attending: Callable[[int], nn.Module] | None) -> Callable[..., Any]:
        """A pre-hook on the body: the stand-in for the cache, and mask and positions to match."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            call = {**dict(zip(self._names, args, strict=False)), **kwargs}
            ids, embedded = call.get("input_ids"), call.get("inputs_embeds")
            inputs = ids if embedded is None else embedded
            if _OPENING.get() is not opening or inputs is None:  # another thread's call, or one the model refuses
                return args, kwargs
            if opening.recording is not None:
                opening.cache = PrefixedCache(None, None, recording=opening.recording, attending=attending)
                return (), {**call, "past_key_values": opening.cache, "use_cache": False, "return_dict": True}
            return (), {**call, **self._place(opening, call, inputs)}

        return hook

    def _place(self, opening: Opening, call: dict[str, Any], inputs: Tensor) -> dict[str, Any]:
        """The arguments of a call `inputs` `[B, T]` or `[B, T, d]` that change while the door is open."""
        own, prefix = self._own_cache(call), opening.prefix
        mask, given = call.get("attention_mask"), call.get("position_ids")
        if isinstance(given, Tensor) and packed({"position_ids": given, "attention_mask": mask}) and not filled(own):
            mask = of_sequences(given)
        if isinstance(mask, Tensor) and mask.ndim == 4 and not self.takes_square_masks:
            raise ConfigError(
                f"{type(self.base).__name__} counts positions from the attention_mask, so it takes one of two "
                f"dimensions, not {tuple(mask.shape)}; give each sequence a row of its own, and no static cache."
            )
        length = 0 if prefix is None else prefix.length
        lengths = None if prefix is None else own_lengths(prefix, inputs.shape[0], inputs.device)
        columns = count_columns(own, inputs.shape[1])
        changed: dict[str, Any] = {}
        positions: Tensor | None = None
        if self.takes_positions:
            if opening.generating and self.position_offset:
                given = None  # counted from 0 there, which such a model's own positions are not
            known = isinstance(given, Tensor)
            positions = given - self.position_offset if known else true_positions(inputs, mask, own)
            positions = positions + (length if lengths is None else lengths[:, None])
            changed["position_ids"] = positions + self.position_offset
        self._check_room(length + columns, positions)
        if prefix is None:
            return changed
        if mask is None and lengths is not None:
            seen = 0 if own is None else int(own.get_seq_length())
            mask = torch.ones(inputs.shape[0], seen + inputs.shape[1], dtype=torch.long, device=inputs.device)
        padding = None if mask is None else left_padding(mask)
        returned = call.get("past_key_values") if own is None else own
        wanted = call.get("return_dict")
        wanted = self.body.config.return_dict if wanted is None else wanted
        opening.cache = PrefixedCache(own, prefix, padding, returned, as_tuple=not wanted)
        if mask is not None:
            mask = mask if _backend(self.body) != "eager" else additive(mask, self.body.dtype)
            mask = widen(mask, prefix, lengths, padding)
        return {**changed, "past_key_values": opening.cache, "attention_mask": mask, "return_dict": True}

    def _own_cache(self, call: dict[str, Any]) -> Any:
        """The cache that takes in this call's real tokens: the caller's, a new one, or none."""
        given, use = call.get("past_key_values"), call.get("use_cache")
        if self.body.training and getattr(self.body, "gradient_checkpointing", False):
            if filled(given):
                raise ConfigError(
                    "past_key_values cannot be used under gradient checkpointing, where transformers drops them; call "
                    "model.eval(), or pass the whole row without a cache."
                )
            return None
        use = getattr(self.body.config, "use_cache", False) if use is None else use
        return DynamicCache(config=self.body.config) if given is None and use else given

    def _check_room(self, tokens: int, positions: Tensor | None) -> None:
        """Say that tokens do not fit before a table is read beyond its end; values are looked at only if need be."""
        limit = self.learned_positions
        if limit is None or tokens <= limit:
            return
        if positions is not None:
            tokens = int(positions.max()) + 1
        if tokens > limit:
            raise ConfigError(
                f"{tokens} tokens, the virtual ones included, do not fit into this model's {limit} positions; shorten "
                "the text or use fewer virtual tokens."
            )

    def _leave(self, opening: Opening) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if _OPENING.get() is not opening or opening.cache is None:
                return output
            return opening.cache.leave(output)

        return hook

    def _checkpointing(self, opening: Opening) -> Callable[[], None]:
        """Put the stand-in back where transformers drops the cache, whenever and however checkpointing was enabled."""
        changed: list[tuple[nn.Module, Callable[..., Any]]] = []
        for module in self.body.modules():
            run = module.__dict__.get("_gradient_checkpointing_func")
            if run is not None and getattr(module, "gradient_checkpointing", False):
                changed.append((module, run))
                module.__dict__["_gradient_checkpointing_func"] = self._bound(run, opening)

        def undo() -> None:
            for module, run in changed:
                module.__dict__["_gradient_checkpointing_func"] = run

        return undo

    def _bound(self, run: Callable[..., Any], opening: Opening) -> Callable[..., Any]:
        """Run a layer with the stand-in, in the backward pass too.

        The prefix goes along as explicit arguments, so that re-entrant checkpointing gives it gradients as well. A
        recording is short and must keep its graph, so there the layer runs directly.
        """

        def checkpointed(layer: partial[Any], *args: Any, **options: Any) -> Any:
            cache = opening.cache
            if _OPENING.get() is not opening or cache is None:
                return run(layer, *args, **options)
            if cache.prefix is None:
                return _with_cache(layer, cache)(*args)
            prefix = cache.prefix
            tensors = [part for pair in prefix.layers for part in pair]

            def replay(*everything: Any) -> Any:
                given, parts = everything[: len(args)], iter(everything[len(args) :])
                return _with_cache(layer, cache.of(prefix.map(lambda _: next(parts))))(*given)

            return run(replay, *args, *tensors, **options)

        return checkpointed


Door = AttentionDoor | CacheDoor


def _with_cache(layer: partial[Any], cache: PrefixedCache) -> Callable[..., Any]:
    """A layer's bound call with a cache under the name it takes one by."""
    name = next((each for each in CACHE_NAMES if each in layer.keywords), None)
    if name is None:
        raise UnsupportedError(
            "a layer of this model takes no cache by name, so gradient checkpointing would lose the prefix; turn "
            "gradient checkpointing off."
        )
    return partial(layer.func, *layer.args, **{**layer.keywords, name: cache})


def fills_cache(base: PreTrainedModel) -> bool:
    """Whether the model's body takes a cache, which the door needs."""
    return "past_key_values" in inspect.signature(_body(base).forward).parameters


def _body(base: PreTrainedModel) -> PreTrainedModel:
    body = base.base_model
    assert isinstance(body, PreTrainedModel)
    return body


def _backend(body: PreTrainedModel) -> str:
    return body.config._attn_implementation or "eager"


def _room(body: PreTrainedModel) -> int | None:
    """How many tokens a body has room for: the rows of its fixed table of positions, or the width of MPT's bias."""
    for name, table in body.named_buffers():
        if name.endswith("embed_positions"):
            return table.shape[0]
    return getattr(body.config, "max_seq_len", None)
