"""Composing prefixes: the keys and values of several texts or cartridges, one behind the other.

Each was made at positions 0…p−1. Rotary position embedding turns a key by an angle proportional to its position
(2104.09864, equation 15), so that the second prefix is moved to positions p₁, p₁+1, … by turning its keys on by p₁;
values have no position. Which turn a model makes is read from its own frequencies and then proved on the model: single
tokens, which see nothing but themselves, are run at both places, and the turned key has to be the model's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt import checkpoint
from softprompt import transformers_api as api
from softprompt.base_model import find_way
from softprompt.config import KVConfig
from softprompt.elsewhere import word_table
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.facts import Facts, record
from softprompt.injection.contract import Way
from softprompt.model import SoftPromptModel
from softprompt.pairs import narrowed, widened
from softprompt.prompt import KV, evaluating

PROBE_TOKENS = 4


@dataclass(frozen=True)
class Turn:
    """How a layer turns its keys: `frequencies` `[m]`, in radians per position, for 2m of a head's numbers.

    They begin at `start`. A pair is two neighbours where they are `interleaved`, else numbers m apart.
    """

    frequencies: Tensor
    start: int = 0
    interleaved: bool = False

    def __call__(self, key: Tensor, positions: Tensor | int) -> Tensor:
        """`key` `[…, t, k]` moved on by `positions` (`[…]`, one for all t tokens and heads)."""
        angles = torch.as_tensor(positions, device=key.device)[..., None].double() * self.frequencies.to(key).double()
        cos, sin = angles.cos().to(key), angles.sin().to(key)
        before, turned, behind = key.split([self.start, 2 * angles.shape[-1], self._rest(key)], dim=-1)
        one, other = turned.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else turned.chunk(2, dim=-1)
        parts = (one * cos - other * sin, other * cos + one * sin)
        turned = torch.stack(parts, dim=-1).flatten(-2) if self.interleaved else torch.cat(parts, dim=-1)
        return torch.cat([before, turned, behind], dim=-1)

    def _rest(self, key: Tensor) -> int:
        return key.shape[-1] - self.start - 2 * len(self.frequencies)


def compose_prefixes(model: SoftPromptModel | PreTrainedModel, prefixes: Sequence[KV], rerotate: bool = True) -> KV:
    """The prefixes of one model behind each other, as one of `[1, h, p₁ + p₂ + …, k]` per layer.

    The first stays at positions 0…p₁−1, the second's keys are moved to p₁…p₁+p₂−1, and so on. `rerotate=False` leaves
    all keys as they are, as PEFT and the paper do. Raises UnsupportedError where keys cannot be moved exactly (learned
    positions, for one), ConfigError for prefixes that are not of this model or do not fit into its context.
    """
    way, facts = _of(model)
    _check(prefixes, facts)
    lengths = [prefix.length for prefix in prefixes]
    offsets = [sum(lengths[:number]) for number in range(len(lengths))]
    if rerotate and len(prefixes) > 1:
        turns = _turns(way, lengths[1:], offsets[1:])
        moved = [_moved(each, turns, offset) for each, offset in zip(prefixes[1:], offsets[1:], strict=True)]
        prefixes = [prefixes[0], *moved]
    layers = zip(*(each.layers for each in prefixes), strict=True)
    joined = (tuple(torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True)) for pairs in layers)
    return replace(prefixes[0], layers=tuple((key, value) for key, value in joined))


def _of(model: SoftPromptModel | PreTrainedModel) -> tuple[Way, Facts]:
    return (model.way, model.facts) if isinstance(model, SoftPromptModel) else find_way(model)


def _check(prefixes: Sequence[KV], facts: Facts) -> None:
    if not prefixes:
        raise ConfigError("there are no prefixes to compose; give two or more.")
    if not facts.causal or not facts.layers:
        raise UnsupportedError(
            "prefixes are composed for decoders with attention only: elsewhere their tokens stand in no order."
        )
    needed = [(layer.heads, layer.key_size, layer.value_size) for layer in facts.layers]
    for number, prefix in enumerate(prefixes):
        found = [(key.shape[1], key.shape[3], value.shape[3]) for key, value in prefix.layers]
        if found != needed or prefix.cross or prefix.encoder or prefix.layers[0][0].shape[0] != 1:
            raise ConfigError(
                f"prefix {number} has (heads, key size, value size) {found} in its layers, but this model needs one of "
                f"{needed}; compose prefixes of this model."
            )
    if len({prefix.always_visible for prefix in prefixes}) > 1:
        raise ConfigError("only some of these prefixes are visible beyond a sliding window; make them alike.")
    total = sum(prefix.length for prefix in prefixes)
    if facts.context is not None and total >= facts.context:
        raise ConfigError(
            f"the prefixes have {total} tokens together, which leaves no room in this model's context of "
            f"{facts.context}; compose fewer or shorter ones."
        )


def _moved(prefix: KV, turns: Sequence[Turn | None], offset: int) -> KV:
    pairs = zip(prefix.layers, turns, strict=True)
    return replace(prefix, layers=tuple((_turned(key, turn, offset), value) for (key, value), turn in pairs))


@torch.no_grad()
def _turns(way: Way, lengths: list[int], offsets: list[int]) -> list[Turn | None]:
    """How each layer moves the keys of prefixes of these lengths by these offsets; None: its keys have no position.

    The last token of each prefix is what the proof is made on: frequencies that depend on the length of a text differ
    most there. UnsupportedError unless the model's own keys and values come out.
    """
    tokens = _plain_tokens(way)
    ends = torch.tensor(lengths, device=tokens.device)[:, None, None].expand(-1, *tokens.shape) - 1
    shifts = torch.tensor(offsets, device=tokens.device)[:, None, None].expand_as(ends)
    with evaluating(way.base):
        alone = [_keys_at(way, tokens, end) for end in ends]
        moved = _keys_at(way, tokens.repeat(len(ends), 1), (ends + shifts).flatten(0, 1))
    found: list[Turn | None] = []
    for layer, (key, value) in enumerate(moved):
        before, values = (torch.cat([run[layer][part] for run in alone]) for part in range(2))
        candidates = [None, *_candidates(way.base, key.shape[-1])]
        errors = [_error(_turned(before, turn, shifts.flatten(0, 1)[:, :, None]), key) for turn in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        exact = key.dtype in (torch.float32, torch.float64)
        if max(errors[best], _error(values, value)) > (1e-3 if exact else 2e-2):
            raise UnsupportedError(_why_not(way.base))
        found.append(candidates[best])
    return found


def _turned(key: Tensor, turn: Turn | None, positions: Tensor | int) -> Tensor:
    return key if turn is None else turn(key, positions)


def _keys_at(way: Way, tokens: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    recording, _ = record(way, {"input_ids": tokens, "position_ids": positions + way.position_offset})
    return recording.layers


def _plain_tokens(way: Way) -> Tensor:
    """Rows of one token each, `[PROBE_TOKENS, 1]`, spread over the vocabulary."""
    table = word_table(way.base)
    return torch.linspace(4, table.shape[0] - 2, PROBE_TOKENS).long().to(table.device)[:, None]


def _candidates(base: PreTrainedModel, key_size: int) -> list[Turn]:
    """Every way in which keys of this size may be turned, by any of the frequencies that the model holds."""
    found = []
    for frequencies in _frequencies(base):
        for start in sorted({0, key_size - 2 * len(frequencies)}):
            found += [Turn(frequencies, start, style) for style in (False, True) if start >= 0]
    return [turn for turn in found if turn.start + 2 * len(turn.frequencies) <= key_size]


def _frequencies(base: PreTrainedModel) -> list[Tensor]:
    """`[m]` each, in radians per position; GPT-J has them as a table of sines and cosines, `[positions, 2m]`."""
    found = list(api.rotary_frequencies(base))
    table = next((each for each in api.fixed_tables(base) if isinstance(each, Tensor) and each.ndim == 2), None)
    if table is not None:
        sines, cosines = table[1].float().chunk(2)
        found.append(torch.atan2(sines, cosines))
    return found


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).float().norm() / other.float().norm().clamp(min=1e-12))


def _why_not(base: PreTrainedModel) -> str:
    return (
        f"{type(base).__name__} does not turn keys by a fixed angle per position (its positions are learned, or its "
        "frequencies change with the length), so a prefix cannot be moved behind another exactly; start one prefix "
        "from both texts, or pass rerotate=False to leave the keys where they are."
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path],
    *,
    output_path: str | Path,
    safe_serialization: bool = True,
    model: SoftPromptModel | PreTrainedModel | None = None,
    rerotate: bool = True,
) -> None:
    """Write one cartridge that is several saved ones, behind each other; the first one's frozen tokens stay frozen.

    `model` is the base model they were trained for; without it, the one that the first names is loaded, to read how it
    turns keys. `rerotate=False` needs no model and leaves the keys as PEFT does, all at positions 0, 1, …
    """
    if not safe_serialization:
        raise ConfigError("safe_serialization=False would write a pickle; adapters are saved as safetensors only.")
    if len(adapter_paths) < 2:
        raise ConfigError(f"{len(adapter_paths)} adapters were given to compose; give at least 2.")
    saved = [_cartridge(path) for path in adapter_paths]
    config = saved[0].config
    assert isinstance(config, KVConfig)
    for each in saved[1:]:
        for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "layer_shapes"):
            if getattr(each.config, name) != getattr(config, name):
                raise ConfigError(
                    f"{each.source} has {name} {getattr(each.config, name)}, {saved[0].source} has "
                    f"{getattr(config, name)}; compose cartridges of one model and task."
                )
    flats = [each.tensors["prompt_embeddings"] for each in saved]
    if rerotate:
        base = _base_of(config) if model is None else model
        own = [narrowed(flat, config) if config.padded else flat for flat in flats]
        flat = compose_prefixes(base, [KV.from_flat(each.float(), config) for each in own]).flat()
        flats = [widened(flat, config) if config.padded else flat]
    joined = torch.cat(flats)
    config = replace(config, num_virtual_tokens=len(joined))
    checkpoint.save_adapter(Path(output_path), config, {"prompt_embeddings": joined})


def _cartridge(path: str | Path) -> "checkpoint.SavedAdapter":
    saved = checkpoint.load_adapter(path)
    if saved.config.peft_type != "CARTRIDGE":
        raise ConfigError(f"{path} is a {saved.config.peft_type} adapter, not a CARTRIDGE; compose_prefixes takes any.")
    if len(saved.tensors) > 1:
        raise ConfigError(f"{path} has a task head, and two heads cannot be one; compose cartridges without heads.")
    return saved


def _base_of(config: KVConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    name = config.base_model_name_or_path
    try:
        return AutoModelForCausalLM.from_pretrained(name or "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the base model {name!r} cannot be loaded to turn keys by; pass it as model=, or pass rerotate=False."
        ) from error
