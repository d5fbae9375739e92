"""The plain formulation of every prompt, one row at a time, without padding: what everything is compared with.

An embedding prompt is concatenated in front of the embedded row; a KV prefix is put into `past_key_values`, or, on
encoders, concatenated to keys and values in an attention function written out by hand.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from softprompt import KV, Embeddings, SoftPromptModel


def rows(batch: dict[str, Tensor]) -> list[Tensor]:
    """The real tokens of each row, `[1, t]`."""
    return [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def logits(model: SoftPromptModel, row: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits of the row's real tokens `[1, t, V]`, and of the last virtual token `[1, 1, V]` where there is one."""
    base, prompt = model.get_base_model(), model.encoder().prompt()
    length = prompt.length
    positions = torch.arange(length + row.shape[1])[None]
    if isinstance(prompt, Embeddings):
        embedded = torch.cat([prompt.vectors, base.get_input_embeddings()(row)], dim=1)
        out = base(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
        return out[:, length:], out[:, length - 1 : length]
    cache = in_cache(base, prompt)
    mask = torch.ones(1, length + row.shape[1], dtype=torch.long)
    out = base(input_ids=row, attention_mask=mask, position_ids=positions[:, length:], past_key_values=cache)
    return out.logits, None


def in_cache(base: PreTrainedModel, prefix: KV) -> DynamicCache:
    cache = DynamicCache(config=base.config)
    for index, (key, value) in enumerate(prefix.layers):
        cache.update(key, value, index)
    return cache


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
