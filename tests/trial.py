"""A trial of the library on one model: a prompt made of real tokens against those tokens in the row.

The judge is the bare model on the concatenated tokens, one row at a time and without padding. The library's side goes
through its public interface alone. ``trial(name, kind)`` returns what came of every comparison, as plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import anyfamily
import torch
from torch import Tensor
from transformers import PreTrainedModel
from trial_prefix import Pick, Prefixes
from trial_tools import TOKENS, TOLERANCE, NotHere, difference, first_line, frames, ours, padded

import softprompt
from softprompt import SoftPromptError, SoftPromptModel

LENGTHS, STEPS = (3, 6), 4
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None, "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
CONFIGS = {"prompt_tuning": softprompt.PromptTuningConfig, "prefix_tuning": softprompt.PrefixTuningConfig}
SIDES = ("left", "right")
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
        for side in SIDES:
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
        if (
            max(found) >= TOLERANCE
            and not self.per_token
            and not any(self.facts[f"bare takes {s} padding"] for s in SIDES)
        ):
            raise NotHere("the bare model's head says something else of a row with padding on either side")
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
