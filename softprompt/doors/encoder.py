"""The door into an encoder-decoder's encoder: vectors enter there, whoever calls it, and cross-attention sees them.

Two hooks do it, so `forward`, `generate` and heads that also read `input_ids` need no arguments changed. The encoder's
rows are arranged like any encoder's (real tokens first), and its output is brought back to the caller's columns, with
the vectors in front; the decoder's cross-attention gets a mask to match.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.doors.decoder import open_decoder
from softprompt.doors.embedding import embed, fill_slots, place, take
from softprompt.doors.lengths import own_lengths
from softprompt.errors import ConfigError
from softprompt.prompt import Embeddings

Hook = Callable[..., Any]


@contextmanager
def open_encoder(
    base: PreTrainedModel,
    prompt: Embeddings | None,
    slots: Tensor | None = None,
    after_first: bool = False,
    limit: int | None = None,
) -> Iterator[None]:
    """Inside the block the encoder's rows are arranged, with `prompt` in front of them (or at their `slots`).

    `limit` is how many learned positions there are; ConfigError for a longer row.
    """
    encoder, decoder = base.get_encoder(), base.get_decoder()
    in_front = prompt if slots is None else None
    count = 0 if in_front is None else in_front.length
    places: list[Tensor] = []
    entered: list[bool] = []
    handles = [
        encoder.register_forward_pre_hook(lambda *_: entered.append(True)),
        encoder.register_forward_pre_hook(_enter(prompt, slots, after_first, places, limit), with_kwargs=True),
        encoder.register_forward_hook(_leave(count, places)),
        decoder.register_forward_pre_hook(_widen_cross(in_front, entered), with_kwargs=True),
    ]
    try:
        with open_decoder(base, prompt):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(
    prompt: Embeddings | None, slots: Tensor | None, after_first: bool, places: list[Tensor], limit: int | None
) -> Hook:
    def hook(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = {**({"input_ids": args[0]} if args else {}), **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        vectors, embedded, lengths = None, None, None
        if prompt is not None:
            embedded = embed(inputs, encoder.get_input_embeddings())  # pyright: ignore[reportCallIssue]
            if slots is not None:
                inputs["inputs_embeds"] = fill_slots(embedded, prompt, slots)
                inputs.pop("input_ids", None)
            else:
                vectors = prompt.per_row(embedded.shape[0])
                lengths = own_lengths(prompt, embedded.shape[0], embedded.device)
        options: dict[str, Any] = {"lengths": lengths, "after_first": after_first, "causal": False}
        placed, placement = place(inputs, vectors, embedded, **options)
        if limit is not None and placement.width > limit:
            raise ConfigError(
                f"{placement.width} tokens, the virtual ones included, do not fit into this encoder's {limit} learned "
                "positions; shorten the text or use fewer virtual tokens."
            )
        columns = placement.columns
        if columns is not None:
            places.append(columns)
        return (), placed

    return hook


def _leave(count: int, places: list[Tensor]) -> Hook:
    """The encoder's output with the vectors in front and every token in the column the caller gave it."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not places:
            return output
        columns = places.pop()
        order = torch.cat([_others(columns, count), columns], dim=1)
        if isinstance(output, tuple):
            return (take(output[0], order, 1), *output[1:])
        output["last_hidden_state"] = take(output["last_hidden_state"], order, 1)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(take(state, order, 1) for state in output["hidden_states"])
        if output.get("attentions") is not None:
            output["attentions"] = tuple(take(take(part, order, 2), order, 3) for part in output["attentions"])
        return output

    return hook


def _others(columns: Tensor, count: int) -> Tensor:
    """The `count` columns that are nobody's in `columns` `[B, T]`, in order: where the vectors stand."""
    width = columns.shape[1] + count
    taken = torch.zeros(columns.shape[0], width, dtype=torch.int8, device=columns.device).scatter_(1, columns, 1)
    return taken.argsort(dim=1, stable=True)[:, :count]


def _widen_cross(prompt: Embeddings | None, entered: list[bool]) -> Hook:
    """`entered` has something in it once the encoder has run with the prompt."""
    count = 0 if prompt is None else prompt.length

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if prompt is None or not count or states is None:
            return None
        if not entered or (mask is not None and states.shape[1] == mask.shape[-1]):
            raise ConfigError(
                "encoder_outputs were computed without the prompt; pass input_ids, so that the encoder sees it."
            )
        if mask is None and prompt.lengths is None:
            return None
        if mask is None:
            mask = torch.ones(states.shape[0], states.shape[1] - count, dtype=torch.long, device=states.device)
        return args, {**kwargs, "encoder_attention_mask": torch.cat([_seen(prompt, mask, len(states)), mask], dim=-1)}

    return hook


def _seen(prompt: Embeddings, mask: Tensor, rows: int) -> Tensor:
    """The columns of the vectors in front of the encoder's output, for cross-attention's `mask`.

    Those that a row has stand first, `_leave` has them in the order of the encoder's columns.
    """
    yes, no = (0, torch.finfo(mask.dtype).min) if mask.is_floating_point() and mask.ndim == 4 else (1, 0)
    seen, lengths = mask.new_full((*mask.shape[:-1], prompt.length), yes), own_lengths(prompt, rows, mask.device)
    if lengths is None:
        return seen
    missing = torch.arange(prompt.length, device=mask.device) >= lengths[:, None]
    return seen.masked_fill(missing if mask.ndim == 2 else missing[:, None, None], no)


def cut(output: Any, count: int) -> Any:
    """What a model returns of its encoder, over real tokens only."""
    if not count or not isinstance(output, dict):
        return output
    for name in ("encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions", "cross_attentions"):
        value = output.get(name)
        if isinstance(value, Tensor):
            output[name] = value[:, count:]
        elif value is not None:
            output[name] = tuple(_cut(name, part, count) for part in value)
    return output


def _cut(name: str, part: Any, count: int) -> Any:
    if isinstance(part, tuple):  # generation: one tuple per step
        return tuple(_cut(name, each, count) for each in part)
    if name == "encoder_hidden_states":
        return part[:, count:]
    return part[..., count:, count:] if name == "encoder_attentions" else part[..., count:]
