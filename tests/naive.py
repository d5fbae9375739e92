"""The plain formulation of every prompt, one row at a time, without padding: what everything is compared with.

An embedding prompt is concatenated in front of the embedded row (of the encoder's input on encoder-decoders); a KV
prefix is put into the cache of the decoder, or, on encoders, concatenated to keys and values in an attention function
written out by hand. Everything else is the base model with its own defaults, called by keyword.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import hf_cache
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from softprompt import KV, Embeddings, SoftPromptModel


def rows(batch: dict[str, Tensor]) -> list[Tensor]:
    """The real tokens of each row, `[1, t]`."""
    return [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def own_prompt(model: SoftPromptModel, task_ids: Tensor | None = None) -> Embeddings | KV:
    """The prompt of one row in the model's type, `task_ids` `[1]` being its task where the prompt has several."""
    prompt = model.encoder().prompt() if task_ids is None else model.encoder().prompt(task_ids)
    own = model.get_base_model().get_input_embeddings().weight
    if isinstance(prompt, KV):
        return prompt.map(lambda part: part.to(own))
    return replace(prompt, vectors=prompt.per_row(1).to(own), rows=None)


def run(base: PreTrainedModel, prompt: Embeddings | KV, ids: Tensor, first: int = 0, **more: Any) -> ModelOutput:
    """The base model's output for one row `ids` `[1, t]` and its prompt; embedding prompts cover p more columns.

    `first` real tokens stand before an embedding prompt.
    """
    if isinstance(prompt, KV):
        with keys_in_front(base, prompt):
            return base(input_ids=ids, **more)
    words = base.get_input_embeddings()(ids)
    embedded = torch.cat([words[:, :first], prompt.vectors, words[:, first:]], dim=1)
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
    with ExitStack() as stack:
        if encodes_and_decodes(base):
            encoder = prefix.encoder or [None] * base.config.num_hidden_layers
            cross = prefix.cross or [None] * base.get_decoder().config.num_hidden_layers
            if prefix.layers:
                stack.enter_context(prefilled(base, prefix))
            if prefix.encoder or prefix.cross:
                decoder = [call for pair in cross for call in ((None, True), (pair, False))]  # own, cross, own, …
                stack.enter_context(by_hand(base, [(pair, False) for pair in encoder] + decoder))
        elif _both_ways(base):
            stack.enter_context(by_hand(base, [(pair, False) for pair in prefix.layers], shift=prefix.length))
        elif getattr(base.config, "kv_lora_rank", None):  # the cache holds what keys and values are made of
            stack.enter_context(by_hand(base, [(pair, True) for pair in prefix.layers], shift=prefix.length))
        else:
            stack.enter_context(prefilled(base, prefix))
        yield


@torch.no_grad()
def _both_ways(base: PreTrainedModel) -> bool:
    """Whether the first token's state depends on the second token."""
    training = base.training
    base.eval()  # dropout would make them differ as well
    outputs = [base.base_model(input_ids=torch.tensor([pair]), return_dict=True) for pair in ((5, 6), (5, 7))]
    states = [output.last_hidden_state[0, 0] for output in outputs]
    base.train(training)
    return not torch.allclose(*states, atol=1e-4)


@contextmanager
def prefilled(base: PreTrainedModel, prefix: KV) -> Iterator[None]:
    """Every call of the (first) decoder gets a cache that holds the prefix."""
    both, decoder = base.config.is_encoder_decoder, base.get_decoder()

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache: Any = in_cache(base, prefix)
        if both:
            return args, {**kwargs, **hf_cache.given(decoder, EncoderDecoderCache(cache, DynamicCache()))}
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        length = next(each.shape[1] for each in given if each is not None)
        seen = torch.ones(1, prefix.length + length, dtype=torch.long)
        return args, {**kwargs, **hf_cache.given(decoder, cache), "attention_mask": seen}

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def in_cache(base: PreTrainedModel, prefix: KV) -> DynamicCache:
    """A new cache with the prefix in its attention layers."""
    config = base.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(prefix.layers)
    kinds = kinds[: len(kinds) - getattr(config, "num_kv_shared_layers", 0)]  # the last ones read earlier ones' cache
    attending = [index for index, kind in enumerate(kinds) if kind.endswith("attention") and "linear" not in kind]
    for index, (key, value) in zip(attending, prefix.layers, strict=True):
        cache.update(key, value, index)
    return cache


Calls = Sequence[tuple[tuple[Tensor, Tensor] | None, bool]]


@contextmanager
def by_hand(base: PreTrainedModel, calls: Calls, shift: int = 0) -> Iterator[None]:
    """Attention written out, softmax(q [Pk; k]ᵀ·s + b) [Pv; v], with the row at positions `shift`, `shift` + 1, …

    `calls` has, for each attention of one forward pass in order, what stands in front, and whether it is causal.
    """
    order = iter(())

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        (pair, causal), bias = next(order), kwargs.get("position_bias")
        if pair is not None:
            key, value = torch.cat([pair[0], key], dim=2), torch.cat([pair[1], value], dim=2)
            bias = None if bias is None else _wider(base, bias, pair[0].shape[2])
        distance = torch.arange(key.shape[2])[-query.shape[2] :, None] - torch.arange(key.shape[2])
        window = kwargs.get("sliding_window")
        hidden = (distance < 0) & causal if window is None else ((distance < 0) & causal) | (distance.abs() >= window)
        scores = scaling * query @ key.transpose(2, 3) + (0 if bias is None else bias)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal order
        order = iter(calls)
        if not shift or base.config.is_encoder_decoder:
            return args, kwargs
        first = shift + (base.config.pad_token_id + 1 if base.config.model_type == "roberta" else 0)
        return args, {**kwargs, "position_ids": first + torch.arange(kwargs["input_ids"].shape[1])[None]}

    AttentionInterface.register("naive", attend)
    # a part with a config of its own keeps its own setting; not every version reaches all of them from the whole model
    parts = {id(part.config): part for part in base.modules() if isinstance(part, PreTrainedModel)}.values()
    before = [part.config._attn_implementation for part in parts]
    handle = base.register_forward_pre_hook(begin, with_kwargs=True)
    for part in parts:
        part.set_attn_implementation("naive")
    try:
        yield
    finally:
        handle.remove()
        for part, own in zip(parts, before, strict=True):
            part.set_attn_implementation(own)


def _wider(base: PreTrainedModel, bias: Tensor, length: int) -> Tensor:
    """T5's position bias `[1, h, t, u]` with a prefix at −p…−1 before the encoder's row; cross-attention has none."""
    table, width = base.get_encoder().block[0].layer[0].SelfAttention, length + bias.shape[3]
    if not bias.any():
        return bias.new_zeros(*bias.shape[:3], width)
    return table.compute_bias(width, width)[:, :, length:]


# ---- language models ---------------------------------------------------------------------------------------------


def logits(model: SoftPromptModel, row: Tensor, **of_task: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits of the row's real tokens `[1, t, V]`, and of the last virtual token `[1, 1, V]` where there is one."""
    prompt = own_prompt(model, **of_task)
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


def greedy(model: SoftPromptModel, row: Tensor, steps: int, first: int = 0, **of_task: Tensor) -> Tensor:
    """The next `steps` tokens by recomputing the whole row each time."""
    for _ in range(steps):
        out = run(model.get_base_model(), own_prompt(model, **of_task), row, first).logits
        row = torch.cat([row, out[:, -1:].argmax(-1)], dim=1)
    return row[:, -steps:]


def beams(model: SoftPromptModel, row: Tensor, steps: int, count: int, **of_task: Tensor) -> Tensor:
    """The `count` likeliest continuations `[count, steps]` of a beam search of this width, by recomputing all."""
    base, prompt = model.get_base_model(), own_prompt(model, **of_task)
    found = [(0.0, row)]
    for _ in range(steps):
        longer = []
        for score, ids in found:
            chances = run(base, prompt, ids).logits[0, -1].log_softmax(-1)
            longer += [(score + float(chances[token]), torch.cat([ids, token.view(1, 1)], dim=1))
                       for token in chances.topk(count).indices]  # fmt: skip
        found = sorted(longer, key=lambda each: -each[0])[:count]
    return torch.cat([ids[:, -steps:] for _, ids in found])


def decode(model: SoftPromptModel, row: Tensor, steps: int, first: int = 0, **of_task: Tensor) -> Tensor:
    """The next `steps` tokens of an encoder-decoder, by recomputing everything each time."""
    base, prompt = model.get_base_model(), own_prompt(model, **of_task)
    written = torch.tensor([[base.config.decoder_start_token_id]])
    for _ in range(steps):
        out = run(base, prompt, row, first, decoder_input_ids=written).logits
        written = torch.cat([written, out[:, -1:].argmax(-1)], dim=1)
    return written[:, 1:]
