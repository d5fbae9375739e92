"""Saving a prompt and going on with it, in another process and in other people's training loops."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_kit import METHODS, TWO_KINDS, close, ids_of, make, several, trainable
from torch import nn

from softprompt import (
    CheckpointError,
    ConfigError,
    SoftPromptModel,
    get_peft_model,
)

# ---- saving and going on -----------------------------------------------------------------------------------------


CASES = [("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")]


def trained(family: str, task: str, method: str, steps: int = 2) -> SoftPromptModel:
    model = make(family, method, task=task)
    train(model, steps)
    return model


def train(model: SoftPromptModel, steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = tiny.ragged()
    causal = model.get_output_embeddings() is not None
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100) if causal else torch.tensor([0, 1, 2])
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_saved_and_loaded(family: str, task: str, method: str, tmp_path: Path) -> None:
    model, batch = trained(family, task, method), tiny.ragged(side="left")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build(family), tmp_path)
    close(again(**batch).logits, expected)
    assert trainable(again) == set()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training
    assert again.peft_config["default"].inference_mode


@pytest.mark.slow
def test_saved_here_and_loaded_in_another_process(tmp_path: Path) -> None:
    model, batch = trained("llama", "CAUSAL_LM", "prefix_ffn"), tiny.ragged(side="left")
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().save_pretrained(tmp_path / "base")
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny, torch
from transformers import AutoModelForCausalLM
from softprompt import SoftPromptModel
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = SoftPromptModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
print(json.dumps(model(**tiny.ragged(side="left")).logits[:, -1].tolist()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    close(torch.tensor(json.loads(out.stdout.strip().splitlines()[-1])), model(**batch).logits[:, -1].detach())


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_going_on_with_the_kept_encoder(family: str, task: str, method: str, tmp_path: Path) -> None:
    model = trained(family, task, method)
    model.save_pretrained(tmp_path, keep_encoder=True)
    again = SoftPromptModel.from_pretrained(tiny.build(family), tmp_path, is_trainable=True)
    assert trainable(again) == trainable(model)
    train(model, 3)
    train(again, 3)
    assert torch.equal(again.encoder().saved_vectors(), model.encoder().saved_vectors())
    for name, value in model.heads.state_dict().items():
        assert torch.equal(again.heads.state_dict()[name], value)


@pytest.mark.parametrize("method", METHODS)
def test_going_on_without_the_encoder_trains_the_table(method: str, tmp_path: Path) -> None:
    trained("llama", "CAUSAL_LM", method).save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path, is_trainable=True)
    assert trainable(again) == {"prompt_encoder.default.embedding.weight"}
    before = again.encoder().saved_vectors()
    train(again, 1)
    assert not torch.equal(again.encoder().saved_vectors(), before)
    again.save_pretrained(tmp_path / "again")
    once_more = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "again")
    assert torch.equal(once_more.encoder().saved_vectors(), again.encoder().saved_vectors())


def test_several_adapters_in_one_folder(tmp_path: Path) -> None:
    model, ids = several(), ids_of(5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "soft" / "adapter_config.json").is_file()
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path)
    again.load_adapter(tmp_path / "soft", "soft")
    again.load_adapter(tmp_path / "lstm", "lstm", is_trainable=True)
    assert again.active_adapter == "default"
    assert trainable(again) == set()
    for name in ("default", "soft", "lstm"):
        model.set_adapter(name)
        again.set_adapter(name)
        close(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert bool(trainable(again)) == (name == "lstm")  # the others were loaded frozen
    model.save_pretrained(tmp_path / "some", selected_adapters=["soft"])
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["soft"]


def test_loading_under_another_name(tmp_path: Path) -> None:
    trained("gpt2", "CAUSAL_LM", "prefix").save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build("gpt2"), tmp_path, adapter_name="mine")
    assert again.active_adapter == "mine"
    with pytest.raises(ConfigError, match="'mine' is there already"):
        again.load_adapter(tmp_path, "mine")


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_failing_load_changes_nothing(method: str, tmp_path: Path) -> None:
    trained("gpt2", "CAUSAL_LM", method).save_pretrained(tmp_path)
    base = tiny.build("gpt2", n_layer=3, n_embd=48, n_head=4)
    modules, state = dict(base.named_modules()), {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"layers 2 in the adapter, 3 here|width 32 in the adapter, 48 here"):
        SoftPromptModel.from_pretrained(base, tmp_path)
    model = get_peft_model(base, METHODS["prefix"]()).eval()
    before = model(input_ids=ids_of(3)).logits
    with pytest.raises(CheckpointError, match="made for another base model"):
        model.load_adapter(tmp_path, "more")
    with pytest.raises(CheckpointError):
        model.load_adapter(tmp_path / "nothing", "more")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        SoftPromptModel.from_pretrained(tiny.build("gpt2"), tmp_path)
    assert list(model.peft_config) == list(model.prompt_encoder) == ["default"]
    assert dict(base.named_modules()) == modules
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
    assert before.isfinite().all()


def test_a_base_that_fails_to_load_still_trains(tmp_path: Path) -> None:
    trained("gpt2", "CAUSAL_LM", "prefix").save_pretrained(tmp_path)
    base = tiny.build("llama")
    with pytest.raises(CheckpointError):
        SoftPromptModel.from_pretrained(base, tmp_path)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_save_options_that_mean_nothing(tmp_path: Path) -> None:
    model = make("gpt2", "prefix")
    with pytest.raises(ConfigError, match="no option 'max_shard'"):
        model.save_pretrained(tmp_path, max_shard=1)
    with pytest.raises(ConfigError, match=r"safe_serialization=False.*safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ConfigError, match="no adapter named 'other'"):
        model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


# ---- other people's training loops --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_state_is_prompts_and_heads(family: str, method: str) -> None:
    model = make(family, method, task="SEQ_CLS" if family == "bert" else None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    heads = ["heads.copies.default.classifier.weight", "heads.copies.default.classifier.bias"]
    names = ["_extra_state", "prompt_encoder.default.embedding.weight"]  # the first: the configs
    assert list(state) == names + (heads if family == "bert" else [])
    other = make(family, method, task="SEQ_CLS" if family == "bert" else None)
    train(other, 1)
    other.load_state_dict(state)  # strictly
    close(other(**tiny.ragged()).logits, model(**tiny.ragged()).logits)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    assert list(nn.Sequential(model).state_dict()) == [f"0.{name}" for name in state]


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, classes: bool) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, tiny.VOCAB, (8,), generator=torch.Generator().manual_seed(index))
        types = {"token_type_ids": torch.ones(8, dtype=torch.long)} if self.classes else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types} | {
            "labels": index % 3 if self.classes else ids
        }


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), [("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
@pytest.mark.parametrize("method", ["p_tuning_mlp", "prefix"])
def test_transformers_own_trainer(family: str, task: str, method: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, use_cpu=True, disable_tqdm=True,
        load_best_model_at_end=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data = Rows(classes=task == "SEQ_CLS")
    model = make(family, method, task=task)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    assert trainer.predict(data).predictions.shape[0] == 8
    saved = tmp_path / "checkpoint-4" / "model.safetensors"
    assert saved.stat().st_size < sum(4 * p.numel() for p in model.get_base_model().parameters())
    again = Trainer(model=make(family, method, task=task), args=arguments, train_dataset=data, eval_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert math.isclose(again.evaluate()["eval_loss"], after, rel_tol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_trainer_divides_by_the_labels_that_count(method: str, tmp_path: Path) -> None:
    """The first token of a row counts where a virtual token predicts it: also for what Trainer divides the loss by."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    model = make("llama", method, task="CAUSAL_LM")
    data = [{name: value[:2] for name, value in Rows(classes=False)[index].items()} for index in range(8)]
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    expected = model(**batch).loss.item()
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    assert math.isclose(trainer.state.log_history[0]["loss"], expected, rel_tol=1e-3)
