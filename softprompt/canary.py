"""The canary: a prompt made of real tokens against those tokens in the row, before a model's prompts are trusted.

What is known of transformers stands in `transformers_api`, and a release or a family may differ from it without a word:
then a prompt is seen by some layers, or from other positions, and all numbers are merely a little wrong. So the library
compares itself with the model alone, with padding on either side, one token later with a cache, and past the window or
the chunk if there is one. Nothing is trusted because of its family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.call import Call
from softprompt.elsewhere import at_hand, embed_words, word_table, words_of
from softprompt.errors import SoftPromptError
from softprompt.facts import BEHIND, Facts, Tried, ids_to_try, reader, record, states, states_of
from softprompt.facts import FIRST as LENGTH
from softprompt.fold import fold
from softprompt.injection.contract import Way
from softprompt.prompt import KV, Embeddings, evaluating
from softprompt.running import Run

SHORT, LONG = 2, BEHIND - 1  # tokens of the rows behind them, to which one more comes
FAR = 64
"""A row is made long enough to pass a window or a chunk of so many tokens; `softprompt check` goes further."""

KEYS = "keys and values in front"
FOLDED = "vectors folded into keys and values"
ROWS = "vectors in the rows"

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-4}
_HALF = 0.1  # of bfloat16, float16 and what is narrower
_NOISE = 8.0  # times what the model alone differs by when its rows share a batch with others
_MOST = 0.5


@final
@dataclass(frozen=True)
class Comparison:
    """What was compared: a `kind` of prompt in some circumstance (`what`), and by how much the states differ.

    `difference` is the norm of the difference by that of the true states, None where it could not be had; `message`
    says why. A `difference` above the `tolerance` is an error of this library, or of its knowledge of transformers.
    """

    kind: str
    what: str
    difference: float | None = None
    tolerance: float | None = None
    message: str = ""

    @property
    def status(self) -> str:
        """equal, differs, refused or not tried."""
        if self.difference is None:
            return "refused" if self.message and self.tolerance is None else "not tried"
        assert self.tolerance is not None
        return "equal" if self.difference <= self.tolerance else "differs"

    @property
    def good(self) -> bool:
        return self.status in ("equal", "not tried")


def verdict(base: PreTrainedModel, found: list[Comparison]) -> str:
    """Why a kind of prompt is not to be trusted on a model, in one sentence; empty where all is well."""
    bad = next((each for each in found if not each.good), None)
    if bad is None:
        return ""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if bad.difference is None:
        return f"{type(base).__name__}, tried with {bad.kind} ({bad.what}), fails: {bad.message} ({versions})"
    return (
        f"{type(base).__name__} with {bad.kind} does not do what it does with the same tokens in the row: {bad.what} "
        f"it is off by {bad.difference:.2g} of its states' size, where {bad.tolerance:.2g} is rounding ({versions})"
    )


def compare_keys(way: Way, facts: Facts, far: int = FAR, tried: Tried | None = None) -> list[Comparison]:
    """Keys and values of real tokens in front of rows, against these tokens in the rows; what the model was `tried`
    with need not be computed again."""
    trial = _Trial(way, facts, KEYS, far, tried)
    with _quiet(trial.base):
        if facts.encoder_decoder:
            return trial.of(lambda: _written(trial))
        if not facts.causal:
            return trial.of(lambda: _both_ways(trial, keys=True))
        return trial.of(lambda: _onward(trial, *_keys_of(trial)))


def compare_folded(way: Way, facts: Facts, far: int = FAR, tried: Tried | None = None) -> list[Comparison]:
    """The keys and values that vectors of real tokens are folded into, against those of the tokens themselves."""
    trial = _Trial(way, facts, FOLDED, 0, tried)

    def compare() -> Iterator[Comparison]:
        vectors = embed_words(words_of(trial.base), trial.prompt)
        both = torch.cat([vectors, 1.5 * vectors])  # the second are no words, which a model may want to look up
        want = _recorded(trial)
        got = fold(trial.way, Embeddings(both)).map(lambda part: part[:1])
        alike: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = {}
        for pair in zip(got.pairs, want.pairs, strict=True):
            for own, true in zip(*pair, strict=True):
                for part, each in zip(alike.setdefault(own.shape, ([], [])), (own, true), strict=True):
                    part.append(each.transpose(1, 2).flatten(2))
        found = [trial.compared("every layer's", *map(torch.cat, parts)) for parts in alike.values()]
        yield max(found, key=lambda each: each.difference or 0.0)

    with _quiet(trial.base):
        return trial.of(compare)


def compare_rows(way: Way, facts: Facts, far: int = FAR, tried: Tried | None = None) -> list[Comparison]:
    """Vectors of real tokens in the rows, against these tokens there."""
    trial = _Trial(way, replace(facts, foldable=False), ROWS, far, tried)
    with _quiet(trial.base):
        if facts.encoder_decoder or not facts.causal:
            return trial.of(lambda: _both_ways(trial, keys=False))
        vectors = embed_words(words_of(trial.base), trial.prompt)
        run = Run(trial.way, trial.facts, Embeddings(vectors))
        return trial.of(lambda: _onward(trial, run.forward, exact=True))


class _quiet:
    """Inside the block a model is in eval mode and nothing is differentiated."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._inner = (torch.no_grad(), evaluating(base), at_hand(base))

    def __enter__(self) -> None:
        for each in self._inner:
            each.__enter__()

    def __exit__(self, *error: Any) -> None:
        for each in reversed(self._inner):
            each.__exit__(*error)


class _Trial:
    """One kind of prompt on one model: the tokens it is tried with, and what is close enough."""

    def __init__(self, way: Way, facts: Facts, kind: str, far: int, tried: Tried | None) -> None:
        self.way, self.facts, self.kind, self.tried = without_head(way), facts, kind, tried
        self.base = self.way.base
        reach = facts.reach
        self.long = LONG if reach is None or reach > far else max(LONG, reach + 1)
        if far and reach is None:  # or it is not known to be one
            self.long = max([self.long, *(size + 1 for size in api.possible_reaches(self.base) if size <= far)])
            if facts.context is not None:
                self.long = max(LONG, min(self.long, facts.context - LENGTH - 1))
        self.passes = reach is not None and self.long > reach
        self.short = self.long - (LONG - SHORT)
        known = tried is not None and tried.ids.shape[1] == LENGTH + self.long + 1
        self.ids = tried.ids if tried is not None and known else ids_to_try(self.base, self.long + 1)
        self.dtype = word_table(self.base).dtype
        self._noise: float | None = None

    @property
    def prompt(self) -> Tensor:
        return self.ids[:1, :LENGTH]

    def of(self, compare: Callable[[], Iterator[Comparison]]) -> list[Comparison]:
        """The comparisons, up to the first that fails."""
        found: list[Comparison] = []
        room = self.facts.context
        if room is not None and room < LENGTH + self.long + 1:
            return [Comparison(self.kind, "", None, 0.0, f"the model has only {room} positions")]
        try:
            for each in compare():
                found.append(each)
                if not each.good:
                    break
        except torch.OutOfMemoryError:
            raise  # which says nothing about the model
        except SoftPromptError as error:
            found.append(Comparison(self.kind, "in a call", message=str(error)))
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            found.append(Comparison(self.kind, "in a call", message=f"{type(error).__name__}: {text}"))
        return found

    def rows(self) -> tuple[Tensor, Tensor]:
        """Three rows behind the prompt, `[3, long]`, and their mask: a long one, a short one padded on either side."""
        ids = self.ids[:, LENGTH : LENGTH + self.long]
        gap = self.long - self.short
        left, right = ids[1].roll(gap), ids[1]
        mask = torch.ones(3, self.long, dtype=torch.long, device=ids.device)
        mask[1, :gap], mask[2, self.short :] = 0, 0
        return torch.stack([ids[0], left, right]), mask

    def compared(self, what: str, got: Tensor, want: Tensor) -> Comparison:
        difference = _difference(got, want)
        tolerance = _TOLERANCES.get(self.dtype, _HALF)
        if difference is None:
            return Comparison(self.kind, what, None, tolerance, "the model alone gives no finite numbers")
        if not difference <= tolerance:
            tolerance = max(tolerance, min(_NOISE * self.noise(), _MOST))
        return Comparison(self.kind, what, difference, tolerance)

    def noise(self) -> float:
        """How much the model alone differs where a row shares a batch, as one does whose layers round by all of it, or
        where its words differ by what their number type cannot tell, as experts do that are chosen by a hair."""
        if self._noise is None:
            other = self.ids[:, LENGTH:].flip(0)
            more: dict[str, Any] = {"decoder_input_ids": self.prompt} if self.facts.encoder_decoder else {}
            both = self.alone(other, **{name: value.expand(2, -1) for name, value in more.items()})
            alone = self.alone(self.ids[:1, LENGTH:], **more)
            with _blurred(self.base.get_input_embeddings()):
                blurred = self.alone(self.ids[:1, LENGTH:], **more)
            self._noise = max(_difference(both[1:2], alone) or 0.0, _difference(blurred, alone) or 0.0)
        return self._noise

    def alone(self, ids: Tensor, **more: Any) -> Tensor:
        """The states `[B, T, …]` of the base model by itself."""
        return states_of(self.base, ids, **more)

    def whole(self) -> Tensor:
        """The states `[2, T, …]` of all the tokens."""
        tried = self.tried
        return tried.states if tried is not None and tried.ids is self.ids else self.alone(self.ids)


@contextmanager
def _blurred(words: nn.Module) -> Iterator[None]:
    """Inside the block every number of a looked-up word is off by one step of its type, up or down in turn."""

    def blur(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(output.numel(), device=output.device) % 2).view(output.shape)
        return output * (1 + signs.to(output) * torch.finfo(output.dtype).eps)

    handle = words.register_forward_hook(blur)
    try:
        yield
    finally:
        handle.remove()


def without_head(way: Way) -> Way:
    """The way into what of a model tells of each token."""
    base = reader(way.base)
    if base is way.base:
        return way
    inner = type(way)(base)
    inner.bind(*way.modules)
    inner.sharing, inner.limits = way.sharing, way.limits
    return inner


def _difference(got: Tensor, want: Tensor) -> float | None:
    """The greatest of any row, by how much the true states of tokens differ: what all share, as a bias, hides errors.

    None where the true states are no numbers.
    """
    if not bool(want.isfinite().all()):
        return None
    got, want = (each.double().reshape(len(each), -1, each.shape[-1]) for each in (got, want))
    apart = want - want.mean(dim=1, keepdim=True) if want.shape[1] > 1 else want
    size = torch.maximum(apart.flatten(1).norm(dim=1), 1e-3 * want.flatten(1).norm(dim=1))
    return float(((got - want).flatten(1).norm(dim=1) / size.clamp(min=1e-12)).max())


# ---- decoders --------------------------------------------------------------------------------------------------------


def _recorded(trial: _Trial) -> KV:
    """The model's own keys and values of the prompt's tokens."""
    if trial.tried is not None:
        return trial.tried.keys
    ids = trial.prompt
    inputs: dict[str, Any] = {"input_ids": ids}
    if trial.way.takes_positions:
        inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None] + trial.way.position_offset
    return KV(tuple(record(trial.way, inputs)[0].layers))


def _keys_of(trial: _Trial) -> tuple[Callable[[Call], Any], bool]:
    """How a call is made with the prompt as keys and values, and whether that is all there is of it."""
    prefix = _recorded(trial)
    return (lambda call: trial.way.call(prefix, call)), trial.facts.foldable


def _onward(trial: _Trial, call: Callable[[Call], Any], exact: bool) -> Iterator[Comparison]:
    """Rows behind the prompt and one token more of each, by `call`, against the model alone.

    Where the prompt is not `exact`, since a state of it is not among keys and values, rows are compared with the same
    row without padding and cache.
    """
    long, short = trial.long, trial.short
    ids, mask = trial.rows()
    more: dict[str, Any] = {"return_dict": True, **api.without_losses(trial.base)}
    nexts = trial.ids[[0, 1, 1], [LENGTH + long, LENGTH + short, LENGTH + short]][:, None]
    if exact:
        want = trial.whole()[:, LENGTH:]
        first, second = want[0], want[1]
    else:
        plain = Call(ids=trial.ids[:, LENGTH:], rest={"use_cache": False, **more})
        first, second = states(call(plain))
    use = api.takes_option(trial.base.forward, "use_cache")
    output = call(Call(ids=ids, mask=mask, rest={**({"use_cache": True} if use else {}), **more}))
    got = states(output)
    where = (
        f" past the {'chunk' if trial.facts.layers[0].chunk else 'window'} of {trial.facts.reach}"
        if trial.passes
        else ""
    )
    yield trial.compared(f"without padding{where}", got[:1], first[None, :long])
    yield trial.compared(f"padded on the left{where}", got[1:2, long - short :], second[None, :short])
    yield trial.compared(f"padded on the right{where}", got[2:, :short], second[None, :short])
    cache = api.cache_in(output)
    if cache is None:
        return
    if api.cache_name(trial.base.forward) is None:
        if not trial.base.can_generate():
            return
        yield Comparison(
            trial.kind,
            "one token later, with a cache",
            message=f"it returns a cache as {cache[0]!r}, and its forward takes none by a name that is known "
            f"({', '.join(api.CACHE_NAMES)})",
        )
        return
    wider = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    wider[2] = 1  # (compared no more: behind its padding nothing can follow where distances count columns)
    later = call(Call(ids=nexts, mask=wider, cache=cache[1], rest={"use_cache": True, **more}))
    got, want = states(later)[:2, -1:], torch.stack([first[long : long + 1], second[short : short + 1]])
    yield trial.compared(f"one token later, with a cache{where}", got, want)


# ---- encoders, and the encoders of two -------------------------------------------------------------------------------


def _both_ways(trial: _Trial, keys: bool) -> Iterator[Comparison]:
    """Rows behind the prompt, against the model alone on whole rows without padding, one at a time."""
    long, short, base = trial.long, trial.short, trial.base
    whole = [trial.ids[:1, : LENGTH + long], trial.ids[1:, : LENGTH + short]]
    target: dict[str, Any] = {}
    if trial.facts.encoder_decoder:
        target = {"decoder_input_ids": trial.ids[:1, LENGTH : LENGTH + 3]}
    want = [trial.alone(row, **target) for row in whole]
    if trial.facts.encoder_decoder:
        target = {name: value.expand(3, -1) for name, value in target.items()}
    else:
        want = [each[:, LENGTH:] for each in want]
    if keys:
        parts = [record(trial.way, {"input_ids": row})[0].layers for row in whole]
        pairs = zip(*parts, strict=True)
        first = [[torch.cat([pair[side][:, :, :LENGTH] for pair in both]) for side in (0, 1)] for both in pairs]
        prefix = KV(tuple((key, value) for key, value in first), rows=torch.tensor([0, 1, 1], device=trial.ids.device))
        run = Run(trial.way, trial.facts, prefix)
    else:
        run = Run(trial.way, trial.facts, Embeddings(embed_words(words_of(base), trial.prompt)))
    ids, mask = trial.rows()
    got = states(run.forward(Call(ids=ids, mask=mask, rest={"return_dict": True, **target})))
    if trial.facts.encoder_decoder:
        parts = ((got[:1], want[0]), (got[1:2], want[1]), (got[2:], want[1]))
    else:
        parts = ((got[:1], want[0]), (got[1:2, long - short :], want[1]), (got[2:, :short], want[1]))
    for what, (have, wanted) in zip(
        ("without padding", "padded on the left", "padded on the right"), parts, strict=True
    ):
        yield trial.compared(what, have, wanted)


def _written(trial: _Trial) -> Iterator[Comparison]:
    """A decoder's first tokens as keys and values before what it writes next, with padding in the source."""
    way, long = trial.way, trial.long
    source = trial.ids[1:, LENGTH : LENGTH + trial.short]
    target = trial.ids[:1, : LENGTH + long + 1]
    want = trial.alone(source, decoder_input_ids=target)[:, LENGTH:]
    recording, _ = record(way, {"input_ids": source, "decoder_input_ids": target[:, :LENGTH]})
    pairs = dict(zip(recording.modules, recording.layers, strict=True))
    run = Run(way, trial.facts, KV(tuple(pairs[module] for module in way.modules[0])))
    ids, mask = trial.rows()
    written = target[:, LENGTH : LENGTH + long].expand(2, -1)
    more: dict[str, Any] = {"return_dict": True, "use_cache": True}
    call = Call(ids=ids[1:], mask=mask[1:], rest={"decoder_input_ids": written, **more})
    output = run.forward(call)
    got = states(output)
    yield trial.compared("source padded on the left", got[:1], want[:, :long])
    yield trial.compared("source padded on the right", got[1:], want[:, :long])
    cache = api.cache_in(output)
    if (
        cache is None or api.cache_name(trial.base.forward) is None
    ):  # (T5's head for questions gives one it cannot take)
        return
    following = target[:, LENGTH + long :].expand(2, -1)
    later = run.forward(call.but(cache=cache[1]).plus(decoder_input_ids=following))
    yield trial.compared(
        "one token later, with a cache", states(later)[:, -1:], want[:, long:].expand(2, *[-1] * (want.ndim - 1))
    )
