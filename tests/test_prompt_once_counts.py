"""What a shared prompt costs, counted: tokens through a layer, encoder runs, tensors, operations. No clock."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from conformance import Cell
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softprompt import METHODS, PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model
from softprompt.prompt import KVPrompt

BATCH, TEXT, VIRTUAL = 5, 9, 13  # no product or sum of them with a tiny model's sizes is another one of them
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "GQA": ("llama", {}),
    "MQA": ("llama", {"num_key_value_heads": 1}),
}
CONFIGS = {"prompt_tuning": PromptTuningConfig, "prefix_tuning": PrefixTuningConfig}
GENERATE = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}


def make(shape: str, method: str, tokens: int = VIRTUAL, **more: Any) -> SoftPromptModel:
    family, options = SHAPES[shape]
    torch.manual_seed(1)
    return get_peft_model(tiny.build(family, **options, **more), CONFIGS[method](num_virtual_tokens=tokens)).eval()


def text(batch: int = BATCH, length: int = TEXT) -> dict[str, Tensor]:
    ids = torch.randint(3, tiny.VOCAB - 8, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded_text() -> dict[str, Tensor]:
    given = text()
    given["attention_mask"][1, :4] = given["attention_mask"][3, :2] = 0
    return given


# ---- tokens and runs ---------------------------------------------------------------------------------------------


@contextmanager
def tokens_through(model: SoftPromptModel) -> Iterator[list[int]]:
    """How many tokens the first layer got in each of its runs."""
    base, seen = model.get_base_model(), []
    layers = [module for module in base.modules() if isinstance(module, nn.ModuleList)]

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[0] * args[0].shape[1])

    handle = layers[0][0].register_forward_pre_hook(note)
    yield seen
    handle.remove()


@contextmanager
def runs_of(module: nn.Module) -> Iterator[list[None]]:
    seen: list[None] = []
    handle = module.register_forward_pre_hook(lambda *_: seen.append(None))
    yield seen
    handle.remove()


def with_tasks(cell: Cell, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The inputs with a task for each row where a prompt has several, and how many different prompts there are."""
    if not cell.tasks:
        return given, 1
    tasks = torch.arange(len(given["input_ids"])) % cell.tasks
    return {**given, "task_ids": tasks}, len(tasks.unique())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_virtual_tokens_run_once_in_a_training_step(family: str, method: str) -> None:
    """p + B·T tokens, not B·(p + T); of several tasks each one's p. Keys and values run through nothing."""
    cell = Cell(method, family, "CAUSAL_LM")
    model = cell.model().train()
    given, prompts = with_tasks(cell, text(8))
    virtual = 0 if issubclass(METHODS[method], KVPrompt) else prompts * cell.config().num_virtual_tokens
    with tokens_through(model) as seen, runs_of(model.encoder()) as encoded:
        model(**given, labels=given["input_ids"]).loss.backward()
    assert sum(seen) == virtual + 8 * TEXT
    assert len(seen) == (2 if virtual else 1) and len(encoded) <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_folds_once(family: str, method: str) -> None:
    """One run of the prompt's encoder and of the virtual tokens, whatever is generated."""
    cell = Cell(method, family, "CAUSAL_LM")
    model = cell.model()
    given, prompts = with_tasks(cell, text(3))
    virtual = 0 if issubclass(METHODS[method], KVPrompt) else prompts * cell.config().num_virtual_tokens
    for beams in (1, 2):
        with tokens_through(model) as seen, runs_of(model.encoder()) as encoded:
            model.generate(**given, **GENERATE, max_new_tokens=5, num_beams=beams)
        assert sum(seen) == virtual + 3 * beams * (TEXT + 4)
        assert len(encoded) <= 1


def test_a_frozen_prompt_is_folded_once_for_all_calls() -> None:
    model, given = make("GQA", "prompt_tuning"), text()
    model.set_adapter("default", inference_mode=True)
    with tokens_through(model) as seen, runs_of(model.encoder()) as encoded, torch.no_grad():
        for _ in range(3):
            model(**given)
            model.generate(**given, **GENERATE, max_new_tokens=2)
    assert len(encoded) == 1
    assert sum(seen) == VIRTUAL + 3 * BATCH * (TEXT + TEXT + 1)


# ---- tensors -----------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Every operation by name, and the shapes of the tensors that it made (not of views)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.names[str(func)] += 1
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() >= each.numel() * each.element_size():
                self.shapes.add(tuple(each.shape))
        return output


def copies(shapes: set[tuple[int, ...]], longer: range) -> set[tuple[int, ...]]:
    """Shapes that have a prefix column for each row: a copy of the prefix or of its scores per row, a wider mask."""
    rows = {BATCH * heads for heads in (1, 2, 4)}
    return {shape for shape in shapes if set(shape) & set(longer) or (VIRTUAL in shape and set(shape) & rows)}


def training(model: SoftPromptModel, given: dict[str, Tensor]) -> set[tuple[int, ...]]:
    with Watch() as watch:
        model(**given, labels=given["input_ids"]).loss.backward()
    return watch.shapes


@pytest.mark.pairwise
@pytest.mark.parametrize("given", [text, padded_text])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_copies_no_prefix(shape: str, method: str, given: Callable[[], dict[str, Tensor]]) -> None:
    """Forward and backward; the backend that writes attention out, for comparison, does make copies."""
    both = range(VIRTUAL + TEXT, VIRTUAL + TEXT + 1)
    assert not copies(training(make(shape, method).train(), given()), both)
    assert copies(training(make(shape, method, attn_implementation="eager").train(), given()), both)


@pytest.mark.pairwise
@pytest.mark.parametrize("given", [text, padded_text])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_generation_copies_no_prefix(shape: str, method: str, given: Callable[[], dict[str, Tensor]]) -> None:
    model, longer = make(shape, method), range(VIRTUAL + TEXT, VIRTUAL + TEXT + 3)
    with Watch() as watch:
        model.generate(**given(), **GENERATE, max_new_tokens=3)
    assert not copies(watch.shapes, longer)


# ---- operations per token ----------------------------------------------------------------------------------------

OFF_DEVICE = ("_local_scalar_dense", "lift_fresh", "arange", "_to_copy", "scalar_tensor", "item", "nonzero")


def test_rows_of_several_tasks_are_sorted_once() -> None:
    """Which rows share which prompt is found out once for all layers and tokens."""
    model = Cell("multitask_prompt_tuning", "llama", "CAUSAL_LM").model()
    given = {**text(), "task_ids": torch.tensor([1, 0, 1, 0, 0])}
    found = per_token(model, given)
    found.subtract(per_token(model.get_base_model(), text()))
    for name, count in found.items():
        assert count <= 0 or not any(name.startswith(f"aten.{each}") for each in OFF_DEVICE), (name, count)


def per_token(model: Any, given: dict[str, Tensor]) -> Counter[str]:
    """The operations that one more generated token takes."""
    counts = []
    for tokens in (6, 7):
        with Watch() as watch:
            model.generate(**given, **GENERATE, max_new_tokens=tokens)
        counts.append(watch.names)
    difference = Counter(counts[1])
    difference.subtract(counts[0])
    return difference


def extra(shape: str, method: str, given: dict[str, Tensor], **more: Any) -> Counter[str]:
    """By how many a token takes more with a prompt than without."""
    model = make(shape, method, **more)
    base = copy.deepcopy(model.get_base_model())
    ours = per_token(model, given)
    ours.subtract(per_token(base, given))
    return ours


@pytest.mark.slow
@pytest.mark.pairwise
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_takes_a_few_operations_more(shape: str, method: str, padded: bool) -> None:
    """Some per layer and some per call, whatever the batch and the prompt; none leaves the device or makes a mask."""
    given = padded_text() if padded else text()
    found = extra(shape, method, given)
    assert sum(extra(shape, method, text(4)).values()) <= sum(extra(shape, method, text(2)).values()) + 2
    assert found == extra(shape, method, given, tokens=50)
    deeper = extra(shape, method, given, **{"n_layer" if shape == "gpt2" else "num_hidden_layers": 6})
    per_layer = (sum(deeper.values()) - sum(found.values())) / 4
    assert per_layer <= 20 and sum(found.values()) - 2 * per_layer <= 10
    for name, count in found.items():
        assert count <= 0 or not any(name.startswith(f"aten.{each}") for each in OFF_DEVICE), (name, count)
    # the mask that the model has made is turned into numbers once, for all layers; without padding there is none
    assert deeper["aten.masked_fill_.Scalar"] == found["aten.masked_fill_.Scalar"] == int(padded)
    assert found["aten.cat.default"] == 0
