"""The embedding door: vectors placed into the embedded input, and outputs brought back to the real tokens.

Rows are first brought into one form – real tokens first, padding behind – so that a vector in front stands next to
the row's first real token, and heads that read column 0 read a real one. `Placement.restore` undoes all of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PER_TOKEN_OUTPUTS = ("logits", "last_hidden_state", "hidden_states", "start_logits", "end_logits")
PER_PAIR_OUTPUTS = ("attentions",)
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
    return moved, Placement(order, 0, tokens)


def put_in_front(
    inputs: dict[str, Any], placement: Placement, vectors: Tensor, embedded: Tensor
) -> tuple[dict[str, Any], Placement]:
    """`vectors` `[1, n, d]` before `embedded` `[B, T, d]`, with mask, labels, types and positions to match."""
    rows, count = embedded.shape[0], vectors.shape[1]
    result = {name: value for name, value in inputs.items() if name != "input_ids"}
    result["inputs_embeds"] = torch.cat([vectors.to(embedded).expand(rows, -1, -1), embedded], dim=1)
    for name, filler in (("attention_mask", 1), ("token_type_ids", 0), ("labels", -100)):
        value = inputs.get(name)
        if _per_token(name, value, placement.tokens):
            assert isinstance(value, Tensor)
            result[name] = torch.cat([value.new_full((rows, count), filler), value], dim=1)
    positions = inputs.get("position_ids")
    if positions is not None:
        first = positions[:, :1] + torch.arange(count, device=positions.device)
        result["position_ids"] = torch.cat([first, positions + count], dim=1)
    return result, Placement(placement.order, count, placement.tokens)


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
