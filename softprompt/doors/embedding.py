"""The embedding door: vectors placed into the embedded input, and outputs brought back to the real tokens.

Rows are first brought into one form – real tokens first, padding behind – so that a vector in front stands next to
the row's first real token, and heads that read column 0 read a real one. `Placement.restore` undoes all of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.prompt import Geometry

PER_TOKEN_OUTPUTS = ("logits", "last_hidden_state", "hidden_states", "start_logits", "end_logits")
PER_PAIR_OUTPUTS = ("attentions",)
COLUMN_INPUTS = ("start_positions", "end_positions")
PER_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "labels")


@dataclass(frozen=True)
class Placement:
    """How rows were rearranged: `order` `[B, T]` (None: as they were), and how many vectors stand in front."""

    order: Tensor | None
    in_front: int
    tokens: int

    def restore(self, output: Any) -> Any:
        """The model's output with every per-token field `[B, n+T, …]` cut and reordered to `[B, T, …]`."""
        for name in (*PER_TOKEN_OUTPUTS, *PER_PAIR_OUTPUTS):
            value = output.get(name)
            if isinstance(value, tuple):
                output[name] = tuple(self._restore(name, part) for part in value)
            elif value is not None:
                output[name] = self._restore(name, value)
        return output

    def _restore(self, name: str, value: Tensor) -> Tensor:
        dims = (2, 3) if name in PER_PAIR_OUTPUTS else (1,)
        if value.ndim <= max(dims) or value.shape[dims[0]] != self.in_front + self.tokens:
            return value  # a field of one value per row, such as a classifier's logits [B, C]
        if name == "logits" and value.ndim < 3:
            return value
        for dim in dims:
            value = value.narrow(dim, self.in_front, self.tokens)
            if self.order is not None:
                value = _take(value, self.order.argsort(dim=1), dim)
        return value


def arrange(inputs: dict[str, Any]) -> tuple[dict[str, Any], Placement]:
    """Move every row's real tokens to its front. Without a 2-D mask rows stay as they are."""
    mask, tokens = inputs.get("attention_mask"), _length(inputs)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != tokens:
        return inputs, Placement(None, 0, tokens)
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)
    moved = {
        name: _take(value, order, 1) if _per_token(name, value, tokens) else value for name, value in inputs.items()
    }
    for name in COLUMN_INPUTS:
        if name in inputs:
            moved[name] = _follow(inputs[name], order)
    return moved, Placement(order, 0, tokens)


def _follow(columns: Tensor, order: Tensor) -> Tensor:
    """Where the columns `[B]` have gone; those outside a row, which a loss ignores, stay outside."""
    inside = (columns >= 0) & (columns < order.shape[1])
    moved = order.argsort(dim=1).gather(1, columns.where(inside, 0)[:, None])[:, 0]
    return moved.where(inside, columns)


def put_in_front(
    inputs: dict[str, Any], placement: Placement, vectors: Tensor, embedded: Tensor, geometry: Geometry
) -> tuple[dict[str, Any], Placement]:
    """`vectors` `[1, n, d]` before `embedded` `[B, T, d]`, with mask, labels, types and positions to match."""
    rows, count = embedded.shape[0], vectors.shape[1]
    result = {name: value for name, value in inputs.items() if name != "input_ids"}
    result["inputs_embeds"] = torch.cat([vectors.to(embedded).expand(rows, -1, -1), embedded], dim=1)
    for name, filler in (("attention_mask", 1), ("token_type_ids", 0), ("labels", -100)):
        value = inputs.get(name)
        if _per_token(name, value, placement.tokens):
            assert isinstance(value, Tensor)
            result[name] = torch.cat([value.new_full((value.shape[0], count), filler), value], dim=1)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4:
        result["attention_mask"] = _widen_square(mask, count, geometry.causal)
    positions = inputs.get("position_ids")
    if positions is not None:
        first = torch.arange(count, device=positions.device) + geometry.position_offset
        result["position_ids"] = torch.cat([first.expand(positions.shape[0], -1), positions + count], dim=1)
    for name in COLUMN_INPUTS:
        if name in inputs:
            result[name] = inputs[name] + count
    return result, Placement(placement.order, count, placement.tokens)


def _widen_square(mask: Tensor, count: int, causal: bool) -> Tensor:
    """A mask `[B, h|1, T, T]` with `count` virtual tokens in front, which every token sees.

    They see each other (in order, on a causal model), and on an encoder whatever any token sees.
    """
    hidden = False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
    between = mask.new_full((count, count), not hidden if mask.dtype is torch.bool else 0)
    real = mask.amax(dim=2, keepdim=True) if not causal else mask.new_full((*mask.shape[:2], 1, mask.shape[3]), hidden)
    if causal:
        between = between.masked_fill(torch.ones_like(between, dtype=torch.bool).triu(1), hidden)
    shape = (*mask.shape[:2], count)
    top = torch.cat([between.expand(*shape, -1), real.expand(*shape, -1)], dim=-1)
    left = between[-1:, :].expand(*mask.shape[:3], -1)
    return torch.cat([top, torch.cat([left, mask], dim=-1)], dim=2)


def _length(inputs: dict[str, Any]) -> int:
    ids = inputs.get("input_ids")
    return (ids if ids is not None else inputs["inputs_embeds"]).shape[1]


def _per_token(name: str, value: Any, tokens: int) -> bool:
    """Whether an input has one entry per token; `labels` of a sequence classifier are `[B]` or `[B, C]` floats."""
    if name not in PER_TOKEN_INPUTS or not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != tokens:
        return False
    return name != "labels" or not value.is_floating_point()


def _take(value: Tensor, order: Tensor, dim: int) -> Tensor:
    """Reorder `dim` of `value` row by row; `order` is `[B, T]`."""
    shape = [1] * value.ndim
    shape[0], shape[dim] = order.shape
    size = list(value.shape)
    size[dim] = order.shape[1]
    return value.expand(order.shape[0], *value.shape[1:]).gather(
        dim, order.view(shape).expand([order.shape[0], *size[1:]])
    )
