"""What a caller's inputs say: rows of several sequences, labels for every token, caches, gaps in the positions."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.errors import ConfigError


def check_count(adapter_names: Any, inputs: dict[str, Any]) -> None:
    """ConfigError unless there is one adapter name for each row of the inputs."""
    if adapter_names is None:
        return
    if isinstance(adapter_names, str) or not all(isinstance(each, str) for each in adapter_names) or not adapter_names:
        raise ConfigError(f"adapter_names={adapter_names!r}; give a list with the name of an adapter for each row.")
    for name in ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids"):
        rows = inputs.get(name)
        if rows is not None and len(rows) != len(adapter_names):
            raise ConfigError(
                f"{len(adapter_names)} adapter_names and {len(rows)} rows in {name}; give one name per row."
            )


def packed(inputs: dict[str, Any]) -> bool:
    """Whether a row holds several sequences (positions that start again, and no mask).

    Positions of three dimensions are those of images, and stand still within one.
    """
    positions = inputs.get("position_ids")
    if positions is None or positions.ndim != 2 or inputs.get("attention_mask") is not None:
        return False
    return bool((positions[:, 1:] <= positions[:, :-1]).any())


def apart(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a forward pass with no cache where a row holds several sequences.

    transformers keeps them apart only where there is none, and makes one by default: then each would see the earlier.
    """
    if inputs.get("position_ids") is None or inputs.get("past_key_values") is not None:
        return inputs
    if torch.compiler.is_compiling() or not packed(inputs):
        return inputs
    return {**inputs, "use_cache": False}


def with_mask(inputs: dict[str, Any], always: bool = False) -> dict[str, Any]:
    """The inputs with a mask of ones, if none is given: without one, transformers takes any gap in the positions for
    the start of another sequence, which then would not see the virtual token in its row."""
    if inputs.get("attention_mask") is not None or (inputs.get("position_ids") is None and not always):
        return inputs
    ids = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    assert ids is not None
    return {**inputs, "attention_mask": torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)}


def with_pooling_mask(inputs: dict[str, Any], base: PreTrainedModel, slots: Tensor | None) -> dict[str, Any]:
    """The inputs of a sequence classifier with a mask over the padding behind its rows, if none is given.

    A decoder's classifier looks for a row's last token by the padding id; where vectors take the ids' place it cannot.
    """
    ids, padding = inputs.get("input_ids"), base.config.get_text_config().pad_token_id
    classifies = type(base).__name__.endswith("ForSequenceClassification")
    if ids is None or padding is None or inputs.get("attention_mask") is not None or not classifies:
        return inputs
    empty = ids == padding if slots is None else (ids == padding) & (slots < 0).to(ids.device)
    return {**inputs, "attention_mask": 1 - empty.long().flip(1).cumprod(1).flip(1)}


def cached(inputs: dict[str, Any]) -> bool:
    """Whether a cache (or a recurrent model's state) that has seen tokens comes with the inputs."""
    cache = inputs.get("past_key_values") if inputs.get("past_key_values") is not None else inputs.get("cache_params")
    if cache is None:
        return False
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # no attention layer in it
        return cache.has_previous_state()


def labels_tokens(inputs: dict[str, Any]) -> bool:
    """Whether every token of a row that is given from its beginning has a label."""
    labels, cache = inputs.get("labels"), inputs.get("past_key_values")
    ids = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if labels is None or labels.is_floating_point() or ids is None or labels.shape != ids.shape[:2]:
        return False
    return cache is None or cache.get_seq_length() == 0


def decodes_row(inputs: dict[str, Any]) -> bool:
    """Whether an encoder-decoder's decoder gets the row itself, shifted, as some heads do without a target."""
    if any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs")):
        return False
    labels = inputs.get("labels")
    return labels is None or labels.ndim < 2 or labels.is_floating_point()


def beyond_text(inputs: dict[str, Any]) -> bool:
    """Whether images, videos or sounds come with the row, whose places the model finds by the ids."""
    return any(name.startswith(("pixel_values", "image_", "video_", "input_features")) for name in inputs)


def check_written(inputs: dict[str, Any]) -> None:
    """ConfigError for padding before what is written: a decoder counts its distance to a prefix by columns."""
    mask = inputs.get("decoder_attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all()):
        raise ConfigError(
            "decoder_attention_mask hides the beginning of a row, but this decoder counts its positions from the first "
            "column, behind the prefix; pad decoder_input_ids on the right."
        )


def without_cache(inputs: dict[str, Any]) -> dict[str, Any]:
    """A cache would hold the row as it was rearranged, and its virtual token as if it were a real one."""
    if inputs.get("past_key_values") is not None:
        raise ConfigError("labels and past_key_values together: the loss needs the whole row, so pass no cache.")
    return {**inputs, "use_cache": False}
