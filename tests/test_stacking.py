"""Prompts on models that carry PEFT's LoRA: both train, each is saved by its own library.

Every registered method takes part. The reference is the plain formulation of `naive.py` on the LoRA model.
"""

import copy
from pathlib import Path
from typing import Any

import conformance
import naive
import peft
import pytest
import tiny
import torch
from conformance import Cell
from families import build
from safetensors.torch import load_file
from torch import nn

from softprompt import (
    METHODS,
    CheckpointError,
    PrefixTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
COUNT = 4


def combinations(*pairs: tuple[str, str]) -> list[Cell]:
    """Every method before these heads of these families, as far as the cells exist."""
    cells = [Cell(method, family, task) for family, task in pairs for method in METHODS]
    return [cell for cell in cells if cell.refusal is None]


TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"],
           "bloom": ["query_key_value"]}  # fmt: skip
KIND = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bloom": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def lora(family: str, how: str, task: str | None = None) -> Any:
    """A model with LoRA in it, not at its start (where it does nothing), put there in one of three ways."""
    task = task or KIND[family]
    base = build(family, task)
    config = peft.LoraConfig(r=2, target_modules=TARGETS[family], init_lora_weights=False, lora_dropout=0.0,
                             fan_in_fan_out=family == "gpt2", task_type=task if how == "wrapped" else None)  # fmt: skip
    torch.manual_seed(3)
    if how == "wrapped":
        return peft.get_peft_model(base, config)
    if how == "injected":
        return peft.inject_adapter_in_model(config, base)
    base.add_adapter(config)  # pyright: ignore[reportCallIssue]
    return base


@pytest.mark.pairwise
@pytest.mark.parametrize("how", ["wrapped", "injected", "added"])
@pytest.mark.parametrize("cell", combinations(*KIND.items()), ids=str)
def test_a_prompt_on_a_lora_model_trains_with_it(cell: Cell, how: str) -> None:
    """LoRA stays trainable; logits and the gradients of both are those of the plain formulation on the LoRA model."""
    under = lora(cell.family, how)
    before = {id(p): p.requires_grad for p in under.parameters()}
    torch.manual_seed(1)
    model = get_peft_model(under, cell.config()).eval()
    assert all(p.requires_grad == before[id(p)] for p in under.parameters() if id(p) in before)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_" in name for name in names) and any(name.startswith("prompt_encoder") for name in names)
    rows = conformance.rows(cell)
    with torch.no_grad():
        out = conformance.together(cell, model(**conformance.collate(cell, rows, "left")), rows, "left")
    if cell.task == "CAUSAL_LM":
        options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": tiny.PAD}
        tokens = model.generate(**conformance.collate(cell, rows, "left"), **options)[:, -4:]
        with torch.no_grad():
            written = [naive.greedy(model, row.ids[None], 4, cell.first, **row.of_task) for row in rows]
        assert torch.equal(tokens, torch.cat(written))
    alone = [conformance.alone(cell, model, row) for row in rows]
    for got, expected in zip(out, alone, strict=True):
        for key, value in got.items():
            torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(conformance.loss(cell, alone, rows), parameters, materialize_grads=True)
    got = torch.autograd.grad(conformance.library_loss(cell, model, rows, "left"), parameters, materialize_grads=True)
    for name, ours, wanted in zip(names, got, expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("cell", combinations(("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")), ids=str)
def test_a_prompt_on_a_lora_model_is_saved_alone(cell: Cell, tmp_path: Path) -> None:
    """And loads on the LoRA model again; without LoRA and the head beside it, it is another model, of course."""
    family = cell.family
    torch.manual_seed(1)
    model = get_peft_model(lora(family, "wrapped"), cell.config()).eval()
    model.save_pretrained(tmp_path)
    batch = conformance.collate(cell, conformance.rows(cell), "right")
    expected = model(**batch).logits
    loaded = SoftPromptModel.from_pretrained(lora(family, "wrapped"), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-6, rtol=1e-6)
    if family == "llama":
        elsewhere = SoftPromptModel.from_pretrained(build(family, KIND[family]), tmp_path)
        assert not torch.allclose(elsewhere(**batch).logits, expected, atol=1e-4)
    else:
        with pytest.raises(CheckpointError, match="is missing from the saved prompt"):
            SoftPromptModel.from_pretrained(build(family, KIND[family]), tmp_path)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_state_of_a_training_run_has_the_lora_too(family: str) -> None:
    """What a training loop saves and loads is all that trains, and none of what is frozen."""
    cell = Cell("prefix_tuning", family, KIND[family])
    model, again = (get_peft_model(lora(family, "wrapped"), cell.config()).eval() for _ in range(2))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    conformance.library_loss(cell, model, conformance.rows(cell), "right").backward()
    optimizer.step()
    state = model.state_dict()
    trains = {id(each) for each in model.parameters() if each.requires_grad}
    named = {name for name, each in model.state_dict(keep_vars=True).items() if id(each) in trains}
    assert named == set(state) - {"_extra_state"} and any("lora_A" in name for name in state)
    assert again.load_state_dict(copy.deepcopy(state)) == ([], [])
    batch = conformance.collate(cell, conformance.rows(cell), "right")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    without = {name: value for name, value in state.items() if "lora_A" not in name}
    with pytest.raises(RuntimeError, match="lora_A"):
        again.load_state_dict(without)


def test_a_head_that_peft_trains_stays_pefts(tmp_path: Path) -> None:
    """It trains with the LoRA under any prompt, and PEFT saves it; the prompt's own file has none."""
    under = lora("bert", "wrapped")
    head = under.base_model.model.classifier
    model = get_peft_model(under, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=COUNT))
    assert model.get_base_model().get_submodule("classifier") is head
    assert all(each.requires_grad for each in head.modules_to_save.parameters())
    model.save_pretrained(tmp_path / "prompt")
    under.save_pretrained(tmp_path / "lora")
    assert set(load_file(tmp_path / "prompt" / "adapter_model.safetensors")) == {"prompt_embeddings"}
    assert any("classifier" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    cell = Cell("prefix_tuning", "bert", "SEQ_CLS")
    again = peft.PeftModel.from_pretrained(build("bert", "SEQ_CLS"), str(tmp_path / "lora"))
    loaded = SoftPromptModel.from_pretrained(again, tmp_path / "prompt")
    batch = conformance.collate(cell, conformance.rows(cell), "right")
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, atol=1e-6, rtol=1e-6)


def test_switching_lora_off_is_pefts_affair() -> None:
    under = lora("llama", "wrapped")
    torch.manual_seed(1)
    model = get_peft_model(under, PrefixTuningConfig(num_virtual_tokens=COUNT)).eval()
    torch.manual_seed(1)
    plain = get_peft_model(build("llama", "CAUSAL_LM"), PrefixTuningConfig(num_virtual_tokens=COUNT)).eval()
    ids = tiny.ragged()
    with under.disable_adapter():
        torch.testing.assert_close(model(**ids).logits, plain(**ids).logits)
    assert not torch.allclose(model(**ids).logits, plain(**ids).logits, atol=1e-4)


def test_pefts_own_prompt_is_no_base() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    prompted = peft.get_peft_model(build("llama", "CAUSAL_LM"), config)
    with pytest.raises(UnsupportedError, match=r"PROMPT_TUNING prompt of PEFT's.*get_base_model"):
        get_peft_model(prompted, PrefixTuningConfig())
    with pytest.raises(UnsupportedError, match="the base model is a Linear"):
        get_peft_model(nn.Linear(2, 2), PrefixTuningConfig())
