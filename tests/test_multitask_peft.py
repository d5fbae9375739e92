"""Multitask prompts between PEFT and here: trained there, used here, and the way back, equal logits for every task."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from softprompt import MultitaskPromptTuningConfig, SoftPromptModel, get_peft_model

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

OPTIONS: dict[str, Any] = {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2}
TASKS = torch.tensor([2, 0, 1])
PAIRS = [
    ("gpt2", "CAUSAL_LM"),
    ("llama", "CAUSAL_LM"),
    ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
]


def perturbed(model: Any) -> Any:
    """With a prompt that matters, which PEFT's own start does not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, task: str) -> Tensor:
    """Logits of the real tokens `[N, V]`, or of the rows `[B, labels]`; PEFT has p more positions in front."""
    batch = tiny.ragged()
    if task == "SEQ_2_SEQ_LM":
        labels = tiny.ragged((4, 4, 4), seed=1)["input_ids"]
        return model(**batch, labels=labels, task_ids=TASKS).logits
    logits = model(**batch, task_ids=TASKS).logits
    return logits if task == "SEQ_CLS" else logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


def same(one: nn.Module, other: nn.Module, task: str) -> None:
    torch.testing.assert_close(outputs(one, task), outputs(other, task), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_there_and_back(family: str, task: str, tmp_path: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(task_type=task, num_transformer_submodules=1, **OPTIONS)
    theirs: Any = perturbed(peft.get_peft_model(families.build(family, task), config))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = SoftPromptModel.from_pretrained(families.build(family, task), tmp_path / "theirs")
    same(ours, theirs, task)
    ours.save_pretrained(tmp_path / "ours")
    same(peft.PeftModel.from_pretrained(families.build(family, task), str(tmp_path / "ours")), theirs, task)
    found = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    theirs_shapes, our_shapes = ({name: each.shape for name, each in part.items()} for part in found)
    assert theirs_shapes == our_shapes


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_ours_in_peft(family: str, task: str, tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(task_type=task, **OPTIONS)
    ours = perturbed(get_peft_model(families.build(family, task), config))
    ours.save_pretrained(tmp_path)
    same(peft.PeftModel.from_pretrained(families.build(family, task), str(tmp_path)), ours, task)


def test_peft_target_that_started_from_a_source(tmp_path: Path) -> None:
    """PEFT wants the source's file whenever the target is loaded; what was saved here needs it nowhere."""
    source: Any = perturbed(
        peft.get_peft_model(tiny.build("llama"), peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **OPTIONS))
    )
    source.save_pretrained(str(tmp_path / "source"))
    options: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 4,
        "num_ranks": 2,
        "prompt_tuning_init": "EXACT_SOURCE_TASK",
        "prompt_tuning_init_task": 1,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "source" / "adapter_model.safetensors"),
    }
    theirs: Any = peft.get_peft_model(tiny.build("llama"), peft.MultitaskPromptTuningConfig(**options)).eval()
    ours = get_peft_model(tiny.build("llama"), MultitaskPromptTuningConfig(**options)).eval()
    theirs.save_pretrained(str(tmp_path / "target"))
    shutil.rmtree(tmp_path / "source")
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "target")
    again.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "ours"))
    batch, one = tiny.ragged(), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        expected = theirs(**batch, task_ids=one).logits[:, 4:][batch["attention_mask"].bool()]
        for model in (ours, again):
            got = model(**batch).logits[batch["attention_mask"].bool()]
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
        got = back(**batch, task_ids=one).logits[:, 4:][batch["attention_mask"].bool()]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(FileNotFoundError):
        peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "target"))


@pytest.mark.parametrize("task", ["QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_tasks_that_peft_refuses_train_here(task: str, tmp_path: Path) -> None:
    batch = {**tiny.ragged(), "task_ids": TASKS}
    theirs: Any = peft.get_peft_model(
        families.build("bert", task), peft.MultitaskPromptTuningConfig(task_type=task, **OPTIONS)
    )
    with pytest.raises((TypeError, ValueError)):
        theirs(**batch)
    ours = get_peft_model(families.build("bert", task), MultitaskPromptTuningConfig(task_type=task, **OPTIONS))
    spans = {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([2, 4, 3])}
    optimizer = torch.optim.AdamW([each for each in ours.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        output = ours(**batch, **(spans if task == "QUESTION_ANS" else {}))
        loss = output.loss if task == "QUESTION_ANS" else output.last_hidden_state[:, 0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    ours.eval().save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(families.build("bert", task), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], ours(**batch)[0])
