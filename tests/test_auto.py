"""The base model that a saved prompt names, loaded with the prompt before it."""

from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from conformance import Cell
from families import build

import softprompt
from softprompt import AutoPeftModel, CheckpointError, ConfigError, PrefixTuningConfig, get_peft_model

CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def saved(cell: Cell, folder: Path) -> Any:
    """A model of this cell, its base in one folder and its prompt in another."""
    build(cell.family, cell.task).save_pretrained(folder / "base")
    base: Any = type(build(cell.family, cell.task)).from_pretrained(folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, cell.config()).eval()
    model.save_pretrained(folder / "prompt")
    return model


@pytest.mark.parametrize("task", CLASSES)
def test_base_and_prompt_by_the_class_of_the_task_and_by_none(task: str, tmp_path: Path) -> None:
    cell = Cell("prompt_tuning", "t5" if task == "SEQ_2_SEQ_LM" else "gpt2" if task == "CAUSAL_LM" else "bert", task)
    model = saved(cell, tmp_path)
    batch = conformance.collate(cell, conformance.rows(cell), "right")
    more: Any = {"num_labels": 3} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    for kind in (getattr(softprompt, CLASSES[task]), AutoPeftModel):
        loaded = kind.from_pretrained(tmp_path / "prompt", **more)
        assert torch.equal(loaded(**batch)[0], model(**batch)[0])
        assert not any(each.requires_grad for each in loaded.parameters())
    again = AutoPeftModel.from_pretrained(tmp_path / "prompt", "mine", is_trainable=True, dtype=torch.bfloat16, **more)
    assert again.active_adapter == "mine" and again.dtype == torch.bfloat16
    assert any(each.requires_grad for each in again.parameters())


def test_a_prompt_without_a_task_names_the_class_of_its_base(tmp_path: Path) -> None:
    model = saved(Cell("p_tuning", "bert", "MASKED_LM"), tmp_path)
    loaded = AutoPeftModel.from_pretrained(tmp_path / "prompt")
    ids = torch.tensor([[5, 6, 7]])
    assert type(loaded.get_base_model()) is type(model.get_base_model())
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    saved(Cell("prefix_tuning", "gpt2", "CAUSAL_LM"), tmp_path)
    with pytest.raises(ConfigError, match="is a prompt for CAUSAL_LM, not for SEQ_CLS"):
        softprompt.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "prompt")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"is a prompt for .*base, which cannot be loaded .*SoftPromptModel"):
        AutoPeftModel.from_pretrained(tmp_path / "prompt")
    nameless = get_peft_model(build("gpt2", "CAUSAL_LM"), PrefixTuningConfig(num_virtual_tokens=2))
    nameless.save_pretrained(tmp_path / "nameless")
    with pytest.raises(ConfigError, match="names no base model"):
        AutoPeftModel.from_pretrained(tmp_path / "nameless")
    with pytest.raises(CheckpointError):
        AutoPeftModel.from_pretrained(tmp_path / "nowhere")
