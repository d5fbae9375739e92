"""Fold: on a causal model a prompt in front depends on no row, so its keys and values are computed once.

This is exact: the layers see p virtual tokens at positions 0…p−1, as if they stood before every row.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from softprompt.doors.cache import Door
from softprompt.doors.opening import Recording
from softprompt.probe import record, word_table
from softprompt.prompt import KV, Embeddings


def fold(door: Door, prompt: Embeddings) -> KV:
    """Run the virtual tokens `[N, p, d]` through the model's body once, with gradient, and keep what they leave."""
    recording, _ = record(door, _inputs(door, prompt))
    return KV(tuple(recording.layers), rows=prompt.rows, lengths=prompt.lengths)


def fold_and_predict(door: Door, prompt: Embeddings, every: bool = False) -> tuple[KV, Tensor]:
    """The same through the whole model, with the logits `[N, V]` of the last virtual token; of `every` one `[N, p, V]`.

    The last one sees no row either, so that what it predicts, each row's first token, is computed once as well.
    """
    recording, inputs = Recording(), _inputs(door, prompt)
    if not every and "logits_to_keep" in inspect.signature(door.base.forward).parameters:
        inputs["logits_to_keep"] = 1
    with door.open(None, recording):
        logits = door.base(**inputs, use_cache=False, return_dict=True).logits
    return KV(tuple(recording.layers), rows=prompt.rows, lengths=prompt.lengths), logits if every else logits[:, -1]


def _inputs(door: Door, prompt: Embeddings) -> dict[str, Any]:
    vectors = prompt.vectors.to(word_table(door.base))
    inputs: dict[str, Any] = {"inputs_embeds": vectors}
    positions = torch.arange(prompt.length, device=vectors.device)[None]
    if prompt.lengths is not None:  # shorter prompts have their padding in front
        padding = prompt.length - torch.tensor(prompt.lengths, device=vectors.device)[:, None]
        inputs["attention_mask"] = (positions >= padding).long()
        positions = (positions - padding).clamp(min=0)
    if door.takes_positions:
        inputs["position_ids"] = positions + door.position_offset
    return inputs
