"""How PEFT deals a checkpoint's pairs of keys and values out to layers, where it is not one of one shape for each.

To the layers of an encoder-decoder's decoder it deals them out two by two, as if they were self- and cross-attention's,
drops the second of every two, and starts again when there are no more: layer i has pair 2i mod m of m. So one pair per
layer, which is what PEFT makes, lets layers share (or change places). A prefix with a pair for every layer is written
with each of them twice.

To layers of different heads and sizes (Gemma 4) it gives the first heads of a pair that is wide enough for any, and of
each head the first numbers. Layers that use an earlier one's keys (they come last) have a pair that nothing reads.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from softprompt.config import KVConfig


def as_checkpoint(flat: Tensor, config: KVConfig) -> Tensor:
    """The pairs of the layers `[p, prefix_width]` as a checkpoint has them."""
    if config.paired:
        return twice(flat, config.num_layers or 1)
    return widened(flat, config) if config.padded else flat


def from_checkpoint(flat: Tensor, config: KVConfig) -> Tensor:
    """The pairs of the layers `[p, prefix_width]` in those of a checkpoint, once a model has filled in the config."""
    if config.paired:
        layers = config.num_layers or 1
        return dealt(flat, layers, config.prefix_width // layers)
    if config.padded:
        return narrowed(flat, config)
    return flat[:, : config.prefix_width]


def widened(flat: Tensor, config: KVConfig) -> Tensor:
    """`[p, Σ h·(k+v)]` with zeros in each layer up to the widest's heads and size, `[p, layers·2·H·K]`."""
    heads, size = _widest(config)
    parts = []
    for (own, key, _), pair in zip(config.prefix_shapes, flat.split(_widths(config), dim=1), strict=True):
        parts.append(pad(pair.unflatten(1, (2, own, key)), (0, size - key, 0, heads - own)).flatten(1))
    return torch.cat(parts, dim=1)


def narrowed(flat: Tensor, config: KVConfig) -> Tensor:
    """The inverse of `widened`, whatever stands where that has zeros; pairs of further layers are left out."""
    heads, size = _widest(config)
    pairs = flat.unflatten(1, (-1, 2, heads, size)).unbind(1)
    own = [pair[:, :, :count, :key] for (count, key, _), pair in zip(config.prefix_shapes, pairs, strict=False)]
    return torch.cat([each.flatten(1) for each in own], dim=1)


def _widest(config: KVConfig) -> tuple[int, int]:
    assert config.num_attention_heads is not None and config.token_dim is not None
    return config.num_attention_heads, config.token_dim // config.num_attention_heads


def _widths(config: KVConfig) -> list[int]:
    return [heads * (key + value) for heads, key, value in config.prefix_shapes]


def twice(flat: Tensor, layers: int) -> Tensor:
    """`[p, layers·w]` with every layer's part twice in a row, `[p, 2·layers·w]`."""
    return flat.unflatten(1, (layers, 1, -1)).expand(-1, -1, 2, -1).flatten(1)


def dealt(flat: Tensor, layers: int, width: int) -> Tensor:
    """Of pairs `[p, m·width]`, the ones that the layers have, `[p, layers·width]`."""
    pairs = flat.unflatten(1, (-1, width))
    return pairs[:, [2 * layer % pairs.shape[1] for layer in range(layers)]].flatten(1)


def each_once(flat: Tensor, count: int) -> Tensor:
    """The pair of every layer in a checkpoint of `count` pairs, `[p, layers·w]`, when there is no model to count them.

    Pairs that all stand there twice are those of half as many layers; any others PEFT wrote, one for each layer.
    """
    pairs = flat.unflatten(1, (count, -1))
    doubled = count % 2 == 0 and bool((pairs[:, ::2] == pairs[:, 1::2]).all())
    return dealt(flat, count // 2 if doubled else count, pairs.shape[2])
