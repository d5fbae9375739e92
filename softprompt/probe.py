"""One probe of a base model: which attention layers it has, what their keys look like, and whether it is causal."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from softprompt.doors.attention import AttentionDoor
from softprompt.doors.cache import CacheDoor, Door, fills_cache
from softprompt.doors.opening import Recording
from softprompt.elsewhere import at_hand, embed_words, word_table
from softprompt.errors import UnsupportedError
from softprompt.geometry import Geometry, LayerShape
from softprompt.prompt import evaluating


def record(door: Door, inputs: dict[str, Tensor]) -> tuple[Recording, Tensor]:
    """Run the model's body (no head) and take down every layer's keys and values; also its first output."""
    recording = Recording()
    with at_hand(door.base), door.open(None, recording):
        output = door.base.base_model(**inputs, use_cache=False, return_dict=True)
    return recording, output[0]


def find_door(base: PreTrainedModel) -> tuple[Door, Geometry]:
    """The door into a model: its attention, or the cache of a decoder that attends in code of its own."""
    door = AttentionDoor(base)
    geometry = probe(door)
    if geometry.layers or not geometry.causal or not fills_cache(base):
        return door, geometry
    through_cache = CacheDoor(base)
    seen = probe(through_cache)
    if not seen.layers:
        return door, geometry
    with evaluating(base):
        through_cache.check(_two_plain_ids(base))
    return through_cache, seen


@torch.no_grad()
def probe(door: Door) -> Geometry:
    """Find the model's geometry with two forward passes over two tokens, and tell the door its layers.

    Raises UnsupportedError for a model this version has no door for, naming what does work.
    """
    if isinstance(door, AttentionDoor) and door.encoder_decoder:
        return _probe_encoder_decoder(door)
    base = door.base
    ids = _two_plain_ids(base)
    with evaluating(base):
        first, hidden = record(door, {"input_ids": ids})
        door.bind(first.modules, [], [])
        if isinstance(door, AttentionDoor):
            door.sharing = first.sharing
        if not first.modules:  # the door now leaves the model alone
            _, hidden = record(door, {"input_ids": ids})
        _, other = record(door, {"input_ids": ids[:, [0, 0]]})
    causal = _same(hidden[0, 0], other[0, 0])
    attending = len(first.modules) + len(first.sharing)
    foldable = causal and not base._is_stateful and attending >= _number_of_layers(base)
    reasons = {"no_prefix": _no_prefix(base, first, causal), "no_vectors": _no_vectors(base, ids)}
    divides = causal and _divides_loss(base, ids)
    geometry = _geometry(door, first, causal=causal, foldable=foldable, divides_loss=divides, **reasons)
    _check_positions(door, geometry)
    return geometry


def _probe_encoder_decoder(door: AttentionDoor) -> Geometry:
    """Two source tokens and three target tokens tell the three kinds of attention apart."""
    base = door.base
    ids = _two_plain_ids(base)
    with evaluating(base):
        found, _ = record(door, {"input_ids": ids, "decoder_input_ids": ids[:, [0, 1, 0]]})
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for number, (queries, (key, _)) in enumerate(zip(found.queries, found.layers, strict=True)):
        parts[2 if queries == 2 else 1 if key.shape[2] == 2 else 0].append(number)
    own, cross, encoder = parts
    if not own or not encoder:
        raise UnsupportedError(
            f"{type(base).__name__} does not attend through transformers' AttentionInterface, so there is no door into "
            "it; encoder-decoders such as t5, bart, mbart, pegasus and blenderbot do."
        )
    door.bind(*([found.modules[number] for number in part] for part in parts))
    divides = _divides_loss(base, ids)
    geometry = _geometry(door, found, causal=False, foldable=False, encoder_decoder=True, divides_loss=divides)
    shapes = geometry.layers
    return replace(
        geometry,
        layers=tuple(shapes[n] for n in own),
        cross_layers=tuple(shapes[n] for n in cross),
        encoder_layers=tuple(shapes[n] for n in encoder),
    )


def _geometry(door: Door, found: Recording, **facts: Any) -> Geometry:
    """What every kind of model has; also tells the door where positions end."""
    base = door.base
    config = base.config.get_text_config()
    door.position_offset = _position_offset(base)
    context = getattr(config, "max_position_embeddings", None)
    context = door.learned_positions if context is None else context - door.position_offset
    learned = _position_table(base) is not None
    door.learned_positions = context if learned else door.learned_positions
    return Geometry(
        layers=tuple(_shape(pair, window) for pair, window in zip(found.layers, found.windows, strict=True)),
        hidden_size=word_table(base).shape[1],  # ELECTRA's embeddings, say, are narrower than its layers
        query_heads=getattr(config, "num_attention_heads", 0) or 0,
        context=context,
        learned_positions=learned,
        position_offset=door.position_offset,
        **facts,
    )


def _number_of_layers(base: PreTrainedModel) -> int:
    return base.config.get_text_config().num_hidden_layers


def _no_prefix(base: PreTrainedModel, found: Recording, causal: bool) -> str:
    """Why no keys and values can be put before this model's own."""
    if found.modules:
        return ""
    if causal and base._is_stateful:
        return f"{type(base).__name__} has a state instead of attention, so keys and values cannot reach it"
    return f"{type(base).__name__} does not attend through transformers' AttentionInterface"


def _no_vectors(base: PreTrainedModel, ids: Tensor) -> str:
    """Why no vectors can stand in this model's input: Gemma 4's smaller ones look the ids up again in every layer."""
    vectors = 1.5 * embed_words(base.get_input_embeddings(), ids)  # no words
    try:
        with evaluating(base):
            base.base_model(inputs_embeds=vectors, use_cache=False)
    except (RuntimeError, ValueError, TypeError):
        return f"{type(base).__name__} takes no vectors in place of words"
    return ""


def _divides_loss(base: PreTrainedModel, ids: Tensor) -> bool:
    """Whether a language model's loss is what transformers' Trainer asks for; a loss of its own may be anything.

    What else it adds, as a mixture of experts does, is the same whatever the labels are divided by.
    """
    if base.get_output_embeddings() is None:
        return False
    shift = 0 if base.config.is_encoder_decoder else 1  # what stands for a token predicts it there, not the next one
    first: Tensor | None = None
    for items in (4, 8):
        try:
            with evaluating(base):
                output = base(input_ids=ids, labels=ids, num_items_in_batch=items, use_cache=False, return_dict=True)
        except TypeError:
            return False
        total = cross_entropy(output.logits[0, : 2 - shift].float(), ids[0, shift:], reduction="sum")
        beyond = output.loss - total / 4 if first is None else first - output.loss - total / 8
        if bool(beyond.abs() <= 1e-3 * total):
            return True
        first = output.loss
    return False


def _check_positions(door: Door, geometry: Geometry) -> None:
    """UnsupportedError where positions that follow the prompt are not all that it changes in a decoder."""
    kind = type(door.base).__name__
    if isinstance(door, AttentionDoor) and geometry.causal and geometry.layers and not door.takes_positions:
        raise UnsupportedError(
            f"{kind}.forward takes no position_ids, so real tokens cannot be moved behind a prompt; use a model that "
            "takes them, such as gpt2, llama, mistral, qwen, gemma, opt or gpt_neox."
        )


def _same(first: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: experts, say, may put the same token through kernels of another batch size."""
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((first - other).float().norm() <= tolerance * first.float().norm())


def _shape(pair: tuple[Tensor, Tensor], window: int | None) -> LayerShape:
    key, value = pair
    return LayerShape(key.shape[1], key.shape[3], value.shape[3], window)


def _two_plain_ids(base: PreTrainedModel) -> Tensor:
    """Two different token ids `[1, 2]`, neither of them padding (which some models' positions skip)."""
    special = {base.config.get_text_config().pad_token_id}
    plain = [token for token in range(4) if token not in special][:2]
    return torch.tensor([plain], device=word_table(base).device)


def _position_table(base: PreTrainedModel) -> nn.Embedding | None:
    """The table of learned absolute positions, if the model has one."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    words = base.get_input_embeddings()
    for name, module in base.base_model.named_modules():
        named = "position" in name or name.endswith("wpe")
        if isinstance(module, nn.Embedding) and module is not words and named and limit is not None:
            return module
    return None


def _position_offset(base: PreTrainedModel) -> int:
    """What must be added to a position given to the model: RoBERTa-like models count from `padding_idx + 1`."""
    table = _position_table(base)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1
