"""How PEFT deals a checkpoint's pairs of keys and values out to the layers of an encoder-decoder's decoder.

It deals them out two by two, as if they were self- and cross-attention's, drops the second of every two, and starts
again when there are no more: layer i has pair 2i mod m of m. So one pair per layer, which is what PEFT makes, lets
layers share (or change places). A prefix with a pair for every layer is written with each of them twice.
"""

from torch import Tensor


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
