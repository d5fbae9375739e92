"""Threads share a model: every call is right, whatever other threads do with the same model meanwhile, or refused.

What each call must give is computed beforehand, in one thread.
"""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import families
import pytest
import tiny
import torch
from model_kit import ids_of
from torch import Tensor

from softprompt import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptError,
    SoftPromptModel,
    get_peft_model,
)
from softprompt.disabling import SwitchedOnWarning

TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
MODELS = ("llama", "mistral_window", "bloom", "bert", "t5", "bart")
MIXED = ("five", "nine", "prefix", "encoder", "tasks", "__base__")
LENGTHS = (6, 3, 5, 4, 2, 6)
TOLERANCE = 1e-3
THREADS = 8


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def prompted(family: str) -> SoftPromptModel:
    """A model with a prompt of every method, two of them of other lengths; each has a head where the task has one."""
    task = TASKS.get(family, "CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(
        families.build(family, task), PromptTuningConfig(num_virtual_tokens=5, task_type=task), "five"
    )
    model.add_adapter("nine", PromptTuningConfig(num_virtual_tokens=9, task_type=task))
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=4, task_type=task))
    model.add_adapter("encoder", PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type=task))
    model.add_adapter("tasks", MultitaskPromptTuningConfig(num_virtual_tokens=6, num_tasks=3, task_type=task))
    model.eval()
    with torch.no_grad():
        for name in model.peft_config:
            for parameter in (*model.encoder(name).parameters(), *model.heads.copies[name].parameters()):
                parameter.add_(0.4 * torch.randn_like(parameter))
    return model


@dataclass
class Work:
    """A call, and what it may give: one thing, or, where other threads choose the adapter, one of several."""

    name: str
    call: Callable[[], Tensor]
    right: list[Tensor]

    def verdict(self) -> str:
        try:
            got = self.call()
        except SoftPromptError as error:
            return f"refused: {self.name}: {error}"
        except Exception as error:
            return f"WRONG: {self.name}: {type(error).__name__}: {error}"
        if any(_close(got, each) for each in self.right):
            return "right"
        return f"WRONG: {self.name}: off by {min(_off(got, each) for each in self.right):.2g}"


def _off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max()) if got.shape == want.shape else float("inf")


def _close(got: Tensor, want: Tensor) -> bool:
    return _off(got, want) <= TOLERANCE


class Calls:
    """The calls that are made of one model."""

    def __init__(self, family: str) -> None:
        self.family, self.model = family, prompted(family)
        self.base = self.model.get_base_model()
        self.generates = self.base.can_generate()
        self.both = self.base.config.is_encoder_decoder
        batch = tiny.ragged(LENGTHS, side="left")
        self.rows = {**batch, "decoder_input_ids": ids_of(4, len(LENGTHS))} if self.both else batch
        self.tasks = torch.tensor([0, 1, 2, 2, 1, 0])
        self.works = self._named() + self._plain() + self._chosen()
        if self.generates:
            self.works += self._written()

    def _work(self, name: str, call: Callable[[], Tensor], *right: Tensor) -> Work:
        return Work(f"{self.family}: {name}", call, list(right) or [call()])

    def logits(self, names: list[str] | None, rows: slice = slice(None), **more: Any) -> Tensor:
        """A forward pass over the rows; what stands at padding is nobody's."""
        batch = {name: value[rows] for name, value in self.rows.items()}
        needs = {"task_ids": self.tasks[rows]} if names is None or "tasks" in names else {}
        needs = needs if names is not None or self.model.active_adapter == "tasks" else {}
        with torch.no_grad():
            logits = self.model(**batch, adapter_names=names, **needs, **more).logits
        if logits.ndim == 3 and not self.both:
            return logits[batch["attention_mask"] != 0]
        return logits

    def _named(self) -> list[Work]:
        orders = [list(MIXED), [*MIXED[2:], *MIXED[:2]], ["nine", "five"] * 3]
        if self.family == "bloom":  # the cache way, too, has rows of all kinds
            orders.append(["prefix", "nine", "__base__"] * 2)
        works = [
            self._work(f"forward of {' '.join(order)}", lambda order=order: self.logits(order)) for order in orders
        ]
        for name in ("five", "nine", "prefix", "encoder", "tasks"):
            works.append(self._work(f"forward of {name} alone", lambda name=name: self.logits([name] * 6)))
            works.append(self._work(f"two rows of {name}", lambda name=name: self.logits([name] * 2, rows=slice(1, 3))))
        labels = self._labels()
        works.append(self._work("a loss", lambda: self._loss(orders[0], labels)))
        works.append(self._work("the gradient of a loss", lambda: self._gradient(orders[0], labels)))
        return works

    def _labels(self) -> Tensor:
        if self.family == "bert":
            return torch.tensor([0, 1, 2, 0, 1, 2])
        if self.both:
            return self.rows["decoder_input_ids"]
        return self.rows["input_ids"].masked_fill(self.rows["attention_mask"] == 0, -100)

    def _loss(self, names: list[str], labels: Tensor) -> Tensor:
        rows = {name: value for name, value in self.rows.items() if name != "decoder_input_ids"}
        with torch.no_grad():
            return self.model(**rows, labels=labels, adapter_names=names, task_ids=self.tasks).loss

    def _gradient(self, names: list[str], labels: Tensor) -> Tensor:
        """By the vectors of the rows, which no thread switches."""
        rows = {name: value for name, value in self.rows.items() if name not in ("decoder_input_ids", "input_ids")}
        vectors = self.base.get_input_embeddings()(self.rows["input_ids"]).detach().requires_grad_()
        loss = self.model(inputs_embeds=vectors, **rows, labels=labels, adapter_names=names, task_ids=self.tasks).loss
        return torch.autograd.grad(loss, vectors)[0] * 10

    def _plain(self) -> list[Work]:
        """The base model alone."""

        def disabled() -> Tensor:
            with self.model.disable_adapter():
                return self.logits(None)

        def named() -> Tensor:
            with self.model.disable_adapter():
                return self.logits(["five", "nine"] * 3)

        def twice() -> Tensor:
            with self.model.disable_adapter():
                first = self.logits(None)
            return torch.cat([first, self.logits(["five"] * 6)])

        works = [self._work("disabled", disabled), self._work("disabled with names", named)]
        works.append(self._work("disabled and on again", twice))
        works.append(self._work("no prompt by name", lambda: self.logits(["__base__"] * 6), works[0].right[0]))
        if self.family != "bert":  # whose own head is the active adapter's, for all threads

            def alone() -> Tensor:
                with torch.no_grad():
                    logits = self.base(**self.rows).logits
                return logits if self.both else logits[self.rows["attention_mask"] != 0]

            works.append(self._work("the base model itself", alone, works[0].right[0]))
        return works

    def _chosen(self) -> list[Work]:
        """`set_adapter` is for the whole model: what comes is one adapter's."""
        works, right = [], [self.logits([name] * 6) for name in ("five", "nine", "prefix", "encoder")]

        def choose(name: str, frozen: bool) -> Tensor:
            self.model.set_adapter(name, inference_mode=frozen)
            return self.logits(None)

        for number, name in enumerate(("five", "nine", "prefix", "encoder")):
            for frozen in (True, False):
                call = lambda name=name, frozen=frozen: choose(name, frozen)  # noqa: E731
                works.append(self._work(f"{name} made active, frozen {frozen}", call, *right))
                assert _close(call(), right[number])
        return works

    def _written(self) -> list[Work]:
        """`generate`: of mixed adapters, of one, and of none; and a step with a cache."""
        rows = {name: value for name, value in self.rows.items() if name != "decoder_input_ids"}

        def write(names: list[str] | None, **more: Any) -> Tensor:
            needs = {"task_ids": self.tasks} if names and "tasks" in names else {}
            tokens = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
            return self.model.generate(**rows, adapter_names=names, **needs, **tokens, **more).float()

        def disabled() -> Tensor:
            with self.model.disable_adapter():
                return write(None)

        mixed = list(MIXED)
        works = [self._work("generate", lambda: write(mixed)), self._work("generate, disabled", disabled)]
        works.append(self._work("generate of nine", lambda: write(["nine"] * 6)))
        works.append(self._work("generate of two beams", lambda: write(mixed, num_beams=2)))
        if not self.both:

            def further() -> Tensor:
                ids, mask = rows["input_ids"], rows["attention_mask"]
                needs = {"adapter_names": mixed, "task_ids": self.tasks}
                with torch.no_grad():
                    first = self.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, **needs)
                    cache = next(value for name, value in first.items() if name in ("cache", "past_key_values"))
                    return self.model(input_ids=ids[:, -1:], attention_mask=mask, cache=cache, **needs).logits

            works.append(self._work("a step with a cache", further))
        return works


@cache
def calls_of(family: str) -> Calls:
    return Calls(family)


def shared(calls: list[Calls], threads: int, each: int, seed: int = 0) -> Counter[str]:
    """What became of `each` random calls of every one of so many threads."""
    works = [work for every in calls for work in every.works]
    ready = threading.Barrier(threads)

    def run(number: int) -> list[str]:
        chance = random.Random(1000 * seed + number)
        ready.wait()
        return [chance.choice(works).verdict() for _ in range(each)]

    with ThreadPoolExecutor(threads) as pool:
        return Counter(verdict for found in pool.map(run, range(threads)) for verdict in found)


def _all_right(found: Counter[str], count: int) -> None:
    print(f"\n{count} calls: {found['right']} right, {count - found['right']} not")  # noqa: T201 – shown by -s
    assert dict(found) == {"right": count}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_threads_share_a_model(family: str) -> None:
    """All methods, `adapter_names`, `disable_adapter` and `set_adapter`, in random order."""
    _all_right(shared([calls_of(family)], THREADS, 3), THREADS * 3)


@pytest.mark.slow
@pytest.mark.full
def test_threads_share_models_at_length() -> None:
    """8 threads × 500 calls, over decoders, an encoder and encoder-decoders at once."""
    _all_right(shared([calls_of(family) for family in MODELS], THREADS, 500, seed=1), THREADS * 500)


@pytest.mark.slow
def test_the_answers_tell_prompts_apart() -> None:
    """Else none could be wrong."""
    for family in MODELS:
        calls = calls_of(family)
        names = ("five", "nine", "prefix", "encoder", "__base__")
        answers = [calls.logits([name] * 6) for name in names]
        apart = [_off(one, other) for one in answers for other in answers if one is not other]
        assert min(apart) > 20 * TOLERANCE, family


def together(*jobs: Callable[[], Any]) -> None:
    """Each job in a thread of its own, all at once; the first error of any."""
    ready = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> None:
        ready.wait()
        job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        for each in [pool.submit(run, job) for job in jobs]:
            each.result()


def test_two_threads_of_t5_with_prompts_of_5_and_9_tokens() -> None:
    torch.manual_seed(0)
    model = get_peft_model(families.build("t5", "SEQ_2_SEQ_LM"), PromptTuningConfig(num_virtual_tokens=5), "five")
    model.add_adapter("nine", PromptTuningConfig(num_virtual_tokens=9))
    model.eval()
    rows = {"input_ids": ids_of(6, 2), "decoder_input_ids": ids_of(3, 2)}
    want = {name: model(**rows, adapter_names=[name] * 2).logits.detach() for name in ("five", "nine")}
    assert _off(*want.values()) > 10 * TOLERANCE
    got: dict[str, list[Tensor]] = {"five": [], "nine": []}

    def call(name: str) -> None:
        for _ in range(60):
            got[name].append(model(**rows, adapter_names=[name] * 2).logits.detach())

    together(lambda: call("five"), lambda: call("nine"))
    assert sum(_close(each, want[name]) for name in got for each in got[name]) == 120


def test_disabled_in_one_thread_and_named_in_another() -> None:
    model = prompted("llama")
    ids = ids_of(5, 2)
    with torch.no_grad():
        plain = model(ids, adapter_names=["__base__"] * 2).logits
        prompt = model(ids, adapter_names=["nine", "nine"]).logits

    @torch.no_grad()
    def disabled() -> None:
        for _ in range(60):
            with model.disable_adapter():
                assert not model.enabled
                assert _close(model(ids).logits, plain)

    @torch.no_grad()
    def named() -> None:
        for _ in range(60):
            assert model.enabled
            assert _close(model(ids, adapter_names=["nine", "nine"]).logits, prompt)

    together(disabled, named)


def test_a_thread_that_is_started_inside_the_block_has_the_prompt_and_a_warning() -> None:
    model = prompted("llama")
    ids = ids_of(5, 1)
    with torch.no_grad():
        want = model(ids).logits
    got: list[Tensor] = []

    @torch.no_grad()
    def call() -> None:
        with pytest.warns(SwitchedOnWarning, match="disable_adapter"):
            got.append(model(ids).logits)

    with model.disable_adapter():
        together(call)
    assert _close(got[0], want)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: None).result()  # started before
        with model.disable_adapter(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _close(pool.submit(torch.no_grad()(model), ids).result().logits, want)
    together(lambda: None)
    assert _close(model(ids).logits.detach(), want)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bloom", "t5"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of torch, for a thread without gradient
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_one_thread_trains_with_checkpointing_while_another_evaluates(family: str, reentrant: bool) -> None:
    """Also the recomputation, which may run in a thread that has no prompt open, sees the prompt of its own call."""
    model = prompted(family)
    both = model.base_model.config.is_encoder_decoder
    model.set_adapter("five")
    ids = ids_of(6, 2)
    rows = {"input_ids": ids, **({"decoder_input_ids": ids_of(3, 2)} if both else {})}
    name = "nine" if family != "bloom" else "prefix"
    with torch.no_grad():
        want = model(**rows, adapter_names=[name] * 2).logits
        plain = model(**rows, adapter_names=["__base__"] * 2).logits
    weight = next(model.encoder("five").parameters())

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids[:, :4].contiguous() if both else ids, use_cache=False).loss

    def gradient() -> Tensor:
        return torch.autograd.grad(loss(), weight)[0]

    expected = gradient()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()
    later: list[Tensor] = []

    def train() -> None:
        for _ in range(6):
            weight.grad = None
            loss().backward()
            assert weight.grad is not None
            assert _close(weight.grad, expected)

    @torch.no_grad()
    def evaluate() -> None:
        for _ in range(12):
            assert _close(model(**rows, use_cache=False, adapter_names=[name] * 2).logits, want)
            with model.disable_adapter():
                assert _close(model(**rows, use_cache=False).logits, plain)

    def begin() -> None:
        later.append(loss())

    together(train, evaluate)
    together(begin, evaluate)
    weight.grad = None
    together(later[0].backward, evaluate)
    assert weight.grad is not None
    assert _close(weight.grad, expected)


@pytest.mark.parametrize("family", ["llama", "bloom", "t5"])
def test_a_call_from_within_generation_has_its_own_prompt(family: str) -> None:
    """A logits processor that asks the same model: for another adapter's opinion, or that of the model alone."""
    calls = calls_of(family)
    model = calls.model
    names = ("five", "nine", "prefix", "__base__")
    want = {name: calls.logits([name] * 6) for name in names}
    ids = calls.rows["input_ids"]
    asked: list[bool] = []

    def ask(_: Tensor, scores: Tensor) -> Tensor:
        asked.extend(_close(calls.logits([name] * 6), want[name]) for name in names)
        with model.disable_adapter():
            asked.append(_close(calls.logits(None), want["__base__"]))
        return scores

    tokens = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for active in ("five", "prefix"):
        model.set_adapter(active, inference_mode=True)
        model.folds.clear()
        alone = model.generate(input_ids=ids, **tokens)
        assert torch.equal(model.generate(input_ids=ids, logits_processor=[ask], **tokens), alone)
    assert all(asked)
    assert len(asked) == 20


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_model_is_wrapped_again_while_another_thread_calls_it(family: str) -> None:
    """The trial calls that this takes are the wrapping thread's own."""
    model = prompted(family)
    base = model.get_base_model()
    ids = ids_of(5, 2)
    vectors = base.get_input_embeddings()(ids).detach().requires_grad_()

    def gradient() -> Tensor:
        loss = model(inputs_embeds=vectors, labels=ids, adapter_names=["five", "prefix"]).loss
        return torch.autograd.grad(loss, vectors)[0]

    want = gradient()

    def wrap() -> None:
        for _ in range(10):
            other = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2), verify=False)
            assert other.way.modules[0] == model.way.modules[0]

    def call() -> None:
        for _ in range(15):
            assert _close(gradient(), want)

    together(wrap, call, call)


def test_a_model_and_its_body_are_called_at_once() -> None:
    """They have one config between them, which names the attention function."""
    base = tiny.build("llama")
    whole = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4)).eval()
    body = get_peft_model(base.model, PrefixTuningConfig(num_virtual_tokens=7)).eval()
    for model in (whole, body):
        with torch.no_grad():
            next(model.encoder().parameters()).normal_()
    ids = ids_of(5, 2)

    def call(model: SoftPromptModel) -> Tensor:
        with torch.no_grad():
            return model(ids)[0]

    want = {model: call(model) for model in (whole, body)}

    def often(model: SoftPromptModel) -> None:
        for _ in range(80):
            assert _close(call(model), want[model])

    together(*(lambda model=model: often(model) for model in (whole, body)))
    assert base.config._attn_implementation == "sdpa"


def test_threads_that_switch_adapters_end_with_one() -> None:
    model = prompted("bert")

    def choose(name: str) -> None:
        for _ in range(60):
            model.set_adapter(name)

    together(*(lambda name=name: choose(name) for name in ("five", "nine", "prefix", "tasks")))
    active = model.active_adapter
    trains = {name for name in model.peft_config if any(p.requires_grad for p in model.encoder(name).parameters())}
    assert trains == {active}
    assert all(p.requires_grad for p in model.heads.copies[active].parameters())
    assert model.base_model.classifier is model.heads.copies[active]["classifier"]


def test_threads_that_evaluate_leave_a_model_in_its_mode() -> None:
    """A model that trains goes on to, after any number of threads have generated with it."""
    model = prompted("llama").train()
    ids = ids_of(4, 1)
    options = {"max_new_tokens": 1, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    together(*[lambda: [model.generate(ids, adapter_names=["encoder"], **options) for _ in range(10)]] * 4)
    assert all(part.training for part in model.modules())
    together(*[lambda: [model.fold("five") for _ in range(10)]] * 4)
    assert all(part.training for part in model.modules())
