"""The plain formulation of every prompt, one row at a time, without padding: what everything is compared with.

An embedding prompt is concatenated in front of the embedded row (of the encoder's input on encoder-decoders); a KV
prefix is put into the `past_key_values` of the decoder, or, on encoders, concatenated to keys and values in an
attention function written out by hand. Everything else is the base model with its own defaults.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from softprompt import KV, Embeddings, SoftPromptModel


def rows(batch: dict[str, Tensor]) -> list[Tensor]:
    """The real tokens of each row, `[1, t]`."""
    return [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def run(base: PreTrainedModel, prompt: Embeddings | KV, ids: Tensor, **more: Any) -> ModelOutput:
    """The base model's output for one row `ids` `[1, t]` and its prompt; embedding prompts cover p more columns."""
    if isinstance(prompt, KV):
        with keys_in_front(base, prompt):
            return base(input_ids=ids, **more)
    embedded = torch.cat([prompt.vectors, base.get_input_embeddings()(ids)], dim=1)
    if not encodes_and_decodes(base):
        return base(inputs_embeds=embedded, **more)
    encoded = base.get_encoder()(inputs_embeds=embedded, return_dict=True)
    seen = torch.ones(embedded.shape[:2], dtype=torch.long)
    # some heads give the decoder the row itself, shifted; with a target of its own the row is not needed any more
    given = {} if {"decoder_input_ids", "labels"} & more.keys() else {"input_ids": ids}
    return base(**given, encoder_outputs=encoded, attention_mask=seen, **more)


def encodes_and_decodes(base: PreTrainedModel) -> bool:
    """Whether there is a decoder behind an encoder (T5's token classifier, say, has none)."""
    return base.config.is_encoder_decoder and any(name.endswith("decoder") for name, _ in base.named_modules())


@contextmanager
def keys_in_front(base: PreTrainedModel, prefix: KV) -> Iterator[None]:
    """Inside the block the base model sees the prefix, for one row without padding."""
    both_ways = not base.config.is_encoder_decoder and _both_ways(base)
    with (by_hand if both_ways else prefilled)(base, prefix):
        yield


@torch.no_grad()
def _both_ways(base: PreTrainedModel) -> bool:
    """Whether the first token's state depends on the second token."""
    states = [base.base_model(input_ids=torch.tensor([pair]))[0][0, 0] for pair in ((5, 6), (5, 7))]
    return not torch.allclose(*states, atol=1e-4)


@contextmanager
def prefilled(base: PreTrainedModel, prefix: KV) -> Iterator[None]:
    """Every call of the (first) decoder gets a cache that holds the prefix."""
    both = base.config.is_encoder_decoder
    body = base.get_decoder()

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache: Any = in_cache(base, prefix)
        if both:
            return args, {**kwargs, "past_key_values": EncoderDecoderCache(cache, DynamicCache())}
        ids = args[0] if args else kwargs["input_ids"]
        seen = torch.ones(1, prefix.length + ids.shape[1], dtype=torch.long)
        return args, {**kwargs, "past_key_values": cache, "attention_mask": seen}

    handle = body.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def in_cache(base: PreTrainedModel, prefix: KV) -> DynamicCache:
    """A new cache with the prefix in its attention layers."""
    config = base.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(prefix.layers)
    attending = [index for index, kind in enumerate(kinds) if kind.endswith("attention") and "linear" not in kind]
    for index, (key, value) in zip(attending, prefix.layers, strict=True):
        cache.update(key, value, index)
    return cache


@contextmanager
def by_hand(base: PreTrainedModel, prefix: KV) -> Iterator[None]:
    """Attention of an encoder written out, softmax(q [Pk; k]ᵀ·s) [Pv; v], with the row at positions p, p + 1, …"""
    pairs = iter(())

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        more_key, more_value = next(pairs)
        key, value = torch.cat([more_key, key], dim=2), torch.cat([more_value, value], dim=2)
        scores = scaling * query @ key.transpose(2, 3)
        window = kwargs.get("sliding_window")
        if window is not None:
            distance = torch.arange(key.shape[2])[-query.shape[2] :, None] - torch.arange(key.shape[2])
            scores = scores.masked_fill(distance.abs() >= window, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    def moved(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal pairs
        pairs = iter(prefix.layers)
        first = prefix.length + (base.config.pad_token_id + 1 if base.config.model_type == "roberta" else 0)
        return args, {**kwargs, "position_ids": first + torch.arange(kwargs["input_ids"].shape[1])[None]}

    AttentionInterface.register("naive", attend)
    handle, before = base.register_forward_pre_hook(moved, with_kwargs=True), base.config._attn_implementation
    base.config._attn_implementation_internal = "naive"
    try:
        yield
    finally:
        handle.remove()
        base.config._attn_implementation_internal = before


# ---- language models ---------------------------------------------------------------------------------------------


def logits(model: SoftPromptModel, row: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits of the row's real tokens `[1, t, V]`, and of the last virtual token `[1, 1, V]` where there is one."""
    prompt = model.encoder().prompt()
    out = run(model.get_base_model(), prompt, row).logits
    if isinstance(prompt, KV):
        return out, None
    return out[:, prompt.length :], out[:, prompt.length - 1 : prompt.length]


def loss(model: SoftPromptModel, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy over every label that is not −100 and has a token (real or virtual) before it."""
    total, count = torch.zeros(()), 0
    for row, row_labels, mask in zip(rows(batch), labels, batch["attention_mask"], strict=True):
        out, first = logits(model, row)
        real = row_labels[mask.bool()]
        predicting = torch.cat([first, out], dim=1)[0, :-1] if first is not None else out[0, :-1]
        target = real if first is not None else real[1:]
        total = total + cross_entropy(predicting, target, ignore_index=-100, reduction="sum")
        count += int((target != -100).sum())
    return total / count


def greedy(model: SoftPromptModel, row: Tensor, steps: int) -> Tensor:
    """The next `steps` tokens by recomputing the whole row each time."""
    for _ in range(steps):
        out, _ = logits(model, row)
        row = torch.cat([row, out[:, -1:].argmax(-1)], dim=1)
    return row[:, -steps:]


def decode(model: SoftPromptModel, row: Tensor, steps: int) -> Tensor:
    """The next `steps` tokens of an encoder-decoder, by recomputing everything each time."""
    base, prompt = model.get_base_model(), model.encoder().prompt()
    written = torch.tensor([[base.config.decoder_start_token_id]])
    for _ in range(steps):
        out = run(base, prompt, row, decoder_input_ids=written).logits
        written = torch.cat([written, out[:, -1:].argmax(-1)], dim=1)
    return written[:, 1:]
