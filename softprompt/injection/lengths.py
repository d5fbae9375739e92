"""How many virtual tokens each row of a batch has, where its rows' prompts differ in that."""

import torch
from torch import Tensor

from softprompt.prompt import KV, Embeddings, spread


def own_lengths(prompt: Embeddings | KV, batch: int, device: torch.device) -> Tensor | None:
    """The number of virtual tokens of each row, `[B]`; None where every row has `prompt.length`."""
    if prompt.lengths is None:
        return None
    return spread(torch.tensor(prompt.lengths, device=device), prompt.rows, batch)


def padded(lengths: Tensor, longest: int) -> Tensor:
    """Which of a prompt's columns are the padding in front of a shorter one: `[B]` → `[B, longest]`."""
    return torch.arange(longest, device=lengths.device) < longest - lengths[:, None]
