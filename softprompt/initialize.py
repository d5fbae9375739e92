"""Starting a prompt from something: a text, a chat, a cache.

A KV prefix taken from a text makes the model behave, before any training, as if that text stood in its context.
"""

from typing import Any

import torch
from torch import Tensor

from softprompt.config import KVConfig
from softprompt.elsewhere import embed_words, place_of, words_of
from softprompt.errors import ConfigError
from softprompt.facts import record
from softprompt.model import SoftPromptModel
from softprompt.prompt import KV, EmbeddingPrompt, KVPrompt, evaluating
from softprompt.vocabulary import check_ids


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """A cache of one sequence as a flat prefix `[num_virtual_tokens, L·2·h·k]`, its first tokens.

    Takes a `Cache`, or a list of `(key, value)` pairs `[1, h, t, k]`. Raises ConfigError (a ValueError) for an empty
    cache, one of several rows, one that is too short, or layers of different shapes.
    """
    kv = _cache_to_kv(past_key_values)
    if kv.length < num_virtual_tokens:
        raise ConfigError(f"Need at least {num_virtual_tokens} cached tokens, got {kv.length}; give a longer text.")
    return kv.truncate(num_virtual_tokens).flat()


def _cache_to_kv(cache: Any) -> KV:
    layers = getattr(cache, "layers", None)
    if layers is not None:
        pairs = [_first_tokens(layer, cache.get_seq_length(number)) for number, layer in enumerate(layers)]
    elif isinstance(cache, list | tuple):
        pairs = [(layer[0], layer[1]) for layer in cache]
    else:
        raise ConfigError(
            f"past_key_values is a {type(cache).__name__}; give a transformers Cache or (key, value) pairs."
        )
    if not pairs or any(not isinstance(part, Tensor) or part.numel() == 0 for pair in pairs for part in pair):
        raise ConfigError("Empty `past_key_values`; run the model with use_cache=True first.")
    for key, value in pairs:
        if key.ndim != 4 or key.shape[0] != 1 or value.shape[0] != 1:
            raise ConfigError(
                f"past_key_values of shape {tuple(key.shape)}: one sequence, [1, heads, tokens, size], is needed."
            )
        if not key.shape == value.shape == pairs[0][0].shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in (pairs[0][0], key, value))
            raise ConfigError(f"keys or values of different shapes ({shapes}) cannot be one prefix.")
    return KV(tuple(pairs))


def _first_tokens(layer: Any, seen: int) -> tuple[Any, Any]:
    """Key and value of the tokens a cache's layer has seen; a static cache is longer, a sliding one may be shorter."""
    if isinstance(layer.keys, Tensor) and layer.keys.shape[2] < seen:
        raise ConfigError(
            f"past_key_values holds the last {layer.keys.shape[2]} of {seen} tokens in a layer with a sliding window, "
            "not the first ones; give a text no longer than the window."
        )
    return (layer.keys[:, :, :seen], layer.values[:, :, :seen]) if isinstance(layer.keys, Tensor) else (None, None)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: SoftPromptModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Start a KV prefix from a cache; with `prefix_projection` its FFN is fitted to the cache.

    Returns the flat prefix `[num_virtual_tokens, L·2·h·k]` that was loaded.
    """
    encoder = _kv_encoder(model, adapter_name)
    count = num_virtual_tokens or encoder.config.num_virtual_tokens
    flat = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    encoder.start_from(flat.float())
    return flat


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: SoftPromptModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Start a KV prefix from the first tokens of a text, as the base model's own keys and values.

    With `use_chat_template` the text is a system message, where the tokenizer has a template. With
    `prefix_projection` the FFN is fitted. Raises ConfigError (a ValueError) if the text has too few tokens.
    """
    encoder = _kv_encoder(model, adapter_name)
    count = num_virtual_tokens or encoder.config.num_virtual_tokens
    ids = _text_ids(tokenizer, text, use_chat_template)[:max_length]
    flat = _kv_of_ids(model, ids, _kv_config(encoder), count).flat()
    encoder.start_from(flat.float())
    return flat


@torch.no_grad()
def initialize_from_text(model: SoftPromptModel, tokenizer: Any, text: str, adapter_name: str | None = None) -> float:
    """Start any prompt from the first tokens of a text: keys and values, or word embeddings, whichever it is made of.

    An encoder (FFN, MLP, LSTM) is fitted so that it puts out just that. Returns how far it is from it, relative to its
    size: 0, up to rounding, unless there are more tokens than hidden units. ConfigError if the text has too few tokens.
    """
    encoder = model.encoder(adapter_name)
    ids = _text_ids(tokenizer, text, use_chat_template=False)
    if isinstance(encoder, KVPrompt):
        target = _kv_of_ids(model, ids, _kv_config(encoder), encoder.config.num_virtual_tokens).flat().float()
    else:
        assert isinstance(encoder, EmbeddingPrompt)
        count = encoder.embedding.num_embeddings
        _check_enough(ids, count)
        target = embed_words(words_of(model.base_model), ids[:count]).float()
    encoder.start_from(target)
    return float((encoder.saved_vectors() - target).norm() / target.norm().clamp(min=1e-30))


def _kv_encoder(model: SoftPromptModel, adapter_name: str | None) -> KVPrompt:
    encoder = model.encoder(adapter_name)
    if not isinstance(encoder, KVPrompt):
        raise ConfigError(
            f"Adapter {adapter_name or model.active_adapter!r} is {encoder.name}, whose prompt is not keys and values; "
            "use initialize_from_text."
        )
    return encoder


def _kv_config(encoder: KVPrompt) -> KVConfig:
    assert isinstance(encoder.config, KVConfig)
    return encoder.config


def _text_ids(tokenizer: Any, text: str, use_chat_template: bool) -> list[int]:
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        encoded = tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=False, return_dict=True)
        return list(encoded["input_ids"])
    return list(tokenizer(text)["input_ids"])


def _check_enough(ids: list[int], count: int) -> None:
    if len(ids) < count:
        raise ConfigError(
            f"the text has {len(ids)} tokens, but num_virtual_tokens={count} are needed; give a longer text or use "
            "fewer virtual tokens."
        )


def _kv_of_ids(model: SoftPromptModel, ids: list[int], config: KVConfig, count: int) -> KV:
    """The base model's keys and values of the first `count` tokens, in the attentions that a prefix reaches."""
    _check_enough(ids, count)
    check_ids(model.base_model.get_input_embeddings(), ids[:count])
    device = place_of(model.base_model)
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([ids[:count]], device=device)}
    if model.facts.encoder_decoder:  # both stacks read the text
        inputs["decoder_input_ids"] = inputs["input_ids"]
    elif model.way.takes_positions:
        inputs["position_ids"] = torch.arange(count, device=device)[None] + model.way.position_offset
    with evaluating(model.base_model):
        recording, _ = record(model.way, inputs)
    if not model.facts.encoder_decoder:
        return KV(tuple(recording.layers)).detach()
    pairs = dict(zip(recording.modules, recording.layers, strict=True))
    wanted = (config.decoder_prefix, config.cross_prefix, config.encoder_prefix)
    own, cross, encoder = (
        tuple(pairs[module] for module in modules) if want else ()
        for modules, want in zip(model.way.modules, wanted, strict=True)
    )
    return KV(own, cross, encoder).detach()
