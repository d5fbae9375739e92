"""What stands in for the cache while the cache way is open, and the columns of keys, values and masks.

Columns are `[padding on the left, prefix, real tokens]`: ALiBi and local attention may count columns, and in this order
a column's distance is the distance of the true positions. A shorter prompt's own padding stands in front of it, and so
is more of the padding on the left.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softprompt import transformers_api as api
from softprompt.errors import UnsupportedError
from softprompt.injection.lengths import padded
from softprompt.injection.scope import Recording
from softprompt.prompt import KV, spread


class PrefixedCache:
    """What the layers of one call see in place of the caller's cache `own` (None: nothing is kept).

    `padding` `[B|1, 1]` is how many columns stand before the prefix (None: it is first in every row). `returned` is
    what the caller gets back for a cache. With `recording` keys and values are taken down as they come.

    (No dataclass: FSDP2 takes those that are given to a layer apart, and gives it copies.)
    """

    def __init__(
        self,
        own: Any,
        prefix: KV | None,
        padding: Tensor | None = None,
        returned: Any = None,
        as_tuple: bool = False,
        recording: Recording | None = None,
        attending: Callable[[int], nn.Module] | None = None,
    ) -> None:
        self.own = own
        self.prefix = prefix
        self.padding = padding
        self.returned = returned
        self.as_tuple = as_tuple
        self.recording = recording
        self.attending = attending

    def of(self, prefix: KV) -> "PrefixedCache":
        """The same with these tensors for the prefix."""
        return PrefixedCache(
            self.own, prefix, self.padding, self.returned, self.as_tuple, self.recording, self.attending
        )

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values `[B, h, p + t, k]` that a layer attends to, given its new ones."""
        if self.recording is not None:
            return self._record(key, value, layer_idx)
        if self.own is not None:
            key, value = self.own.update(key, value, layer_idx, *args, **kwargs)
        if self.prefix is None:
            return key, value
        more_key, more_value = self.prefix.layers[layer_idx]
        return self._with_prefix(more_key, key), self._with_prefix(more_value, value)

    def _record(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        assert self.recording is not None and self.attending is not None
        if layer_idx != len(self.recording.layers):
            raise UnsupportedError(
                f"layer {layer_idx} of this model fills the cache where layer {len(self.recording.layers)} is due, so "
                "its layers cannot have a prefix each; use a model that runs each of its layers once, in order."
            )
        self.recording.add(self.attending(layer_idx), key, key, value, None)
        return key, value

    def _with_prefix(self, prefix: Tensor, own: Tensor) -> Tensor:
        """`[N, h, p, k]` and `[B, h, t, k]` → `[B, h, p + t, k]`, in the latter's type and place."""
        assert self.prefix is not None
        more = spread(prefix.to(own), self.prefix.rows, own.shape[0])
        both = torch.cat([more, own], dim=2)
        if self.padding is not None:  # real tokens are in place already, and what stands at padding is masked
            columns = self.padding + torch.arange(self.length, device=own.device)
            both.scatter_(2, columns[:, None, :, None].expand_as(more), more)
        return both

    @property
    def length(self) -> int:
        return 0 if self.prefix is None else self.prefix.length

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.length + (0 if self.own is None else self.own.get_seq_length(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + api.cache_columns(self.own, query_length, layer_idx), 0

    def __getattr__(self, name: str) -> Any:
        """Anything else a model asks its cache is the caller's to answer."""
        if name.startswith("__") or name == "own":
            raise AttributeError(name)
        return getattr(self.own, name)

    def leave(self, output: Any) -> Any:
        """The output of the model's body with the caller's cache and attention to real tokens only."""
        fields = api.with_cache(output, self.returned)
        if fields.get("attentions") is not None:
            fields["attentions"] = tuple(self._without_prefix(each) for each in fields["attentions"])
        output = type(output)(**fields)
        return output.to_tuple() if self.as_tuple else output

    def _without_prefix(self, weights: Tensor | None) -> Tensor | None:
        """Attention weights `[B, h, q, p + t]` → `[B, h, q, t]`."""
        if weights is None:
            return None
        if self.padding is not None:
            order = order_columns(self.padding, weights.shape[-1], self.length)
            weights = weights.take_along_dim(order.argsort(dim=1)[:, None, None], dim=3)
        return weights[..., self.length :]


def visible_columns(mask: Tensor) -> Tensor:
    """Which columns any query sees, `[B|1, columns]`, from a 2-D mask or a 4-D one (boolean or additive)."""
    if mask.ndim == 2:
        return mask != 0
    return (mask if mask.dtype is torch.bool else mask > -1000).any(dim=2).any(dim=1)


def left_padding(mask: Tensor) -> Tensor | None:
    """How many columns of each row stand before its first real token, `[B|1, 1]`; None where no row has any."""
    padding = (visible_columns(mask).cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    return padding if bool(padding.any()) else None


def order_columns(padding: Tensor, columns: int, length: int) -> Tensor:
    """Which of `columns` columns `[prefix, padding, real tokens]` stands where in `[padding, prefix, real tokens]`.

    `padding` `[B, 1]` and the prefix's `length` → `[B, columns]`.
    """
    column = torch.arange(columns, device=padding.device)[None]
    front = torch.where(column < padding, column + length, column - padding)
    return torch.where(column < padding + length, front, column)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean 4-D mask as one that is added, which is what eager attention does with it."""
    if mask.ndim != 4 or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def widen(mask: Tensor, prefix: KV, lengths: Tensor | None, padding: Tensor | None) -> Tensor:
    """A mask `[B|1, columns]` or `[B|1, h|1, q, columns]` with columns for the prefix, which every query sees.

    Of a row whose prompt is shorter, as `lengths` `[B]` says, the first ones are padding, and `mask` has all rows then.
    """
    square, length = mask.ndim == 4, prefix.length
    adds = square and mask.dtype is not torch.bool
    seen = mask.new_full((*mask.shape[:-1], length), 0 if adds else 1)
    if lengths is not None:
        missing = padded(lengths, length)
        mask = mask.expand(len(lengths), *mask.shape[1:])
        seen = seen.expand(len(lengths), *seen.shape[1:]).masked_fill(
            missing[:, None, None] if square else missing, torch.finfo(mask.dtype).min if adds else 0
        )
    both = torch.cat([seen, mask], dim=-1)
    if padding is None:
        return both
    order = order_columns(padding, both.shape[-1], length)
    order = order.expand(len(both), -1)
    return both.take_along_dim(order[:, None, None] if square else order, dim=-1)


def of_sequences(positions: Tensor) -> Tensor:
    """The causal mask `[B, 1, T, T]` of rows of several sequences, whose positions `[B, T]` start again at each."""
    starts = torch.diff(positions, prepend=positions[:, :1] - 1) <= 0
    sequence = starts.cumsum(dim=1)
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
