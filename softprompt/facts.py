"""What the parts of this library need to know about a base model, found by trying it: once, when it is wrapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import get_ident
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.config import KVConfig, Placement
from softprompt.elsewhere import at_hand, dispatched, embed_words, sharded, word_table, words_of
from softprompt.errors import ConfigError, SoftPromptError, UnsupportedError
from softprompt.injection.attention_kv import AttentionWay, is_encoder_decoder
from softprompt.injection.cache_kv import CacheWay, fills_cache
from softprompt.injection.contract import Limits, Way
from softprompt.injection.scope import Recording
from softprompt.prompt import KV, evaluating

FIRST, BEHIND = 3, 5
"""A decoder is tried with two rows that begin with the same tokens, and with how many others behind them; the canary
takes the first for its prompt, and the rest for its rows."""
_EQUAL, _HALF_EQUAL = 1e-5, 2e-2


@dataclass(frozen=True)
class LayerShape:
    """Key and value shape of one attention layer, for one token; `window` is its sliding window, `chunk` the size of
    the pieces that it cannot look out of, if any."""

    heads: int
    key_size: int
    value_size: int
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Facts:
    """What a probe forward pass found out about a base model (never read from a list of config key names).

    `layers` are the self-attention layers (on encoder-decoders the decoder's; `cross_layers` and `encoder_layers` are
    the others), `hidden_size` the width of the input embeddings, `context` the number of tokens that have a position.
    `foldable`: a prompt in front leaves nothing but keys and values, so it can be computed once for all rows.
    Three facts cost a trial of their own, which `loss`, `vectors` and `side` make when they are first asked for.
    """

    layers: tuple[LayerShape, ...]
    hidden_size: int
    query_heads: int
    causal: bool
    context: int | None
    learned_positions: bool
    position_offset: int
    foldable: bool = True
    shared_layers: int = 0
    encoder_decoder: bool = False
    cross_layers: tuple[LayerShape, ...] = ()
    encoder_layers: tuple[LayerShape, ...] = ()
    no_prefix: str = ""
    """Why keys and values cannot reach this model, if they cannot."""
    loss: Callable[[], bool] = field(default=bool, compare=False)
    vectors: Callable[[], str] = field(default=str, compare=False)
    side: Callable[[], str] = field(default=str, compare=False)
    how: Mapping[str, str] = field(default_factory=dict, compare=False)
    """How each fact was found, by its name."""

    @cached_property
    def divides_loss(self) -> bool:
        """Whether the model's loss is the sum over labels, divided by `num_items_in_batch` where that is given."""
        return self.loss()

    @cached_property
    def no_vectors(self) -> str:
        """Why vectors cannot stand in the model's input, if they cannot."""
        return self.vectors()

    @cached_property
    def padding(self) -> str:
        """On which side of its rows an encoder takes padding: the left where its head reads the last column."""
        return self.side() or "right"

    def can_fold(self, placement: Placement) -> bool:
        """Whether the model can take vectors that stand there as keys and values."""
        return self.foldable and placement is Placement.FRONT

    @property
    def reach(self) -> int | None:
        """How far the shortest-sighted layer sees: the least window or chunk of any."""
        return min((size for layer in self.layers for size in (layer.window, layer.chunk) if size), default=None)

    def prefix_layers(self, config: KVConfig) -> tuple[LayerShape, ...]:
        """The attention layers a prefix reaches: decoder (or only) self-attention, cross-attention, encoder.

        Raises UnsupportedError where nothing attends, ConfigError for parts the model does not have.
        """
        if self.no_prefix:
            remedy = "another model" if self.no_vectors else "prompt_tuning or p_tuning"
            raise UnsupportedError(f"{self.no_prefix}; use {remedy}.")
        if config.prefix_always_visible and not any(layer.window for layer in self.layers):
            raise ConfigError(
                "prefix_always_visible is for models with a sliding window, which no layer here that takes a prefix "
                "has; leave it unset."
            )
        if not self.encoder_decoder and (config.cross_prefix or config.encoder_prefix or not config.decoder_prefix):
            raise ConfigError(
                "decoder_prefix, cross_prefix and encoder_prefix choose between the attentions of an encoder-decoder, "
                "which this model is not; leave them unset."
            )
        return (
            (self.layers if config.decoder_prefix else ())
            + (self.cross_layers if config.cross_prefix else ())
            + (self.encoder_layers if config.encoder_prefix else ())
        )


@dataclass(frozen=True)
class Tried:
    """What a decoder alone made of the tokens `ids` `[2, T]` that it was tried with: `states` `[2, T, …]` (logits, if
    it has a head for words), and each layer's `keys` and values of the `FIRST` tokens that both rows begin with."""

    ids: Tensor
    states: Tensor
    keys: KV


# ---- finding them ----------------------------------------------------------------------------------------------------


def record(way: Way, inputs: dict[str, Any]) -> tuple[Recording, Tensor]:
    """Run the model's body (no head) and take down every layer's keys and values; also its first output."""
    recording = Recording()
    with at_hand(way.base), way.recorded(recording):
        output = way.base.base_model(**inputs, use_cache=False, return_dict=True)
    return recording, output[0]


def reader(base: PreTrainedModel) -> PreTrainedModel:
    """What of a model tells of each token: a model of words itself, another one's body, since heads ask for rows of
    their own."""
    return base if base.get_output_embeddings() is not None else api.own(base)


def states_of(module: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    """What a model alone makes of each token of `ids` `[B, T]`: logits, or the last states, `[B, T, …]`."""
    use = {"use_cache": False} if api.takes_option(module.forward, "use_cache") else {}
    return states(module(input_ids=ids, return_dict=True, **use, **api.without_losses(module), **more))


def states(output: Any) -> Tensor:
    """What of an output belongs to each token: logits, or the last states."""
    names = ("logits", "last_hidden_state", "start_logits")
    return next(output[name] for name in names if output.get(name) is not None)


def ids_to_try(base: PreTrainedModel, behind: int = BEHIND) -> Tensor:
    """Two rows `[2, FIRST + behind]` of tokens, the same `FIRST` in front and others behind."""
    ids = plain_ids(base, FIRST + behind)
    return torch.cat([ids, torch.cat([ids[:, :FIRST], ids[:, FIRST:].roll(1)], dim=1)])


def probed(base: PreTrainedModel) -> tuple[Way, Facts, Tried | None]:
    """The way into a model, its attention or the cache of a decoder that attends in code of its own, and its facts.

    Also what it made of the tokens that it was tried with, on models of one stack.

    UnsupportedError for a model that this version has no way into, naming what does work, or that does not run.
    """
    try:
        word_table(base)
    except (AttributeError, NotImplementedError):
        raise UnsupportedError(
            f"{type(base).__name__} has no table of word embeddings that it reads input_ids by, so no virtual token "
            "can stand before them; use a model of text."
        ) from None
    try:
        return _probed(base)
    except (SoftPromptError, torch.OutOfMemoryError):  # the latter says nothing about the model
        raise
    except Exception as error:
        raise could_not_try(base, "two tokens", error) from error


def could_not_try(base: PreTrainedModel, what: str, error: Exception) -> UnsupportedError:
    """A model failed where it was tried: with what, and how."""
    text = str(error).strip().splitlines()
    first = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return UnsupportedError(
        f"{type(base).__name__} fails when it is called with {what} ({first}; transformers "
        f"{transformers.__version__}), so no prompt can be tried on it; use a model that runs on input_ids alone."
    )


@torch.no_grad()
def _probed(base: PreTrainedModel) -> tuple[Way, Facts, Tried | None]:
    way = AttentionWay(base)
    if way.encoder_decoder:
        return way, _of_encoder_decoder(way), None
    with evaluating(base):
        facts, first = probe(way)
        if not facts.layers and facts.causal and fills_cache(base):
            through_cache = CacheWay(base)
            seen, others = probe(through_cache, facts)
            if seen.layers:
                return through_cache, seen, others
    return way, facts, first


def probe(way: Way, known: Facts | None = None) -> tuple[Facts, Tried]:
    """The facts of a decoder or an encoder by one forward pass, and what it made of the tokens in that.

    What is `known` is not tried again.
    """
    base = way.base
    found, tried, causal, how = _causal(way)
    if not found.modules:  # code that asks for its backend by name, as Falcon's does, was not itself
        way.bind([], [], [])
        found, tried, causal, how = _causal(way)
    if known is not None:
        causal, how = known.causal, known.how["causal"]
    way.bind(found.modules, [], [])
    way.sharing = found.sharing
    attending = len(found.modules) + len(found.sharing)
    foldable = causal and not api.keeps_state(base) and attending >= api.number_of_layers(base)
    foldable = foldable and api.picked_keys(base) is None
    facts = _facts(
        way,
        found,
        causal=causal,
        foldable=foldable,
        shared_layers=len(found.sharing),
        no_prefix=_no_prefix(base, found, causal),
    )
    _check_positions(way, facts)
    if isinstance(way, CacheWay):
        _try_masks(way)
    facts = _with(facts, causal=how, foldable="every layer attends, and none keeps a state" if foldable else "")
    return facts, tried


def _try_masks(way: CacheWay) -> None:
    """Which masks a model that attends in code of its own can take: of four dimensions, or with padding in between."""
    body, ids = api.own(way.base), plain_ids(way.base, 3)
    square = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=ids.device).tril()
    with at_hand(way.base):
        try:
            body(input_ids=ids[:, :2], attention_mask=square, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # its own refusal, whatever it is: Bloom counts ALiBi's positions along a mask's columns
            way.takes_square_masks = False
        if way.takes_positions:
            return
        hole = torch.tensor([[1, 0, 1]], device=ids.device)
        padded = body(input_ids=ids, attention_mask=hole, use_cache=False, return_dict=True)[0][0, -1]
        alone = body(input_ids=ids[:, [0, 2]], use_cache=False, return_dict=True)[0][0, -1]
    if _apart(padded, alone) > (1e-4 if padded.dtype in (torch.float32, torch.float64) else _HALF_EQUAL):
        way.limits = replace(way.limits, reach=1)


def _with(facts: Facts, **how: str) -> Facts:
    return replace(facts, how={**facts.how, **how})


def _causal(way: Way) -> tuple[Recording, Tried, bool, str]:
    """What the layers attend to, and whether a token's state depends on none that follows it; how that was found.

    Two rows begin with the same tokens. Where the states of these are equal, nothing looked ahead; else the gradient
    tells, which is exactly zero in a decoder whose numbers are rounded by the whole batch.
    """
    base, room = way.base, api.context_length(way.base)
    ids = ids_to_try(base, BEHIND if room is None else max(1, min(BEHIND, room - FIRST)))
    found, tried, hidden = _tried(way, ids)
    apart = _apart(hidden[0, :FIRST], hidden[1, :FIRST])
    if hidden.dtype in (torch.float32, torch.float64) and apart <= _EQUAL:
        return found, tried, True, "the first states with others behind them are the same"
    causal = _looks_back(way, ids[:1, :2]) if found.modules or not way.modules[0] else None
    if causal is not None:
        return found, tried, causal, f"gradient of the first state to the second token: {'' if causal else 'not '}0"
    causal = apart <= _HALF_EQUAL
    return (
        found,
        tried,
        causal,
        f"the first states with other tokens behind them are {'' if causal else 'not '}the same",
    )


def _tried(way: Way, ids: Tensor) -> tuple[Recording, Tried, Tensor]:
    """A model tried with rows of tokens: what its layers attended to, what it gave, and its body's last states."""
    base, bodies = way.base, list[Tensor]()
    recording, thread = Recording(), get_ident()

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if get_ident() == thread:
            bodies.append(output[0])

    handle = api.own(base).register_forward_hook(keep)
    try:
        with at_hand(base), way.recorded(recording):
            given = states_of(reader(base), ids)
    finally:
        handle.remove()
    keys = KV(tuple((key[:1, :, :FIRST], value[:1, :, :FIRST]) for key, value in recording.layers))
    return recording, Tried(ids, given, keys), bodies[-1] if bodies else given


def _looks_back(way: Way, ids: Tensor) -> bool | None:
    """Whether the first of two tokens is differentiable by its own id alone; None where that cannot be had."""
    base, words = way.base, way.base.get_input_embeddings()
    if sharded(base) or dispatched(base) or any(each.is_inference() for each in base.parameters()):
        return None
    entered: list[Tensor] = []
    thread = get_ident()

    def watch(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if get_ident() != thread:
            return output
        entered.append(output.detach().requires_grad_(output.is_floating_point()))
        return entered[-1].clone()  # (some models add to it in place)

    handle = words.register_forward_hook(watch)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            _, hidden = record(way, {"input_ids": ids})
            return _by_gradient(hidden, entered)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # Reformer, say, runs in eval mode only where nothing is differentiated
        return None
    finally:
        handle.remove()


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).float().norm() / one.float().norm().clamp(min=1e-12))


def _by_gradient(hidden: Tensor, entered: list[Tensor]) -> bool | None:
    """Whether the first of two states `[1, 2, d]` is differentiable by its own token alone, of what `entered` the
    model; None where the second is not by the first token, so that nothing follows: a layer may have no gradient."""
    if not hidden.requires_grad or len(entered) != 1 or entered[0].shape[:-1] != (1, 2):
        return None
    state = hidden[0, 0].float()
    along = torch.arange(len(state), device=state.device).mul(1.7).cos()  # no direction that a norm fixes
    (gradient,) = torch.autograd.grad(state @ along, entered[0], allow_unused=True, retain_graph=True)
    if gradient is not None and bool(gradient[0, 1].any()):
        return False
    (gradient,) = torch.autograd.grad(hidden[0, 1].float() @ along, entered[0], allow_unused=True)
    return True if gradient is not None and bool(gradient[0, 0].any()) else None


def _of_encoder_decoder(way: AttentionWay) -> Facts:
    """Two source tokens and three target tokens tell the three kinds of attention apart."""
    base = way.base
    ids = plain_ids(base, 2)
    with evaluating(base):
        found, _ = record(way, {"input_ids": ids, "decoder_input_ids": ids[:, [0, 1, 0]]})
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for number, (queries, (key, _)) in enumerate(zip(found.queries, found.layers, strict=True)):
        parts[2 if queries == 2 else 1 if key.shape[2] == 2 else 0].append(number)
    own, cross, encoder = parts
    way.bind(*([found.modules[number] for number in part] for part in parts))
    reason = "" if own and encoder else _no_interface(base)
    facts = _facts(way, found, causal=False, foldable=False, encoder_decoder=True, no_prefix=reason)
    shapes = facts.layers
    return _with(
        replace(
            facts,
            layers=tuple(shapes[n] for n in own),
            cross_layers=tuple(shapes[n] for n in cross),
            encoder_layers=tuple(shapes[n] for n in encoder),
        ),
        encoder_decoder="its config says so, and its forward takes decoder_input_ids",
    )


def _facts(way: Way, found: Recording, **facts: Any) -> Facts:
    """What every kind of model has; also tells the way where positions end."""
    base = way.base
    table, fixed = api.position_table(base), api.fixed_positions(api.own(base))
    offset = 0 if table is None or table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from there
    said = api.context_length(base)
    context = fixed if said is None else said - offset
    sizes = [size for size in (*found.windows, *found.chunks, api.local_window(api.own(base))) if size]
    way.limits = Limits(
        offset, context if table is not None else fixed, min(sizes, default=None), learned=table is not None
    )
    layers = zip(found.layers, found.windows, found.chunks, strict=True)
    return Facts(
        layers=tuple(LayerShape(k.shape[1], k.shape[3], v.shape[3], window, chunk) for (k, v), window, chunk in layers),
        hidden_size=word_table(base).shape[1],  # ELECTRA's embeddings, say, are narrower than its layers
        query_heads=api.query_heads(base),
        context=context,
        learned_positions=table is not None,
        position_offset=offset,
        loss=partial(_divides_loss, base) if facts["causal"] or facts.get("encoder_decoder") else bool,
        vectors=partial(refuses_vectors, base),
        side=str if facts["causal"] else partial(_side_of_padding, base),
        how={
            "layers": f"what each attended to in one forward pass, through its {way.name}",
            "hidden_size": "the table of word embeddings",
            "context": "the config" if said is not None else "a fixed table of positions" if fixed else "no end found",
            "learned_positions": "an embedding for positions" if table is not None else "no embedding for positions",
        },
        **facts,
    )


def _no_interface(base: PreTrainedModel) -> str:
    return f"{type(base).__name__} does not attend through transformers' AttentionInterface"


def _no_prefix(base: PreTrainedModel, found: Recording, causal: bool) -> str:
    """Why no keys and values can be put before this model's own."""
    picked = api.picked_keys(base)
    if found.modules and picked is not None:
        return f"{type(base).__name__} picks the {picked} keys that a token sees by an index, which no prefix is in"
    if found.modules:
        return ""
    if causal and api.keeps_state(base):
        return f"{type(base).__name__} has a state instead of attention, so keys and values cannot reach it"
    return _no_interface(base)


@torch.no_grad()
def refuses_vectors(base: PreTrainedModel) -> str:
    """Why no vectors can stand in this model's input: Gemma 4's smaller ones look the ids up again in every layer."""
    body = api.own(base)
    if not api.takes(body.forward, "inputs_embeds"):
        return f"{type(base).__name__} takes no vectors in place of words"
    picked = api.picked_keys(base)
    if picked is not None:
        return f"{type(base).__name__} picks the {picked} keys that a token sees by an index, with a mask otherwise"
    if api.pads_inside(base):
        return f"{type(base).__name__} fills its rows up to a multiple of a chunk, and vectors otherwise than ids"
    inputs: dict[str, Any] = {"decoder_input_ids": plain_ids(base, 2)} if is_encoder_decoder(base) else {}
    try:
        with evaluating(base), at_hand(base):
            inputs["inputs_embeds"] = 1.5 * embed_words(words_of(base), plain_ids(base, 2))  # no words
            body(**inputs, use_cache=False)
            if api.classifies_rows(base) and not is_encoder_decoder(base):  # whose head may ask for ids
                base(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own refusal, which is the reason that a prompt in its input is refused
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(base).__name__} takes no vectors in place of words ({type(error).__name__}: {first})"
    return ""


@torch.no_grad()
def _side_of_padding(base: PreTrainedModel) -> str:
    """The side on which padding changes nothing of what a classifier of rows says; the right, if neither or both."""
    if not api.classifies_rows(base) or is_encoder_decoder(base):
        return "right"
    ids = plain_ids(base, 4)

    def logits(row: Tensor, mask: list[int]) -> Tensor | None:
        try:
            return base(input_ids=row, attention_mask=torch.tensor([mask], device=ids.device), return_dict=True).logits
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the model alone takes no such row: Funnel none so short
            return None

    with evaluating(base), at_hand(base):
        alone = logits(ids[:, :3], [1, 1, 1])
        if alone is None:
            return "right"
        near = 1e-3 if alone.dtype in (torch.float32, torch.float64) else _HALF_EQUAL
        for side, row, mask in (("right", ids, [1, 1, 1, 0]), ("left", ids.roll(1), [0, 1, 1, 1])):
            found = logits(row, mask)
            if found is not None and _apart(alone, found) <= near:
                return side
    return "right"


@torch.no_grad()
def _divides_loss(base: PreTrainedModel) -> bool:
    """Whether a language model's loss is what transformers' Trainer asks for; a loss of its own may be anything.

    What else it adds, as a mixture of experts does, is the same whatever the labels are divided by.
    """
    if base.get_output_embeddings() is None or not api.takes_option(base.forward, "num_items_in_batch"):
        return False
    ids = plain_ids(base, 2)
    shift = 0 if base.config.is_encoder_decoder else 1  # what stands for a token predicts it there, not the next one
    first: Tensor | None = None
    for items in (4, 8):
        with evaluating(base), at_hand(base):
            output = base(input_ids=ids, labels=ids, num_items_in_batch=items, use_cache=False, return_dict=True)
        total = cross_entropy(output.logits[0, : 2 - shift].float(), ids[0, shift:], reduction="sum")
        beyond = output.loss - total / 4 if first is None else first - output.loss - total / 8
        if bool(beyond.abs() <= 1e-3 * total):
            return True
        first = output.loss
    return False


def _check_positions(way: Way, facts: Facts) -> None:
    """UnsupportedError where positions that follow the prompt are not all that it changes in a decoder."""
    kind = type(way.base).__name__
    if isinstance(way, AttentionWay) and facts.causal and facts.layers and not way.takes_positions:
        raise UnsupportedError(
            f"{kind}.forward takes no position_ids, so real tokens cannot be moved behind a prompt; use a model that "
            "takes them, such as gpt2, llama, mistral, qwen, gemma, opt or gpt_neox."
        )


def plain_ids(base: PreTrainedModel, count: int) -> Tensor:
    """Token ids `[1, count]` that differ as far as there are so many, none of which the model's config names."""
    words, special = word_table(base), api.special_ids(base)
    size = words.shape[0]
    plain = [token for token in range(min(size, 64 + len(special))) if token not in special][:count]
    if not plain:
        raise UnsupportedError(
            f"all {size} tokens of {type(base).__name__} are special ones in its config, so no prompt can be tried."
        )
    ids = (plain * count)[:count]
    return torch.tensor([ids], device=words.device)
