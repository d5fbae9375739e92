"""Vectors in the model's input: placed into the embedded input, and outputs brought back to the real tokens.

Rows are brought into one form – the vectors next to the row's real tokens, padding all on one side – so that padding
changes nothing, and heads that read column 0 read a real one. `Placement.restore` undoes all of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.call import Call
from softprompt.errors import ConfigError
from softprompt.injection.lengths import own_lengths, padded
from softprompt.prompt import Embeddings

PER_TOKEN_OUTPUTS = (
    *("logits", "last_hidden_state", "hidden_states", "start_logits", "end_logits"),
    *("encoder_last_hidden_state", "encoder_hidden_states", "decoder_hidden_states"),
)
PER_PAIR_OUTPUTS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
SPANS = ("start_positions", "end_positions")
TYPES = "token_type_ids"
IGNORED = -100


@dataclass(frozen=True)
class Placement:
    """Where things are now: `columns` `[B, T]` is the new column of every given one, of `width` (None: as it was)."""

    columns: Tensor | None
    width: int

    def restore(self, output: Any) -> Any:
        """The model's output with every per-token field `[B, width, …]` brought back to `[B, T, …]`."""
        if self.columns is None:
            return output
        for name in (*PER_TOKEN_OUTPUTS, *PER_PAIR_OUTPUTS):
            value = output.get(name)
            if isinstance(value, tuple):
                output[name] = tuple(self._restore(name, part) for part in value)
            elif value is not None:
                output[name] = self._restore(name, value)
        return output

    def _restore(self, name: str, value: Tensor) -> Tensor:
        dims = (2, 3) if name in PER_PAIR_OUTPUTS else (1,)
        if value.ndim <= max(dims) or value.shape[dims[0]] != self.width:
            return value  # a field of one value per row, such as a classifier's logits [B, C]
        if name == "logits" and value.ndim < 3:
            return value
        assert self.columns is not None
        for dim in dims:
            value = take(value, self.columns, dim)
        return value


def embed(call: Call, table: Any) -> Tensor:
    """The embedded rows `[B, T, d]`, given or looked up."""
    return table(call.ids) if call.vectors is None else call.vectors


def fill_slots(embedded: Tensor, prompt: Embeddings, slots: Tensor) -> Tensor:
    """`embedded` `[B, T, d]` with the prompt's vectors where `slots` `[B, T]` has their index (−1: a plain token).

    The index counts the virtual tokens of the row's own prompt. ConfigError for one that it has not.
    """
    vectors = prompt.per_row(embedded.shape[0]).to(embedded)
    if slots.shape != embedded.shape[:2]:
        raise ConfigError(
            f"slots have shape {tuple(slots.shape)}, the rows {tuple(embedded.shape[:2])}; give one each."
        )
    if int(slots.max()) >= prompt.length or int(slots.min()) < -1:
        raise ConfigError(
            f"slots go from {int(slots.min())} to {int(slots.max())}, but the prompt has {prompt.length} virtual "
            "tokens; use −1 for ordinary tokens and 0 to p−1 for virtual ones."
        )
    slots = slots.to(vectors.device)
    lengths, index = own_lengths(prompt, embedded.shape[0], vectors.device), slots.clamp(min=0)
    if lengths is not None:
        _check_slots(slots, lengths)
        index = (index + prompt.length - lengths[:, None]).clamp(max=prompt.length - 1)
    return torch.where(slots[..., None] >= 0, take(vectors, index, 1), embedded)


def _check_slots(slots: Tensor, lengths: Tensor) -> None:
    """ConfigError where a row's `slots` `[B, T]` go beyond its own number `[B]` of virtual tokens."""
    beyond = (slots >= lengths[:, None]).any(dim=1)
    if bool(beyond.any()):
        row = int(beyond.to(torch.int8).argmax())
        raise ConfigError(
            f"the slots of row {row} go up to {int(slots[row].max())}, but its prompt has {int(lengths[row])} virtual "
            "tokens; encode each row with the template of its own prompt."
        )


def place(
    call: Call,
    vectors: Tensor | None,
    embedded: Tensor | None,
    *,
    lengths: Tensor | None = None,
    after_first: bool = False,
    padding: str = "right",
    causal: bool = True,
    position_offset: int = 0,
) -> tuple[Call, Placement]:
    """Rows with `vectors` `[B, n, d]` before their real tokens (or behind the first one) and all padding on one side.

    Without vectors the rows are only arranged; `embedded` `[B, T, d]` then stays what it is in the call. Of a row that
    has fewer, as `lengths` `[B]` says, the first vectors become padding like any other. Mask, labels, types, given
    positions and spans follow. Rows with a mask that is not 2-D keep their order.
    """
    tokens, count = call.rows.shape[1], 0 if vectors is None else vectors.shape[1]
    empty = None if lengths is None else padded(lengths, count)
    if empty is not None and isinstance(call.mask, Tensor) and call.mask.ndim != 2 and padding == "left":
        raise ConfigError(
            f"attention_mask has shape {tuple(call.mask.shape)}, but the rows have prompts of different lengths, which "
            "needs one of [B, T]; pass that, or call the model for each prompt's rows alone."
        )
    mask = call.flat_mask
    plain = mask is not None and mask.shape[1] == tokens
    result = call
    if vectors is not None:
        assert embedded is not None
        result = _in_front(call, vectors, embedded, empty, causal, position_offset)
    if not plain and not count:
        return result, Placement(None, tokens)
    shape = result.rows.shape[0], tokens
    device = result.rows.device
    real = mask != 0 if plain and mask is not None else torch.ones(shape, dtype=torch.bool, device=device)
    order = _order(real.to(device), count, empty, after_first, padding)
    place_of = order.argsort(dim=1)
    if after_first and count and call.positions is not None:
        result = result.but(positions=_positions_after_first(call.positions, count, empty, real))
    result = _reordered(result, order)
    moved = {name: _follow(call.rest[name], place_of[:, count:]) for name in SPANS if call.rest.get(name) is not None}
    return result.plus(**moved), Placement(place_of[:, count:], count + tokens)


def _order(real: Tensor, count: int, empty: Tensor | None, after_first: bool, padding: str) -> Tensor:
    """Which column `[B, n+T]` of vectors-then-tokens stands where: a stable sort by what each column is.

    `empty` `[B, n]` are the vectors that a row has not.
    """
    last = 3 if padding == "right" else -1
    rank = torch.where(real, 2, last)
    if after_first:
        first = real & (real.cumsum(1) == 1)
        rank = rank.masked_fill(first, 0)
    virtual = rank.new_ones(real.shape[0], count)
    rank = torch.cat([virtual if empty is None else virtual.masked_fill(empty, last), rank], dim=1)
    if torch.compiler.is_exporting():  # ONNX knows no stable sort
        return (rank * rank.shape[1] + torch.arange(rank.shape[1], device=rank.device)).argsort(dim=1)
    return rank.to(torch.int8).argsort(dim=1, stable=True)


def _in_front(
    call: Call,
    vectors: Tensor,
    embedded: Tensor,
    empty: Tensor | None,
    causal: bool,
    position_offset: int,
) -> Call:
    """Every input with `n` more columns in front, before any reordering; those of `empty` `[B, n]` are padding."""
    rows, tokens, count = embedded.shape[0], embedded.shape[1], vectors.shape[1]
    wide = torch.cat([vectors.to(embedded).expand(rows, -1, -1), embedded], dim=1)
    mask, positions, labels, types = call.mask, call.positions, call.labels, call.rest.get(TYPES)
    if isinstance(mask, Tensor):
        mask = _widen_square(mask, count, causal) if mask.ndim == 4 else _wider(mask, tokens, count, 1, floats=True)
    if positions is not None:
        first, own = _virtual_positions(count, empty, positions.device)
        positions = positions.expand(max(positions.shape[0], first.shape[0]), -1)
        virtual = (first + position_offset).expand(positions.shape[0], -1)
        positions = torch.cat([virtual, positions + own], dim=1)
    if empty is not None:
        mask = _without(mask, empty, tokens)
    labels = _wider(labels, tokens, count, IGNORED)
    result = call.but(ids=None, vectors=wide, mask=mask, positions=positions, labels=labels)
    return result if types is None else result.plus(**{TYPES: _wider(types, tokens, count, 0)})


def _wider(value: Any, tokens: int, count: int, filler: int, floats: bool = False) -> Any:
    """A per-token input `[B, T]` with `count` columns of `filler` in front; anything else as it is."""
    if not _per_token(value, tokens, floats):
        return value
    return torch.cat([value.new_full((value.shape[0], count), filler), value], dim=1)


def _without(mask: Tensor | None, empty: Tensor, tokens: int) -> Tensor:
    """The mask `[B, n+T]` or `[B, h, n+T, n+T]` of rows with vectors in front, those of `empty` `[B, n]` hidden."""
    rows = empty.shape[0]
    hidden = torch.cat([empty, empty.new_zeros(rows, tokens)], dim=1)
    if mask is None:
        return (~hidden).long()
    if mask.ndim == 2:
        return mask.expand(rows, -1).masked_fill(hidden.to(mask.device), 0)
    lowest = False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
    return mask.expand(rows, *mask.shape[1:]).masked_fill(hidden[:, None, None].to(mask.device), lowest)


def _virtual_positions(count: int, empty: Tensor | None, device: torch.device) -> tuple[Tensor, int | Tensor]:
    """Positions `[1|B, n]` of vectors in front, counted from a row's first own one, and how many it has (`[B, 1]`)."""
    columns = torch.arange(count, device=device)[None]
    if empty is None:
        return columns, count
    missing = empty.sum(dim=1, keepdim=True).to(device)
    return (columns - missing).clamp(min=0), count - missing


def _positions_after_first(positions: Tensor, count: int, empty: Tensor | None, real: Tensor) -> Tensor:
    """Given positions `[B, T]` with room for the vectors behind each row's first real token, `[B, n+T]`."""
    first = real & (real.cumsum(1) == 1)
    positions = positions.expand(real.shape[0], -1)
    begin = positions.gather(1, first.to(torch.int8).argmax(1, keepdim=True)) + 1
    virtual, own = _virtual_positions(count, empty, positions.device)
    return torch.cat([begin + virtual, positions + torch.where(first, 0, own)], dim=1)


def _reordered(call: Call, order: Tensor) -> Call:
    """The per-token inputs of a call in their new order."""
    width, mask, types = order.shape[1], call.mask, call.rest.get(TYPES)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2:] == (width, width):
        mask = take(take(mask, order, 2), order, 3)
    elif _per_token(mask, width, floats=True):
        mask = take(mask, order, 1)
    result = call.but(
        ids=None if call.ids is None else take(call.ids, order, 1),
        vectors=None if call.vectors is None else take(call.vectors, order, 1),
        mask=mask,
        positions=_in_order(call.positions, order),
        labels=_in_order(call.labels, order),
    )
    return result if types is None else result.plus(**{TYPES: _in_order(types, order)})


def _in_order(value: Any, order: Tensor) -> Any:
    """A per-token input in its new order; anything else as it is."""
    return take(value, order, 1) if _per_token(value, order.shape[1]) else value


def _follow(columns: Tensor, place_of: Tensor) -> Tensor:
    """Where the columns `[B]` have gone; those outside a row, which a loss ignores, stay outside."""
    inside = (columns >= 0) & (columns < place_of.shape[1])
    moved = place_of.gather(1, columns.where(inside, 0)[:, None])[:, 0]
    return moved.where(inside, columns.where(columns < 0, columns + place_of.shape[1]))


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


def _per_token(value: Any, tokens: int, floats: bool = False) -> bool:
    """Whether an input `[B, T]` has one entry per token; `labels` of a sequence classifier are `[B]`, or floats."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != tokens:
        return False
    return floats or not value.is_floating_point()


def take(value: Tensor, order: Tensor, dim: int) -> Tensor:
    """The entries `order` `[B, m]` of dimension `dim` of `value`, row by row."""
    shape = [1] * value.ndim
    shape[0], shape[dim] = order.shape
    size = list(value.shape)
    size[dim] = order.shape[1]
    return value.expand(order.shape[0], *value.shape[1:]).gather(
        dim, order.view(shape).expand([order.shape[0], *size[1:]])
    )
