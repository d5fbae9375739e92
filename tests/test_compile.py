"""`torch.compile(fullgraph=True)` of whole training and decoding steps: as in eager mode, and compiled once."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import hf_cache
import pairs
import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from softprompt import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)

# torch itself makes an object of every autograd function that it traces, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
METHODS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4),
    "prefix_ffn": lambda: PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True),
    "prompt_tuning": lambda: PromptTuningConfig(num_virtual_tokens=4),
    "p_tuning_mlp": lambda: PromptEncoderConfig(num_virtual_tokens=4),
    "p_tuning_lstm": lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_reparameterization_type="LSTM"),
    "mpt": lambda: MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3),
}
FAMILIES = {"gpt2": "left", "llama": "right"}  # and the side that rows are padded on in training
TASKS = {"task_ids": torch.tensor([2, 0, 2])}
Result = tuple[Tensor, Tensor, list[Tensor]]


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """Compiling a second time is an error; LSTMs are traced, which torch has to be told."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True, allow_rnn=True):
        yield
    torch.compiler.reset()


def axes(cell: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """What a compiled graph depends on: the method's encoder, and of its kind of prompt the family and the rest."""
    family, method, *rest = cell
    kind = "keys and values" if method.startswith("prefix") else "embeddings"
    return (method,), (kind, family), *((kind, each) for each in rest)


def make(family: str, method: str, **overrides: Any) -> SoftPromptModel:
    base = tiny.build(family, **overrides)
    base.loss_type = "ForCausalLM"  # GPT-2's is not known by its name, of which transformers warns in every step
    torch.manual_seed(0)
    return get_peft_model(base, METHODS[method]())


def batch_of(method: str, side: str, seed: int = 0) -> dict[str, Tensor]:
    batch = tiny.ragged(side=side, seed=seed)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch | (TASKS if method == "mpt" else {})


def step(model: SoftPromptModel, call: Callable[..., Any], batch: dict[str, Tensor]) -> Result:
    model.zero_grad()
    output = call(**batch)
    output.loss.backward()
    gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    assert gradients
    return output.loss.detach(), output.logits.detach(), gradients


def check_training(model: SoftPromptModel, method: str, side: str, backend: str) -> None:
    compiled = torch.compile(model.train(), fullgraph=True, backend=backend)
    for seed in range(3):
        batch = batch_of(method, side, seed)
        expected = step(model, model, batch)
        torch.testing.assert_close(step(model, compiled, batch), expected, atol=1e-5, rtol=1e-4)
    parts = [part for part in model.get_base_model().modules() if isinstance(part, PreTrainedModel)]
    assert {part.config._attn_implementation for part in parts} == {"sdpa"}  # nothing is left behind


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), pairs.default(product(FAMILIES, METHODS), axes, together=1))
def test_a_training_step(family: str, method: str) -> None:
    check_training(make(family, method), method, FAMILIES[family], "aot_eager")


@pytest.mark.slow
@pytest.mark.full  # a compiler for C++ takes a minute
def test_a_training_step_in_compiled_kernels() -> None:
    check_training(make("llama", "prefix", num_hidden_layers=1), "prefix", "left", "inductor")


@torch.no_grad()
def check_decoding(model: SoftPromptModel, backend: str, more: dict[str, Tensor]) -> None:
    """Steps on a static cache, by masks of its full length, with left padding."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    batch, room = tiny.ragged(side="left"), 24
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width, logits = ids.shape[1], {}
    for name, call in (("eager", model), ("compiled", compiled)):
        cache = StaticCache(config=model.get_base_model().config, max_cache_len=room)
        seen = torch.nn.functional.pad(mask, (0, room - width))
        found = [model(**batch, **hf_cache.given(model, cache), use_cache=True, **more).logits[:, -1:]]
        for place in range(width, width + 5):
            seen[:, place] = 1
            token, positions = found[-1].argmax(-1), seen.sum(1, keepdim=True) - 1
            inputs = {"input_ids": token, "attention_mask": seen, "position_ids": positions}
            found.append(call(**inputs, **hf_cache.given(model, cache), use_cache=True, **more).logits)
        logits[name] = torch.cat(found, dim=1)
    torch.testing.assert_close(logits["compiled"], logits["eager"], atol=1e-5, rtol=1e-4)
    whole = {"input_ids": ids, "attention_mask": mask}
    for _ in range(5):  # the reference of both: the whole rows again, without a cache
        token = model(**whole, use_cache=False, **more).logits[:, -1:].argmax(-1)
        whole = {name: torch.cat([each, token if name == "input_ids" else torch.ones_like(token)], dim=1)
                 for name, each in whole.items()}  # fmt: skip
    again = model(**whole, use_cache=False, **more).logits[:, -6:]
    torch.testing.assert_close(logits["compiled"], again, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "frozen"), pairs.default(product(FAMILIES, METHODS, [False, True]), axes, together=1)
)
def test_a_decoding_step_on_a_static_cache(family: str, method: str, frozen: bool) -> None:
    model = make(family, method).eval()
    model.set_adapter("default", inference_mode=frozen)
    check_decoding(model, "aot_eager", TASKS if method == "mpt" else {})


@pytest.mark.slow
@pytest.mark.full  # a compiler for C++ takes a minute
def test_a_decoding_step_in_compiled_kernels() -> None:
    check_decoding(make("llama", "prefix", num_hidden_layers=1).eval(), "inductor", {})


@pytest.mark.slow
def test_tasks_that_are_not_there_are_refused_in_compiled_steps() -> None:
    model = make("gpt2", "mpt").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[5, 6], [7, 8]])
    assert torch.isfinite(compiled(input_ids=ids, task_ids=torch.tensor([2, 0])).logits).all()
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            compiled(input_ids=ids, task_ids=torch.tensor([2, wrong]))
