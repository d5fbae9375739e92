"""Fold: on a causal model a prompt in front depends on no row, so its keys and values are computed once.

This is exact: the layers see p virtual tokens at positions 0…p−1, as if they stood before every row.
"""

import torch

from softprompt.doors.cache import Door
from softprompt.geometry import record, word_table
from softprompt.prompt import KV, Embeddings


def fold(door: Door, prompt: Embeddings) -> KV:
    """Run the virtual tokens `[N, p, d]` through the model's body once, with gradient, and keep what they leave."""
    vectors = prompt.vectors.to(word_table(door.base))
    inputs: dict[str, torch.Tensor] = {"inputs_embeds": vectors}
    if door.takes_positions:
        inputs["position_ids"] = torch.arange(prompt.length, device=vectors.device)[None] + door.position_offset
    recording, _ = record(door, inputs)
    return KV(tuple(recording.layers), rows=prompt.rows)
