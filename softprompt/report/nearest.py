"""Which words virtual tokens are closest to: a way to look at a prompt, not an account of what it means."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

WORDS = 8192  # that are in float32 at a time


def nearest_tokens(
    vectors: Tensor, words: Tensor, tokenizer: PreTrainedTokenizerBase, count: int = 3
) -> list[list[tuple[str, float]]]:
    """For each virtual token ``[n, d]`` the ``count`` closest rows of the word embeddings ``words`` ``[V, d]``.

    Returns pairs of token text and cosine, closest first; special tokens and unused rows are left out.
    """
    wanted, table = torch.nn.functional.normalize(vectors.float(), dim=1), words.detach()
    parts = (torch.nn.functional.normalize(part.float(), dim=1) for part in table.split(WORDS))
    cosines = torch.cat([wanted @ part.T for part in parts], dim=1)
    cosines[:, [number for number in tokenizer.all_special_ids if number < len(table)]] = -2.0
    cosines[:, len(tokenizer) :] = -2.0
    best = cosines.topk(min(count, len(table)), dim=1)
    return [
        [(str(tokenizer.decode([token])), round(value, 4)) for token, value in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
