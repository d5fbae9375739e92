"""The judges of a prefix: what a model is to say with the keys and values of real tokens in front."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask
from trial_tools import TOKENS, NotHere, Pairs, difference, first_line

import softprompt
from softprompt import KV, SoftPromptModel

if TYPE_CHECKING:
    from trial import Subject


@dataclass
class Pick:
    """What of a model's output is compared.

    `also` is as good as what the tokens give, where more than attention joins them, and only attention sees a prefix.
    """

    per_token: bool
    states: bool = False
    also: list[Tensor] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        return {"output_hidden_states": True} if self.states else {}

    def __call__(self, output: Any) -> Tensor:
        return output.hidden_states[-1] if self.states else output.logits


class Prefixes:
    """Keys and values of the prompt's tokens, put into a model's prefix, and what the model is then to say."""

    def __init__(self, subject: Subject, model: SoftPromptModel) -> None:
        self.subject, self.model, self.states = subject, model, False

    def wanted(self, number: int) -> tuple[Tensor, Pick]:
        subject = self.subject
        if subject.decodes or (subject.encodes and subject.kind == "sequence"):
            return self._of_decoder(number)
        if _causal(subject):
            return self._of_causal(number)
        return self._of_encoder(number)

    def _start(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.model.encoder().start_from(KV(tuple(pairs)).flat().float())

    def _of_causal(self, number: int) -> tuple[Tensor, Pick]:
        """Of a decoder: the tokens' keys and values depend on no row."""
        subject = self.subject

        def tokenizer(_: str) -> dict[str, list[int]]:
            return {"input_ids": subject.prompt[0].tolist()}

        softprompt.initialize_kv_prefix_from_text(self.model, tokenizer, text="these tokens")
        kept = self._kept()
        if kept is None:
            return subject.whole[number], Pick(subject.per_token)
        self.states = True  # only attention sees the prefix: the judge is the bare model behind a cache of it
        base = subject.fresh()  # some keep the state that they came to in themselves
        row = subject.rows[number]
        mask = torch.ones(1, TOKENS + row.shape[1], dtype=torch.long)
        more: dict[str, Any] = {}
        if "position_ids" in inspect.signature(base.forward).parameters:
            more["position_ids"] = TOKENS + torch.arange(row.shape[1])[None]
        with torch.no_grad():
            try:
                output = base(input_ids=row, attention_mask=mask, past_key_values=kept, **more).logits[0]
            except Exception as error:
                raise NotHere(f"the bare model takes no such cache: {first_line(error)}") from error
        return output, Pick(subject.per_token)

    @torch.no_grad()
    def _kept(self) -> Any:
        """A cache that holds the tokens in its attention layers alone, where there are other layers; else None."""
        base = self.subject.base
        try:
            full = base.base_model(input_ids=self.subject.prompt, use_cache=True).past_key_values
            layers = full.layers
        except Exception as error:
            if base._is_stateful:
                raise NotHere("the bare model keeps its cache to itself") from error
            return None
        states = base._is_stateful or any(_has_state(layer) for layer in layers)
        if not states and type(full) is DynamicCache:
            return None
        plain = type(full) is DynamicCache
        kept = DynamicCache(config=base.config.get_text_config(decoder=True)) if plain else type(full)()
        for index, layer in enumerate(layers):
            if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel():
                kept.update(layer.keys[:, :, :TOKENS], layer.values[:, :, :TOKENS], index)
        return kept

    @torch.no_grad()
    def _of_decoder(self, number: int) -> tuple[Tensor, Pick]:
        """Of an encoder-decoder: the tokens stand in front of the decoder's own, so they depend on the row read."""
        subject, row = self.subject, self.subject.rows[number]
        if not subject.decodes:
            raise NotHere("this head's decoder reads the row itself")
        written = torch.cat([subject.prompt, subject.written[number]], dim=1)
        output = subject.base(input_ids=row, attention_mask=torch.ones_like(row), decoder_input_ids=written)
        cache = getattr(output.past_key_values, "self_attention_cache", None)
        if cache is None:
            raise NotHere("the bare model's decoder keeps no keys")
        self._start([(layer.keys[:, :, :TOKENS], layer.values[:, :, :TOKENS]) for layer in cache.layers])
        return output.logits[0, TOKENS:], Pick(True)

    @torch.no_grad()
    def _of_encoder(self, number: int) -> tuple[Tensor, Pick]:
        """Of an encoder: the tokens' keys and values, as they are in front of this row."""
        subject = self.subject
        both = torch.cat([subject.prompt, subject.rows[number]], dim=1)
        with recorded(subject.base) as pairs:
            output = subject.base(input_ids=both, attention_mask=torch.ones_like(both), output_hidden_states=True)
        pick = Pick(True, subject.kind == "sequence")
        whole, front = pick(output)[0, TOKENS:], [(key[:, :, :TOKENS], value[:, :, :TOKENS]) for key, value in pairs]
        self._start(front)
        pick.also = [self._by_hand(subject.rows[number], front, pick, offset) for offset in (0, 1, 2)]
        return whole, pick

    def _by_hand(self, row: Tensor, front: Pairs, pick: Pick, offset: int) -> Tensor:
        """The bare model with keys and values in front of its own, its row behind them."""
        base, more = self.subject.base, {}
        if "position_ids" in inspect.signature(base.forward).parameters:
            more["position_ids"] = offset + TOKENS + torch.arange(row.shape[1])[None]
        with recorded(base, front):
            output = base(input_ids=row, attention_mask=torch.ones_like(row), **pick.options, **more)
        return pick(output)[0]


def _has_state(layer: Any) -> bool:
    """Whether a layer of a cache holds anything but keys and values."""
    return not hasattr(layer, "keys") or any("Linear" in kind.__name__ for kind in type(layer).__mro__)


@torch.no_grad()
def _causal(subject: Subject) -> bool:
    """Whether the first token's state does not depend on the second."""
    body, states = subject.base.base_model, []
    for second in (20, 30):
        try:
            states.append(body(input_ids=torch.tensor([[12, second, 14]]))[0][0, 0])
        except Exception as error:
            raise NotHere(f"the bare model's body does not run alone: {first_line(error)}") from error
    return difference(*states) < 1e-4


@contextmanager
def recorded(base: PreTrainedModel, front: Pairs | None = None) -> Iterator[Pairs]:
    """Inside the block every attention layer's keys and values are written down, in order.

    `front`, of one row without padding, stands in front of them, layer by layer.
    """
    pairs: Pairs = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if front is not None:
            more = front[len(pairs)]
            mask = None if mask is None else nn.functional.pad(mask, (more[0].shape[2], 0))
            key, value = torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2)
        pairs.append((key, value))
        own = [getattr(sys.modules[kind.__module__], "eager_attention_forward", None) for kind in type(module).__mro__]
        return next(each for each in own if each is not None)(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("trial", attend)
    AttentionMaskInterface.register("trial", eager_mask)
    configs = {id(part.config): part.config for part in base.modules() if isinstance(part, PreTrainedModel)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation_internal = "trial"
    try:
        yield pairs
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
