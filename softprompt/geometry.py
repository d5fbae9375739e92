"""One probe of a base model: which attention layers it has, what their keys look like, and whether it is causal."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.doors.attention import AttentionDoor, Recording
from softprompt.errors import UnsupportedError
from softprompt.prompt import Geometry, LayerShape, evaluating


def word_table(base: PreTrainedModel) -> Tensor:
    """The weight of the input embeddings `[V, d]`; its device and type are those a prompt enters in."""
    weight = base.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def record(door: AttentionDoor, inputs: dict[str, Tensor]) -> tuple[Recording, Tensor]:
    """Run the model's body (no head) and take down every layer's keys and values; also its first output."""
    recording = Recording()
    with door.open(None, recording):
        output = door.base.base_model(**inputs, use_cache=False, return_dict=True)
    return recording, output[0]


@torch.no_grad()
def probe(door: AttentionDoor) -> Geometry:
    """Find the model's geometry with two forward passes over two tokens, and tell the door its layers.

    Raises UnsupportedError for a model this version has no door for, naming what does work.
    """
    base = door.base
    if base.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(base).__name__} is an encoder-decoder, which is not supported yet; decoders and encoders are."
        )
    ids = _two_plain_ids(base)
    with evaluating(base):
        first, hidden = record(door, {"input_ids": ids})
        _, other = record(door, {"input_ids": ids[:, [0, 0]]})
    if not first.modules:
        raise UnsupportedError(
            f"{type(base).__name__} does not attend through transformers' AttentionInterface, so there is no door into "
            "it yet; families such as gpt2, llama, mistral, qwen, gemma, opt, gpt_neox, bert and roberta do."
        )
    causal = _same(hidden[0, 0], other[0, 0])
    _check_door_tells_all(door, first, causal)
    door.index = {module: number for number, module in enumerate(first.modules)}
    door.position_offset = _position_offset(base)
    config = base.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    context = None if context is None else context - door.position_offset
    learned = _position_table(base) is not None
    door.learned_positions = context if learned else None
    return Geometry(
        layers=tuple(_shape(pair, window) for pair, window in zip(first.layers, first.windows, strict=True)),
        hidden_size=word_table(base).shape[1],  # ELECTRA's embeddings, say, are narrower than its layers
        query_heads=config.num_attention_heads,
        causal=causal,
        context=context,
        learned_positions=learned,
        position_offset=door.position_offset,
        shared_layers=_repeats(first),
    )


def _check_door_tells_all(door: AttentionDoor, recording: Recording, causal: bool) -> None:
    """UnsupportedError where keys and values at shifted positions are not all that a prompt changes in a model."""
    base, kind = door.base, type(door.base).__name__
    layers = base.config.get_text_config().num_hidden_layers
    if base._is_stateful or (causal and len(recording.modules) < layers):
        raise UnsupportedError(
            f"{kind} attends through transformers' AttentionInterface in {len(recording.modules)} of {layers} layers "
            "and keeps a state of another kind, which a prompt does not reach; use a model of attention layers alone."
        )
    if causal and _repeats(recording):
        raise UnsupportedError(
            f"{kind} runs one attention layer several times, which keys and values cannot tell apart yet; use a model "
            "whose layers are all different."
        )
    if causal and not door.takes_positions:
        raise UnsupportedError(
            f"{kind}.forward takes no position_ids, so real tokens cannot be moved behind a prompt; use a model that "
            "takes them, such as gpt2, llama, mistral, qwen, gemma, opt or gpt_neox."
        )


def _repeats(recording: Recording) -> bool:
    """Whether layers share one attention module, as in ALBERT."""
    return len(set(recording.modules)) < len(recording.modules)


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
