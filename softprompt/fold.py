"""Fold: on a causal model a prompt in front depends on no row, so its keys and values are computed once.

This is exact: the layers see p virtual tokens at positions 0…p−1, as if they stood before every row.
"""

import torch
from torch import Tensor

from softprompt.doors.attention import Recording
from softprompt.doors.cache import Door
from softprompt.probe import record, word_table
from softprompt.prompt import KV, Embeddings


def fold(door: Door, prompt: Embeddings) -> KV:
    """Run the virtual tokens `[N, p, d]` through the model's body once, with gradient, and keep what they leave."""
    recording, _ = record(door, _inputs(door, prompt))
    return KV(tuple(recording.layers), rows=prompt.rows)


def fold_and_predict(door: Door, prompt: Embeddings) -> tuple[KV, Tensor]:
    """The same through the whole model, with the logits of the virtual tokens, `[N, p, V]`."""
    recording = Recording()
    with door.open(None, recording):
        output = door.base(**_inputs(door, prompt), use_cache=False, return_dict=True)
    return KV(tuple(recording.layers), rows=prompt.rows), output.logits


def _inputs(door: Door, prompt: Embeddings) -> dict[str, Tensor]:
    vectors = prompt.vectors.to(word_table(door.base))
    inputs: dict[str, Tensor] = {"inputs_embeds": vectors}
    if door.takes_positions:
        inputs["position_ids"] = torch.arange(prompt.length, device=vectors.device)[None] + door.position_offset
    return inputs
