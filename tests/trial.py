"""A trial of the library on one model: a prompt made of real tokens against those tokens in the row.

The judge is the bare model on the concatenated tokens, one row at a time and without padding. The library's side goes
through its public interface alone. ``trial(name, kind)`` returns what came of every comparison, as plain values.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import anyfamily
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask

import softprompt
from softprompt import KV, SoftPromptError, SoftPromptModel

TOKENS, LENGTHS, STEPS = 4, (3, 6), 4
TOLERANCE = 1e-3  # of the largest number that is compared
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None, "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
CONFIGS = {"prompt_tuning": softprompt.PromptTuningConfig, "prefix_tuning": softprompt.PrefixTuningConfig}
PACKAGE = os.path.dirname(softprompt.__file__)
Pairs = list[tuple[Tensor, Tensor]]
RIGHT, REFUSED, WRONG, RAW, NOT_TRIED = "right", "refused", "wrong", "raw", "not tried"


@dataclass
class Found:
    """What came of one comparison. `message`: the refusal, or the exception; `where`: the frames it came from."""

    method: str
    comparison: str
    status: str
    difference: float | None = None
    message: str = ""
    where: list[str] = field(default_factory=list)


class NotHere(Exception):
    """The bare model does not do what a comparison needs."""


def trial(name: str, kind: str) -> dict[str, Any]:
    """Every comparison for a class: "class", "kind", "facts", "rows", and "problem" if it cannot be tried."""
    result: dict[str, Any] = {"class": name, "kind": kind, "problem": "", "facts": {}, "rows": []}
    try:
        subject = Subject(name, kind)
    except BaseException as error:
        return result | {"problem": first_line(error), "facts": {"where": frames(error)}}
    result["facts"] = subject.facts
    for method in CONFIGS:
        result["rows"] += [asdict(found) for found in subject.run(method)]
    result["rows"] += [asdict(found) for found in subject.checked()]
    return result


class Subject:
    """A model, its rows, and what the bare model says of prompt and row together."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.base = self.fresh()
        config = self.base.config
        self.encodes = bool(config.is_encoder_decoder) and any(
            path.endswith("decoder") for path, _ in self.base.named_modules()
        )
        self.decodes = self.encodes and kind == "seq2seq"
        self.causal = kind == "causal" or (kind == "seq2seq" and not self.encodes)
        draw = torch.Generator().manual_seed(1)
        words = anyfamily.WORDS

        def some(count: int) -> Tensor:
            return torch.randint(words.start, words.stop, (1, count), generator=draw)

        self.prompt, self.rows = some(TOKENS), [some(length) for length in LENGTHS]
        if self.encodes and kind == "sequence":  # whose heads look for the end
            self.rows = [torch.cat([row[:, :-1], torch.tensor([[anyfamily.EOS]])], dim=1) for row in self.rows]
        self.written = [some(3) for _ in self.rows]
        self.whole = [self.bare(row, number) for number, row in enumerate(self.rows)]
        self.facts = self._facts()

    def fresh(self) -> PreTrainedModel:
        base = anyfamily.build(self.name, self.kind)
        settings = getattr(base, "generation_config", None)
        if settings is not None:
            settings.eos_token_id, settings.pad_token_id = None, anyfamily.PAD
        return base

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        other = torch.cat([self.rows[1][:, :-1] + 1, self.rows[1][:, -1:]], dim=1)
        shifted = self.bare(other, 1)
        facts["prompt is seen"] = difference(self.whole[1], self._outputs(self.base, self.rows[1], 1)) > 1e-3
        facts["row is seen"] = difference(self.whole[1], shifted) > 1e-3
        facts["bare takes vectors"] = self._bare_takes_vectors()
        facts["bare repeats itself"] = difference(self.whole[1], self.bare(self.rows[1], 1)) < TOLERANCE
        for side in ("left", "right"):
            facts[f"bare takes {side} padding"] = self._bare_takes(side)
        return facts

    @torch.no_grad()
    def _bare_takes_vectors(self) -> bool:
        """Whether the bare model says of a row's embeddings what it says of its ids."""
        both = torch.cat([self.prompt, self.rows[1]], dim=1)
        try:
            words = self.base.get_input_embeddings()(both)
            mask = torch.ones_like(both)
            found = self.base(inputs_embeds=words, attention_mask=mask, **self._extra(1)).logits[0]
            wanted = self._outputs(self.base, both, 1)
        except Exception:
            return False
        return difference(wanted, found) < TOLERANCE

    @torch.no_grad()
    def _bare_takes(self, side: str) -> bool:
        """Whether the bare model itself gives rows in a padded batch what it gives them alone."""
        ids, mask, _ = padded([torch.cat([self.prompt, row], dim=1) for row in self.rows], side)
        try:
            outputs = self._outputs(self.base, ids, None, mask)
        except Exception:
            return False
        alone = [self._outputs(self.base, torch.cat([self.prompt, row], dim=1), n) for n, row in enumerate(self.rows)]
        return all(
            difference(one, self._own(both, len(one) if self.per_token else 0, side)) < TOLERANCE
            for one, both in zip(alone, outputs, strict=True)
        )

    # ---- outputs -------------------------------------------------------------------------------------------------

    @property
    def per_token(self) -> bool:
        return self.kind != "sequence"

    def _own(self, output: Tensor, length: int, side: str) -> Tensor:
        """A row's own part of its output in a batch."""
        if not self.per_token or self.decodes:
            return output
        return output[-length:] if side == "left" else output[:length]

    def _extra(self, number: int | None) -> dict[str, Any]:
        if not self.decodes:
            return {}
        return {"decoder_input_ids": torch.cat(self.written) if number is None else self.written[number]}

    @torch.no_grad()
    def _outputs(self, model: Any, ids: Tensor, number: int | None, mask: Tensor | None = None, **more: Any) -> Tensor:
        """Logits `[T, …]` of row `number`, or `[B, T, …]` of all rows."""
        mask = torch.ones_like(ids) if mask is None else mask
        output = model(input_ids=ids, attention_mask=mask, **self._extra(number), **more).logits
        return output if number is None else output[0]

    @torch.no_grad()
    def bare(self, row: Tensor, number: int) -> Tensor:
        """What the bare model says of the prompt's tokens and a row, of the row's own columns.

        Where a head gives a decoder the row as well, the prompt stands before the encoder alone.
        """
        both = torch.cat([self.prompt, row], dim=1)
        if self.encodes and not self.decodes:
            encoded = self.base.get_encoder()(input_ids=both, attention_mask=torch.ones_like(both))
            return self._outputs(self.base, row, number, torch.ones_like(both), encoder_outputs=encoded)
        output = self._outputs(self.base, both, number)
        return output[TOKENS:] if self.per_token and not self.decodes else output

    # ---- the trials ----------------------------------------------------------------------------------------------

    def run(self, method: str) -> Iterator[Found]:
        try:
            model = self.wrapped(method)
        except BaseException as error:
            yield self._caught(method, "get_peft_model", error)
            return
        for comparison, measure in self.comparisons(method, model):
            try:
                found = measure()
            except BaseException as error:
                yield self._caught(method, comparison, error)
                continue
            right = found < TOLERANCE  # (a number that is none is not)
            yield Found(method, comparison, RIGHT if right else WRONG, found)

    def checked(self) -> Iterator[Found]:
        """What the library itself says of the model."""
        check = getattr(softprompt, "check", None)
        if check is None:
            return
        try:
            report = check(self.fresh())
        except BaseException as error:
            for method in CONFIGS:
                yield self._caught(method, "check", error)
            return
        words = {"equal": RIGHT, "differs": WRONG, "refused": REFUSED, "not tried": NOT_TRIED}
        for row in report.rows:
            comparison = f"check: {row.comparison}"
            yield Found(row.method, comparison, words[row.status], row.difference, row.message or "")

    def _caught(self, method: str, comparison: str, error: BaseException) -> Found:
        if isinstance(error, NotHere):
            return Found(method, comparison, NOT_TRIED, message=str(error))
        if isinstance(error, SoftPromptError):
            return Found(method, comparison, REFUSED, message=str(error))
        word = RAW if ours(error) else NOT_TRIED
        return Found(method, comparison, word, message=first_line(error), where=frames(error))

    def wrapped(self, method: str) -> SoftPromptModel:
        """The model with a prompt that is not yet made of real tokens."""
        config = CONFIGS[method](task_type=self.task, num_virtual_tokens=TOKENS)
        model = softprompt.get_peft_model(self.fresh(), config).eval()
        if method == "prompt_tuning":
            with torch.no_grad():
                words = model.get_base_model().get_input_embeddings()(self.prompt)[0]
                next(iter(model.encoder().parameters())).copy_(words)
        return model

    @property
    def task(self) -> str | None:
        return "CAUSAL_LM" if self.causal else TASKS[self.kind]

    def comparisons(self, method: str, model: SoftPromptModel) -> Iterator[tuple[str, Callable[[], float]]]:
        prefix = method == "prefix_tuning"
        expected = Prefixes(self, model) if prefix else None
        yield "row alone", lambda: self._alone(model, expected)
        yield "row alone, no mask", lambda: self._alone(model, expected, mask=False)
        yield "left padding", lambda: self._together(model, expected, "left")
        yield "right padding", lambda: self._together(model, expected, "right")
        if self.causal:
            yield "loss", lambda: self._loss(model, expected)
            yield "generate alone", lambda: self._generate(model, expected, False)
            yield "generate, left padding", lambda: self._generate(model, expected, True)

    def _alone(self, model: SoftPromptModel, prefixes: Prefixes | None, mask: bool = True) -> float:
        found = []
        for number, row in enumerate(self.rows):
            wanted, pick = self._wanted(prefixes, number)
            masks = {"attention_mask": torch.ones_like(row)} if mask else {}
            with torch.no_grad():
                output = model(input_ids=row, **masks, **self._extra(number), **pick.options)
            found.append(min(difference(each, pick(output)[0]) for each in (wanted, *pick.also)))
        return max(found)

    def _together(self, model: SoftPromptModel, prefixes: Prefixes | None, side: str) -> float:
        ids, mask, _ = padded(self.rows, side)
        found = []
        for number, row in enumerate(self.rows):
            wanted, pick = self._wanted(prefixes, number)
            with torch.no_grad():
                output = model(input_ids=ids, attention_mask=mask, **self._extra(None), **pick.options)
            own = pick(output)[number]
            if pick.per_token and not self.decodes:
                own = own[-row.shape[1] :] if side == "left" else own[: row.shape[1]]
            found.append(min(difference(each, own) for each in (wanted, *pick.also)))
        return max(found)

    def _wanted(self, prefixes: Prefixes | None, number: int) -> tuple[Tensor, Pick]:
        """What is to come out for a row; a prefix is first made of the tokens as they are before this row."""
        if prefixes is None:
            return self.whole[number], Pick(self.per_token)
        return prefixes.wanted(number)

    def _loss(self, model: SoftPromptModel, prefixes: Prefixes | None) -> float:
        row = self.rows[1]
        both = torch.cat([self.prompt, row], dim=1)
        labels = both.clone()
        labels[:, : TOKENS + (1 if prefixes is not None else 0)] = -100  # what a prefix predicts first is not counted
        if prefixes is not None:
            self._same_or_not_here(prefixes)
        with torch.no_grad():
            try:
                wanted = self.base(input_ids=both, labels=labels).loss
            except Exception as error:
                raise NotHere(f"the bare model gives no loss: {first_line(error)}") from error
            found = model(input_ids=row, attention_mask=torch.ones_like(row), labels=row.clone()).loss
        if wanted is None or found is None:
            raise NotHere("the model gives no loss")
        return float((wanted - found).abs() / wanted.abs().clamp(min=1))

    def _same_or_not_here(self, prefixes: Prefixes) -> None:
        prefixes.wanted(1)
        if prefixes.states:
            raise NotHere("layers with a state do not see a prefix, so no tokens are equal to it")

    def _generate(self, model: SoftPromptModel, prefixes: Prefixes | None, batched: bool) -> float:
        options = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 1, "pad_token_id": anyfamily.PAD}
        if prefixes is not None:
            self._same_or_not_here(prefixes)
        wanted, other = [self._greedy(row) for row in self.rows], []
        for row in self.rows:
            both = torch.cat([self.prompt, row], dim=1)
            try:
                said = self.base.generate(both, attention_mask=torch.ones_like(both), **options)
            except Exception as error:
                raise NotHere(f"the bare model does not generate: {first_line(error)}") from error
            other.append(said[0, both.shape[1] :])
        self.facts["bare generates what it says"] = _all_equal(wanted, other)
        if batched:
            ids, mask, _ = padded(self.rows, "left")
            said = model.generate(input_ids=ids, attention_mask=mask, **options)
            found = [each[ids.shape[1] :] for each in said]
        else:
            found = []
            for row in self.rows:
                said = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)
                found.append(said[0, row.shape[1] :])
        if _all_equal(wanted, found) or _all_equal(other, found):
            return 0.0
        if not _all_equal(wanted, other):
            raise NotHere("the bare model's own generate does not choose what its logits say")
        return 1.0

    @torch.no_grad()
    def _greedy(self, row: Tensor) -> Tensor:
        """The likeliest next tokens after prompt and row, everything computed anew for each."""
        ids = torch.cat([self.prompt, row], dim=1)
        for _ in range(STEPS):
            ids = torch.cat([ids, self._outputs(self.base, ids, 0)[-1:].argmax(-1)[None]], dim=1)
        return ids[0, -STEPS:]


def _all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@dataclass
class Pick:
    """What of a model's output is compared.

    `also` is as good as what the tokens give, where more than attention joins them, and only attention sees a prefix.
    """

    per_token: bool
    states: bool = False
    also: list[Tensor] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        return {"output_hidden_states": True} if self.states else {}

    def __call__(self, output: Any) -> Tensor:
        return output.hidden_states[-1] if self.states else output.logits


class Prefixes:
    """Keys and values of the prompt's tokens, put into a model's prefix, and what the model is then to say."""

    def __init__(self, subject: Subject, model: SoftPromptModel) -> None:
        self.subject, self.model, self.states = subject, model, False

    def wanted(self, number: int) -> tuple[Tensor, Pick]:
        subject = self.subject
        if subject.decodes or (subject.encodes and subject.kind == "sequence"):
            return self._of_decoder(number)
        if _causal(subject):
            return self._of_causal(number)
        return self._of_encoder(number)

    def _start(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.model.encoder().start_from(KV(tuple(pairs)).flat().float())

    def _of_causal(self, number: int) -> tuple[Tensor, Pick]:
        """Of a decoder: the tokens' keys and values depend on no row."""
        subject = self.subject

        def tokenizer(_: str) -> dict[str, list[int]]:
            return {"input_ids": subject.prompt[0].tolist()}

        softprompt.initialize_kv_prefix_from_text(self.model, tokenizer, text="these tokens")
        kept = self._kept()
        if kept is None:
            return subject.whole[number], Pick(subject.per_token)
        self.states = True  # only attention sees the prefix: the judge is the bare model behind a cache of it
        base = subject.fresh()  # some keep the state that they came to in themselves
        row = subject.rows[number]
        mask = torch.ones(1, TOKENS + row.shape[1], dtype=torch.long)
        more: dict[str, Any] = {}
        if "position_ids" in inspect.signature(base.forward).parameters:
            more["position_ids"] = TOKENS + torch.arange(row.shape[1])[None]
        with torch.no_grad():
            try:
                output = base(input_ids=row, attention_mask=mask, past_key_values=kept, **more).logits[0]
            except Exception as error:
                raise NotHere(f"the bare model takes no such cache: {first_line(error)}") from error
        return output, Pick(subject.per_token)

    @torch.no_grad()
    def _kept(self) -> Any:
        """A cache that holds the tokens in its attention layers alone, where there are other layers; else None."""
        base = self.subject.base
        try:
            full = base.base_model(input_ids=self.subject.prompt, use_cache=True).past_key_values
            layers = full.layers
        except Exception as error:
            if base._is_stateful:
                raise NotHere("the bare model keeps its cache to itself") from error
            return None
        states = base._is_stateful or any(_has_state(layer) for layer in layers)
        if not states and type(full) is DynamicCache:
            return None
        plain = type(full) is DynamicCache
        kept = DynamicCache(config=base.config.get_text_config(decoder=True)) if plain else type(full)()
        for index, layer in enumerate(layers):
            if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel():
                kept.update(layer.keys[:, :, :TOKENS], layer.values[:, :, :TOKENS], index)
        return kept

    @torch.no_grad()
    def _of_decoder(self, number: int) -> tuple[Tensor, Pick]:
        """Of an encoder-decoder: the tokens stand in front of the decoder's own, so they depend on the row read."""
        subject, row = self.subject, self.subject.rows[number]
        if not subject.decodes:
            raise NotHere("this head's decoder reads the row itself")
        written = torch.cat([subject.prompt, subject.written[number]], dim=1)
        output = subject.base(input_ids=row, attention_mask=torch.ones_like(row), decoder_input_ids=written)
        cache = getattr(output.past_key_values, "self_attention_cache", None)
        if cache is None:
            raise NotHere("the bare model's decoder keeps no keys")
        self._start([(layer.keys[:, :, :TOKENS], layer.values[:, :, :TOKENS]) for layer in cache.layers])
        return output.logits[0, TOKENS:], Pick(True)

    @torch.no_grad()
    def _of_encoder(self, number: int) -> tuple[Tensor, Pick]:
        """Of an encoder: the tokens' keys and values, as they are in front of this row."""
        subject = self.subject
        both = torch.cat([subject.prompt, subject.rows[number]], dim=1)
        with recorded(subject.base) as pairs:
            output = subject.base(input_ids=both, attention_mask=torch.ones_like(both), output_hidden_states=True)
        pick = Pick(True, subject.kind == "sequence")
        whole, front = pick(output)[0, TOKENS:], [(key[:, :, :TOKENS], value[:, :, :TOKENS]) for key, value in pairs]
        self._start(front)
        pick.also = [self._by_hand(subject.rows[number], front, pick, offset) for offset in (0, 1, 2)]
        return whole, pick

    def _by_hand(self, row: Tensor, front: Pairs, pick: Pick, offset: int) -> Tensor:
        """The bare model with keys and values in front of its own, its row behind them."""
        base, more = self.subject.base, {}
        if "position_ids" in inspect.signature(base.forward).parameters:
            more["position_ids"] = offset + TOKENS + torch.arange(row.shape[1])[None]
        with recorded(base, front):
            output = base(input_ids=row, attention_mask=torch.ones_like(row), **pick.options, **more)
        return pick(output)[0]


def _has_state(layer: Any) -> bool:
    """Whether a layer of a cache holds anything but keys and values."""
    return not hasattr(layer, "keys") or any("Linear" in kind.__name__ for kind in type(layer).__mro__)


@torch.no_grad()
def _causal(subject: Subject) -> bool:
    """Whether the first token's state does not depend on the second."""
    body, states = subject.base.base_model, []
    for second in (20, 30):
        try:
            states.append(body(input_ids=torch.tensor([[12, second, 14]]))[0][0, 0])
        except Exception as error:
            raise NotHere(f"the bare model's body does not run alone: {first_line(error)}") from error
    return difference(*states) < 1e-4


@contextmanager
def recorded(base: PreTrainedModel, front: Pairs | None = None) -> Iterator[Pairs]:
    """Inside the block every attention layer's keys and values are written down, in order.

    `front`, of one row without padding, stands in front of them, layer by layer.
    """
    pairs: Pairs = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if front is not None:
            more = front[len(pairs)]
            mask = None if mask is None else nn.functional.pad(mask, (more[0].shape[2], 0))
            key, value = torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2)
        pairs.append((key, value))
        own = [getattr(sys.modules[kind.__module__], "eager_attention_forward", None) for kind in type(module).__mro__]
        return next(each for each in own if each is not None)(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("trial", attend)
    AttentionMaskInterface.register("trial", eager_mask)
    configs = {id(part.config): part.config for part in base.modules() if isinstance(part, PreTrainedModel)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation_internal = "trial"
    try:
        yield pairs
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor, int]:
    """Rows `[1, t]` as one batch `[B, T]`, its mask, and T."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), width), anyfamily.PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[number, where], mask[number, where] = row[0], 1
    return ids, mask, width


def difference(wanted: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite for another shape."""
    if wanted.shape != found.shape:
        return float("inf")
    return float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-9))


def frames(error: BaseException) -> list[str]:
    """The last frame of the library's that an exception went through, and the last of all."""
    found = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    own = [f"softprompt{each.removeprefix(PACKAGE)}" for each in found if each.startswith(PACKAGE)]
    return [*own[-1:], *("/".join(each.split("/")[-2:]) for each in found[-1:])]


def ours(error: BaseException) -> bool:
    """Whether an exception went through the library, and not only through the bare model."""
    return any(frame.filename.startswith(PACKAGE) for frame in traceback.extract_tb(error.__traceback__))


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
