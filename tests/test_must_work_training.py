"""Training with a prompt in front: checkpointed layers, saved adapters, several adapters, and counts.

Every registered method takes part where what is tested could differ by method. The reference is the plain formulation
of `naive.py`, or the same model without what is tested.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from conformance import Cell
from families import FAMILIES, build
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt import (
    METHODS,
    PrefixTuningConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)
from softprompt.prompt import KVPrompt

COUNT = 4
TWO_KINDS: dict[str, Any] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=COUNT, **more),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=COUNT, **more),
}
KV_METHODS = [name for name, method in METHODS.items() if issubclass(method, KVPrompt)]


def combinations(*pairs: tuple[str, str]) -> list[Cell]:
    """Every method before these heads of these families, as far as the cells exist."""
    cells = [Cell(method, family, task) for family, task in pairs for method in METHODS]
    return [cell for cell in cells if cell.refusal is None]


def languages(*families: str) -> list[Cell]:
    return combinations(*((family, FAMILIES[family].tasks[0]) for family in families))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(model: nn.Module, other: nn.Module) -> None:
    got, expected = gradients(model), gradients(other)
    assert got.keys() == expected.keys() and any(torch.count_nonzero(each) for each in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- gradient checkpointing --------------------------------------------------------------------------------------


def checkpointed(model: Any, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # the first is the name in newer versions


@pytest.mark.pairwise
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before_wrapping", [True, False])
@pytest.mark.parametrize("cell", languages("bloom", "mpt", "falcon_multi_query", "gptj", "t5", "bart", "lfm2"), ids=str)
def test_checkpointing_changes_no_gradient(cell: Cell, before_wrapping: bool, reentrant: bool) -> None:
    plain, base = cell.model().train(), build(cell.family, cell.task)
    if before_wrapping:
        checkpointed(base, reentrant)
    torch.manual_seed(1)
    model = get_peft_model(base, cell.config()).train()
    if not before_wrapping:
        checkpointed(model, reentrant)
    if reentrant:
        model.enable_input_require_grads()  # what transformers says it needs when nothing else trains
    rows, again = conformance.rows(cell), []
    conformance.library_loss(cell, plain, rows, "left").backward()
    loss = conformance.library_loss(cell, model, rows, "left")
    for layer in base.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in list(layer.modules())[1:]:
                part.register_forward_hook(lambda *_: again.append(1))
    loss.backward()
    assert again  # layers did run again
    same_gradients(model, plain)


# ---- saved adapters ----------------------------------------------------------------------------------------------


def only_trains(model: SoftPromptModel, name: str) -> bool:
    """Whether an adapter's prompt trains, its heads with it, and nothing else."""
    trains = {id(each) for each in model.parameters() if each.requires_grad}
    heads = {id(each) for each in model.heads.copies[name].parameters()}
    prompt = {id(each) for each in model.encoder(name).parameters()}
    return heads <= trains <= heads | prompt and bool(trains & prompt)


def step(cell: Cell, model: SoftPromptModel, optimizer: torch.optim.Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    torch.manual_seed(seed)
    loss = conformance.library_loss(cell, model, conformance.rows(cell, seed), "right")
    loss.backward()
    optimizer.step()
    return loss.item()


def adam(model: SoftPromptModel) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.pairwise
@pytest.mark.parametrize("cell", [*languages("llama", "t5", "bloom"), *combinations(("bert", "SEQ_CLS"))], ids=str)
def test_training_goes_on_from_a_saved_adapter(cell: Cell, tmp_path: Path) -> None:
    """Saved with its encoder and loaded, a prompt trains on as if nothing had happened."""
    model = cell.model()
    optimizer = adam(model)
    for seed in range(3):
        step(cell, model, optimizer, seed)
    model.save_pretrained(tmp_path, keep_encoder=True)
    loaded = SoftPromptModel.from_pretrained(build(cell.family, cell.task), tmp_path, is_trainable=True).eval()
    assert any(p.requires_grad for p in loaded.parameters())
    names = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    again = adam(loaded)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        expected = step(cell, model, optimizer, seed)
        assert step(cell, loaded, again, seed) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cell", [*languages("llama", "t5"), *combinations(("bert", "SEQ_CLS"))], ids=str)
def test_a_prompt_that_is_loaded_to_be_used_is_frozen(cell: Cell, tmp_path: Path) -> None:
    cell.model().save_pretrained(tmp_path)
    loaded = SoftPromptModel.from_pretrained(build(cell.family, cell.task), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module.training for module in loaded.modules())
    loaded.load_adapter(tmp_path, "other")
    loaded.set_adapter("other")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.load_adapter(tmp_path, "third", is_trainable=True)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.set_adapter("third")
    assert only_trains(loaded, "third")


# ---- several adapters on one model -------------------------------------------------------------------------------


def everything_on(family: str, task: str) -> SoftPromptModel:
    """All methods that the family takes, on one model, each under its own name."""
    cells = [Cell(method, family, task) for method in METHODS]
    cells = [cell for cell in cells if cell.refusal is None]
    torch.manual_seed(1)
    model = get_peft_model(build(family, task), cells[0].config(), cells[0].method).eval()
    for cell in cells[1:]:
        model.add_adapter(cell.method, cell.config())
    return model


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "CAUSAL_LM"), ("bloom", "CAUSAL_LM"), ("lfm2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS"),
     ("bert", "QUESTION_ANS"), ("gpt2", "SEQ_CLS"), ("albert", "TOKEN_CLS")],
)  # fmt: skip
def test_methods_mixed_on_one_model(family: str, task: str) -> None:
    """Each is what it is alone, trains alone, and leaves the others and the base as they are."""
    model = everything_on(family, task)
    base = copy.deepcopy(model.get_base_model().state_dict())
    for name in model.peft_config:
        cell = Cell(name, family, task)
        model.set_adapter(name)
        assert only_trains(model, name)
        rows = conformance.rows(cell)
        out = conformance.together(cell, model(**conformance.collate(cell, rows, "left")), rows, "left")
        for row, got in zip(rows, out, strict=True):
            expected = conformance.alone(cell, model, row)
            for key, value in got.items():
                torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-4)
        others = {key: value.clone() for key, value in model.state_dict().items() if f".{name}." not in key}
        optimizer = adam(model)
        step(cell, model, optimizer, 0)
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in others.items())
    with model.disable_adapter():
        now = model.get_base_model().state_dict()
    assert all(torch.equal(now[key], value) for key, value in base.items())


# ---- without the prompt ------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "cell",
    combinations(
        ("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("roberta", "QUESTION_ANS"), ("distilbert", "FEATURE_EXTRACTION"),
        ("llama", "SEQ_CLS"), ("gpt2", "SEQ_CLS"), ("bloom", "SEQ_CLS"), ("mpt", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"),
        ("bart", "SEQ_2_SEQ_LM"), ("bart", "SEQ_CLS"),
    ),
    ids=str,
)  # fmt: skip
def test_without_the_prompt_it_is_the_base_model(cell: Cell) -> None:
    """Its own head included, and in `generate` too, also for a head that has been trained in between."""
    bare: Any = build(cell.family, cell.task)
    model = cell.model()
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    batch = conformance.collate(cell, conformance.rows(cell), "right")
    of_task = {"task_ids": batch.pop("task_ids")} if "task_ids" in batch else {}
    with model.disable_adapter(), torch.no_grad():
        assert not model.enabled
        got, expected = model(**batch, **of_task), bare(**batch)
        assert torch.equal(got[0], expected[0])
        if cell.task.endswith("LM"):
            row = {name: batch[name] for name in ("input_ids", "attention_mask")}
            options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
            assert torch.equal(model.generate(**row, **of_task, **options), bare.generate(**row, **options))
    assert not torch.allclose(model(**batch, **of_task)[0], expected[0], atol=1e-4)


# ---- counts and status -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", languages("t5", "bart"), ids=str)
def test_no_dead_half_of_parameters(cell: Cell) -> None:
    """PEFT gives an encoder-decoder's prompt twice the rows that it uses."""
    model = cell.model()
    conformance.library_loss(cell, model, conformance.rows(cell), "right").backward()
    encoder, width = model.encoder(), model.get_base_model().get_input_embeddings().weight.shape[1]
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        if "embedding" in name and parameter.ndim == 2 and parameter.shape[0] == COUNT:
            assert bool(parameter.grad.abs().amax(1).gt(0).all()), name
    if cell.method == "prompt_tuning":
        assert model.get_nb_trainable_parameters()[0] == COUNT * width


@pytest.mark.parametrize("cell", [*languages("llama", "t5"), *combinations(("bert", "SEQ_CLS"))], ids=str)
def test_counts_and_status(cell: Cell) -> None:
    family, method = cell.family, cell.method
    model, base = cell.model(), build(family, cell.task)
    trainable, total = model.get_nb_trainable_parameters()
    own = sum(p.numel() for p in model.encoder().parameters())
    head = sum(p.numel() for p in base.get_submodule("classifier").parameters()) if family == "bert" else 0
    assert total == sum(p.numel() for p in base.parameters()) + own  # a head counts once
    assert trainable == sum(p.numel() for p in model.encoder().parameters() if p.requires_grad) + head
    status = model.get_model_status()
    assert (status.trainable_params, status.total_params) == (trainable, total)
    assert status.base_model_type == type(base).__name__
    assert status.peft_types == {"default": METHODS[method].peft_type}
    assert status.num_adapter_layers == (base.config.num_hidden_layers if method in KV_METHODS else 0)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert (status.requires_grad, status.devices) == ({"default": True}, {"default": ["cpu"]})
    with model.disable_adapter():
        assert not model.get_model_status().enabled
    model.add_adapter("more", replace(cell.config(), num_virtual_tokens=COUNT + 1))
    status = model.get_model_status()
    assert status.available_adapters == ["default", "more"]
    assert status.requires_grad == {"default": True, "more": False}
    model.set_adapter("more")
    assert model.get_model_status().requires_grad == {"default": False, "more": True}
    model.set_adapter("more", inference_mode=True)
    assert model.get_model_status().requires_grad == {"default": False, "more": False}
