"""The door into an encoder-decoder's decoder: vectors stand in front of its input, and no one outside sees them.

Hooks on the decoder put them there when a sequence begins, and cut them off what comes out. A cache holds them after
that, so later steps only widen the mask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.doors.embedding import embed
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.inputs import cached
from softprompt.prompt import Embeddings, spread

Hook = Callable[..., Any]


@contextmanager
def open_decoder(base: PreTrainedModel, prompt: Embeddings | None) -> Iterator[None]:
    """Inside the block `prompt.decoder` stands in front of the decoder's input.

    UnsupportedError for prompts of different lengths: positions and masks there are the decoder's own to count.
    """
    if prompt is None or prompt.decoder is None:
        yield
        return
    if prompt.lengths is not None:
        raise UnsupportedError(
            "prompts of different lengths with a part in front of the decoder's input cannot share a batch; call the "
            "model for the rows of each alone, or train with num_transformer_submodules=1."
        )
    decoder, begun = base.get_decoder(), []
    handles = [
        decoder.register_forward_pre_hook(_enter(prompt, begun), with_kwargs=True),
        decoder.register_forward_hook(_leave(prompt.decoder.shape[1], begun)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_decoding(base: PreTrainedModel, prompt: Embeddings | None, options: dict[str, Any]) -> None:
    """UnsupportedError for ways to generate that count a cache's tokens themselves, where vectors stand in it too."""
    if prompt is None or prompt.decoder is None:
        return
    settings = [vars(each) for each in (base.generation_config, options.get("generation_config")) if each is not None]
    for name in ("assistant_model", "prompt_lookup_num_tokens", "cache_implementation", "past_key_values"):
        if any(each.get(name) is not None for each in (options, *settings)):
            raise UnsupportedError(
                f"{name} does not go with a prompt that has a part in front of the decoder's input, which stands in "
                "the cache; leave it out, or train with num_transformer_submodules=1."
            )


def _enter(prompt: Embeddings, begun: list[bool]) -> Hook:
    """`begun` gets one entry per call: whether the vectors stand in its rows."""

    def hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = {**({"input_ids": args[0]} if args else {}), **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        mask, begins = inputs.get("attention_mask"), not cached(inputs)
        assert prompt.decoder is not None
        if "position_ids" in inputs or (isinstance(mask, Tensor) and mask.ndim != 2):
            raise ConfigError(
                "this prompt has a part in front of the decoder's input, which counts its positions and masks itself; "
                "pass no decoder_position_ids, and a decoder_attention_mask [B, T] or none."
            )
        if isinstance(mask, Tensor):
            inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], prompt.decoder.shape[1]), mask], dim=1)
        if begins:
            embedded = embed(inputs, decoder.get_input_embeddings())  # pyright: ignore[reportCallIssue]
            vectors = spread(prompt.decoder, prompt.rows, embedded.shape[0]).to(embedded)
            inputs["inputs_embeds"] = torch.cat([vectors, embedded], dim=1)
            inputs.pop("input_ids", None)
        begun.append(begins)
        return (), inputs

    return hook


def _leave(count: int, begun: list[bool]) -> Hook:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
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
