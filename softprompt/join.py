"""Several prompts as one, for a batch whose rows have different ones; a row without any has one of length 0."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from softprompt.errors import ConfigError
from softprompt.fold import Folded
from softprompt.prompt import KV, Embeddings, Pairs


@dataclass(frozen=True)
class Mixed:
    """Keys and values for some rows of a batch, vectors for others, where the latter cannot become the former."""

    kv: KV | None
    vectors: Embeddings | None


def join_embeddings(parts: Sequence[Embeddings], rows: Tensor) -> Embeddings:
    """One `Embeddings` of all prompts, `[ΣN, p, d]`; `rows` `[B]` counts them through."""
    if any(part.decoder is not None for part in parts):
        raise ConfigError(
            "a prompt with vectors for the decoder too cannot share a batch with others; call the model for its rows "
            "alone."
        )
    longest = max(part.length for part in parts)
    vectors = torch.cat([pad(part.vectors, (0, 0, longest - part.length, 0)) for part in parts])
    return Embeddings(vectors, rows, _lengths(parts, [len(part.vectors) for part in parts], longest))


def join_kv(parts: Sequence[KV], rows: Tensor) -> KV:
    """One `KV` of all prompts, each `[ΣN, h, p, k]`; `rows` `[B]` counts them through."""
    first = max(parts, key=lambda part: part.length)
    filled = [part for part in parts if part.length]
    if len({(len(part.layers), len(part.cross), len(part.encoder)) for part in filled}) > 1:
        raise ConfigError(
            "prefixes for different attentions (decoder_prefix, cross_prefix, encoder_prefix) cannot share a batch; "
            "call the model for each kind of rows alone."
        )
    if len({part.always_visible for part in filled}) > 1:
        raise ConfigError(
            "prompts with and without prefix_always_visible cannot share a batch; call the model for each kind alone."
        )
    sizes = [len(part.pairs[0][0]) for part in parts]
    joined = {
        name: _join_pairs([getattr(part, name) or () for part in parts], sizes, getattr(first, name), first.length)
        for name in ("layers", "cross", "encoder")
    }
    return replace(first, **joined, rows=rows, lengths=_lengths(parts, sizes, first.length))


def _join_pairs(parts: list[Pairs], sizes: list[int], like: Pairs, longest: int) -> Pairs:
    def of(layer: int, side: int) -> Tensor:
        sample = like[layer][side]
        each = [
            pad(pairs[layer][side].to(sample), (0, 0, longest - pairs[layer][side].shape[2], 0))
            if pairs and pairs[layer][side].shape[2]
            else sample.new_zeros(size, *sample.shape[1:])
            for pairs, size in zip(parts, sizes, strict=True)
        ]
        return torch.cat(each)

    return tuple((of(layer, 0), of(layer, 1)) for layer in range(len(like)))


def join_folded(parts: Sequence[Folded], rows: Tensor) -> Folded:
    """One `Folded` of all prompts."""
    known = [part.logits for part in parts if part.logits is not None]
    kv = join_kv([part.kv for part in parts], rows)
    if not known:
        return Folded(kv)
    logits, predicts = [], []
    for part in parts:
        size = len(part.kv.pairs[0][0])
        logits.append(known[0].new_zeros(size, known[0].shape[1]) if part.logits is None else part.logits)
        predicts += part.predicts or [part.logits is not None] * size
    return Folded(kv, torch.cat(logits), None if all(predicts) else tuple(predicts))


def _lengths(parts: Sequence[Embeddings | KV], sizes: list[int], longest: int) -> tuple[int, ...] | None:
    """The lengths of all prompts, None where all are of the longest."""
    found: list[int] = []
    for part, size in zip(parts, sizes, strict=True):
        found += part.lengths or (part.length,) * size
    return None if all(length == longest for length in found) else tuple(found)
