"""Vectors in an encoder-decoder: in front of the encoder's rows, which cross-attention sees, and of the decoder's.

They enter at the two stacks, whoever calls them, so `forward`, `generate` and heads that also read `input_ids` need no
arguments changed. The encoder's rows are arranged like any encoder's (real tokens first), and its output is brought
back to the caller's columns, with the vectors in front; the decoder's cross-attention gets a mask to match. What stands
in front of the decoder's input no one outside sees; a cache holds it, so later steps only widen the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.call import Call
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.injection.input_vectors import embed, fill_slots, place, take
from softprompt.injection.lengths import own_lengths
from softprompt.injection.scope import Scope, entered
from softprompt.prompt import Embeddings, spread

Hook = Callable[..., Any]


@contextmanager
def open_encoder(
    base: PreTrainedModel,
    prompt: Embeddings | None,
    slots: Tensor | None = None,
    after_first: bool = False,
    limit: int | None = None,
) -> Iterator[None]:
    """Inside the block the encoder's rows are arranged, with `prompt` in front of them (or at their `slots`), and
    `prompt.decoder` stands in front of the decoder's input.

    `limit` is how many learned positions there are; ConfigError for a longer row. UnsupportedError for prompts of
    different lengths with a part for the decoder: positions and masks there are the decoder's own to count.
    """
    encoder, decoder = base.get_encoder(), base.get_decoder()
    in_front = prompt if slots is None else None
    count = 0 if in_front is None else in_front.length
    places: list[Tensor] = []
    run: list[bool] = []
    scope = Scope()
    scope.at(encoder, _into_encoder(prompt, slots, after_first, places, run, limit), _out_of_encoder(count, places))
    scope.at(decoder, _widen_cross(in_front, run))
    if prompt is not None and prompt.decoder is not None:
        if prompt.lengths is not None:
            raise UnsupportedError(
                "prompts of different lengths with a part in front of the decoder's input cannot share a batch; call "
                "the model for the rows of each alone, or train with num_transformer_submodules=1."
            )
        begun: list[bool] = []
        scope.at(decoder, _into_decoder(prompt, begun), _out_of_decoder(prompt.decoder.shape[1], begun))
    with entered(scope):
        yield


# ---- the encoder -----------------------------------------------------------------------------------------------------


def _into_encoder(
    prompt: Embeddings | None,
    slots: Tensor | None,
    after_first: bool,
    places: list[Tensor],
    run: list[bool],
    limit: int | None,
) -> Hook:
    def hook(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        run.append(True)
        call = Call.to(encoder, args, kwargs)
        vectors, embedded, lengths = None, None, None
        if prompt is not None:
            embedded = embed(call, encoder.get_input_embeddings())
            if slots is not None:
                call = call.but(ids=None, vectors=fill_slots(embedded, prompt, slots))
            else:
                vectors = prompt.per_row(embedded.shape[0])
                lengths = own_lengths(prompt, embedded.shape[0], embedded.device)
        placed, placement = place(call, vectors, embedded, lengths=lengths, after_first=after_first, causal=False)
        if limit is not None and placement.width > limit:
            raise ConfigError(
                f"{placement.width} tokens, the virtual ones included, do not fit into this encoder's {limit} learned "
                "positions; shorten the text or use fewer virtual tokens."
            )
        if placement.columns is not None:
            places.append(placement.columns)
        return (), placed.keywords(encoder)

    return hook


def _out_of_encoder(count: int, places: list[Tensor]) -> Hook:
    """The encoder's output with the vectors in front and every token in the column the caller gave it."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
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


def _widen_cross(prompt: Embeddings | None, run: list[bool]) -> Hook:
    """`run` has something in it once the encoder has run with the prompt."""
    count = 0 if prompt is None else prompt.length

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if prompt is None or not count or states is None:
            return None
        if not run or (mask is not None and states.shape[1] == mask.shape[-1]):
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

    Those that a row has stand first, `_out_of_encoder` has them in the order of the encoder's columns.
    """
    yes, no = (0, torch.finfo(mask.dtype).min) if mask.is_floating_point() and mask.ndim == 4 else (1, 0)
    seen, lengths = mask.new_full((*mask.shape[:-1], prompt.length), yes), own_lengths(prompt, rows, mask.device)
    if lengths is None:
        return seen
    missing = torch.arange(prompt.length, device=mask.device) >= lengths[:, None]
    return seen.masked_fill(missing if mask.ndim == 2 else missing[:, None, None], no)


# ---- the decoder -----------------------------------------------------------------------------------------------------


def check_decoding(base: PreTrainedModel, prompt: Embeddings | None, options: dict[str, Any]) -> None:
    """UnsupportedError for ways to generate that count a cache's tokens themselves, where vectors stand in it too."""
    if prompt is None or prompt.decoder is None:
        return
    settings = [vars(each) for each in (base.generation_config, options.get("generation_config")) if each is not None]
    names = ("assistant_model", "prompt_lookup_num_tokens", "cache_implementation", *api.CACHE_NAMES)
    for name in names:
        if any(each.get(name) is not None for each in (options, *settings)):
            raise UnsupportedError(
                f"{name} does not go with a prompt that has a part in front of the decoder's input, which stands in "
                "the cache; leave it out, or train with num_transformer_submodules=1."
            )


def _into_decoder(prompt: Embeddings, begun: list[bool]) -> Hook:
    """`begun` gets one entry per call: whether the vectors stand in its rows."""

    def hook(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call = Call.to(decoder, args, kwargs)
        begins, mask = not call.continues, call.mask
        assert prompt.decoder is not None
        if call.positions is not None or (isinstance(mask, Tensor) and mask.ndim != 2):
            raise ConfigError(
                "this prompt has a part in front of the decoder's input, which counts its positions and masks itself; "
                "pass no decoder_position_ids, and a decoder_attention_mask [B, T] or none."
            )
        if isinstance(mask, Tensor):
            seen = mask.new_ones(mask.shape[0], prompt.decoder.shape[1])
            call = call.but(mask=torch.cat([seen, mask], dim=1))
        if begins:
            embedded = embed(call, decoder.get_input_embeddings())
            vectors = spread(prompt.decoder, prompt.rows, embedded.shape[0]).to(embedded)
            call = call.but(ids=None, vectors=torch.cat([vectors, embedded], dim=1))
        begun.append(begins)
        return (), call.keywords(decoder)

    return hook


def _out_of_decoder(count: int, begun: list[bool]) -> Hook:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        start = count if begun.pop() else 0
        if isinstance(output, tuple):
            return (output[0][:, start:], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, start:]
        for name, cut in (
            ("hidden_states", lambda part: part[:, start:]),
            ("attentions", lambda part: part[:, :, start:, count:]),
            ("cross_attentions", lambda part: part[:, :, start:]),
        ):
            if output.get(name) is not None:
                output[name] = tuple(cut(part) for part in output[name])
        return output

    return hook


# ---- what comes out --------------------------------------------------------------------------------------------------


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
