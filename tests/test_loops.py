"""What other people's training loops rely on: checkpoints, resuming, the best prompt, what a loss is divided by."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import tiny
import torch
from model_kit import TWO_KINDS, close, make
from naive import logits as naive_logits
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GenerationConfig,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    pipeline,
)

from softprompt import PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model
from softprompt.errors import CheckpointError

pytest.importorskip("accelerate")  # transformers' Trainer is made of it
Row = dict[str, list[int]]


def some_rows(count: int = 8, answers: bool = True, seed: int = 0) -> list[Row]:
    """Rows of different lengths; with `answers` the first two labels of each are −100."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, tiny.VOCAB, (4 + number % 5,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]] if answers else list(ids)})
    return found


def trainer_of(
    model: nn.Module, out: Path, rows: list[Row], evaluated: list[Row] | None = None, **more: Any
) -> Trainer:
    options: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no",
        "logging_steps": 1,
    }  # fmt: skip
    collator = DataCollatorForSeq2Seq(tiny.tokenizer())
    return Trainer(model, TrainingArguments(**options | more), collator, rows, evaluated)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def prompt_state(model: SoftPromptModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name != "_extra_state"}


def same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_trainer_takes_it_for_no_model_of_its_own() -> None:
    """What follows describes the way that transformers and TRL take for a module they do not know."""
    import peft

    model = make("llama", "prefix")
    assert not isinstance(model, PreTrainedModel | peft.PeftModel)


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
@pytest.mark.parametrize("method", ["p_tuning_mlp", "prefix"])
def test_a_checkpoint_holds_the_adapter_and_loads_as_a_prompt(
    family: str, task: str, method: str, tmp_path: Path
) -> None:
    model = make(family, method, task=task)
    rows = some_rows() if task == "CAUSAL_LM" else [{**row, "labels": 1} for row in some_rows()]
    trainer = trainer_of(model, tmp_path, rows, max_steps=2, save_strategy="steps", save_steps=1)  # type: ignore
    if task == "SEQ_CLS":
        trainer.data_collator = DataCollatorWithPadding(tiny.tokenizer())
    trainer.train()
    trainer.save_model(str(tmp_path / "whole"))
    base = {value.data_ptr() for value in model.get_base_model().state_dict().values()}
    inputs = tiny.ragged()
    for folder in ("checkpoint-2", "whole"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert {name.split(".")[0] for name in saved} <= {"prompt_encoder", "heads", "_extra_state"}
        assert not any(value.data_ptr() in base for value in saved.values())
        fresh = families.build(family, task)
        expected = model.eval()(**inputs).logits
        for trainable in (False, True):
            loaded = SoftPromptModel.from_pretrained(fresh, tmp_path / folder, is_trainable=trainable).eval()
            close(loaded(**inputs).logits, expected)
            assert any(each.requires_grad for each in loaded.parameters()) == trainable
        same_state(prompt_state(loaded), prompt_state(model))  # the encoder too, so that training can go on
    earlier = SoftPromptModel.from_pretrained(families.build(family, task), tmp_path / "checkpoint-1")
    assert not torch.allclose(earlier(**inputs).logits, expected, atol=1e-4)


def test_which_adapter_a_checkpoint_means(tmp_path: Path) -> None:
    """The one that was active; the others stay in the file."""
    model = make("llama", "prefix")
    model.add_adapter("soft", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.set_adapter("soft")
    trainer_of(model, tmp_path, some_rows()).save_model(str(tmp_path))
    loaded = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert loaded.peft_config["default"].num_virtual_tokens == 3
    close(loaded(**tiny.ragged()).logits, model(**tiny.ragged()).logits)


def test_a_model_is_no_checkpoint_of_a_loop(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path)


@pytest.mark.parametrize("damage", ["numbers", "config", "shape", "lora"])
def test_a_damaged_checkpoint_of_a_loop(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = make("llama", "prompt_tuning").state_dict()
    if damage == "numbers":
        state["prompt_encoder.default.embedding.weight"][0, 0] = torch.nan
    elif damage == "config":
        state["_extra_state"] = state["_extra_state"][:-3].clone()
    elif damage == "lora":  # trained in the base model, which a prompt does not bring along
        state["base_model.lora_A.default.weight"] = torch.zeros(2, 2)
    else:
        state["prompt_encoder.default.embedding.weight"] = torch.zeros(4, 31)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["p_tuning_mlp", "prefix"])
def test_resuming_changes_nothing(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole = trainer_of(make("gpt2", method).train(), tmp_path, some_rows(10), **options)
    whole.train()
    again = trainer_of(make("gpt2", method).train(), tmp_path, some_rows(10), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    same_state(prompt_state(again.model), prompt_state(whole.model))  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize("method", ["p_tuning_mlp", "prefix"])
def test_the_best_prompt_is_loaded_at_the_end(method: str, tmp_path: Path) -> None:
    """The greatest loss is called the best one, so that it is not the last."""
    model, rows = make("gpt2", method), some_rows()
    trainer = trainer_of(
        model, tmp_path, rows, rows, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert seen[0] > seen[-1] and str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen[0], rel=1e-6)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    same_state(prompt_state(model), {name: value for name, value in saved.items() if name != "_extra_state"})


# ---- losses ------------------------------------------------------------------------------------------------------


def one_loss(model: SoftPromptModel, out: Path, rows: list[Row], **more: Any) -> float:
    trainer = trainer_of(model, out, rows, **more)
    trainer.train()
    return losses(trainer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("method", TWO_KINDS)
def test_accumulated_steps_are_one_large_batch(method: str, answers: bool, tmp_path: Path) -> None:
    """Rows have different numbers of labels, so a mean of means would be another loss."""
    rows, states = some_rows(8, answers), []
    batch = DataCollatorForSeq2Seq(tiny.tokenizer())(copy.deepcopy(rows))
    expected = make("llama", method)(**batch).loss.item()
    for size, steps in ((8, 1), (2, 4)):
        model = make("llama", method)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        found = one_loss(model, tmp_path, rows, **options, max_grad_norm=0.0)
        states.append((found, prompt_state(model)))
    assert [loss for loss, _ in states] == pytest.approx([expected, expected], rel=1e-5)
    before = prompt_state(make("llama", method))
    for name, value in states[0][1].items():
        assert not torch.equal(value, before[name])
        torch.testing.assert_close(states[1][1][name] - before[name], value - before[name], rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("lfm2", "CAUSAL_LM")])
def test_accumulated_steps_where_a_loss_is_a_mean(family: str, task: str, tmp_path: Path) -> None:
    """BERT and T5 take the mean over a batch whatever they are told to divide by; so Trainer has to divide."""
    rows, found = [{**row, "labels": [4, 5, 6]} for row in some_rows(8)], []
    if task != "SEQ_2_SEQ_LM":
        rows = [{**row, "labels": 1 if task == "SEQ_CLS" else row["input_ids"]} for row in rows]
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = get_peft_model(families.build(family, task), PromptTuningConfig(task_type=task, num_virtual_tokens=4))
        trainer = trainer_of(
            model,
            tmp_path,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,  # type: ignore
        )
        trainer.data_collator = (
            DataCollatorWithPadding(tiny.tokenizer()) if task == "SEQ_CLS" else trainer.data_collator
        )
        trainer.train()
        found.append(losses(trainer)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def smoothed(model: SoftPromptModel, rows: list[Row], epsilon: float, divisor: int) -> Tensor:
    """Label smoothing written out, over the plain formulation: every label but a row's first."""
    total = torch.zeros(())
    for row in rows:
        scores = naive_logits(model, torch.tensor([row["input_ids"]]))[0][0].log_softmax(-1)
        for column, label in enumerate(row["labels"]):
            if column and label != -100:
                mean = (1 - epsilon) * scores[column - 1, label] + epsilon * scores[column - 1].mean()
                total = total - mean
    return total / divisor


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("method", TWO_KINDS)
def test_smoothed_labels_are_the_next_tokens(method: str, answers: bool, tmp_path: Path) -> None:
    """Trainer decides by the class's name whether to shift them. Where a virtual token predicts a row's first token,
    that label is one of those the loss is divided by, but logits of real tokens do not predict it."""
    rows, model = some_rows(4, answers), make("llama", method)
    counted = sum(label != -100 for row in rows for label in row["labels"])
    if method == "prefix" and not answers:
        counted -= len(rows)
    with torch.no_grad():
        expected = smoothed(model, rows, 0.2, counted)
    assert one_loss(model, tmp_path, rows, label_smoothing_factor=0.2) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("placement", ["front", "after_bos"])
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_padding_changes_no_loss(family: str, placement: str) -> None:
    """A batch padded on either side has the loss of its rows, each by itself."""
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, placement=placement)
    model = get_peft_model(families.build(family, "CAUSAL_LM"), config).eval()
    found = []
    for side in ("left", "right"):
        batch = tiny.ragged(side=side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append(model(**batch, labels=labels).loss)
    total, count = torch.zeros(()), 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[mask.bool()][None]
        own = row.shape[1] if placement == "front" else row.shape[1] - 1
        total, count = total + own * model(input_ids=row, labels=row).loss, count + own
    for loss in found:
        close(loss, total / count)


@pytest.mark.parametrize("method", TWO_KINDS)
def test_experts_add_their_loss_once(method: str) -> None:
    """A mixture's own loss is neither divided by the labels nor counted again for first tokens."""
    base: Any = families.build("mixtral", "CAUSAL_LM")
    base.config.output_router_logits, base.router_aux_loss_coef = True, 0.5
    torch.manual_seed(0)
    make_config = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    model = get_peft_model(base, make_config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    batch = tiny.ragged()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for items in ({}, {"num_items_in_batch": torch.tensor(50)}):
        whole = model(**batch, labels=labels, **items)
        assert whole.aux_loss > 0
        plain = model(**batch, labels=labels, output_router_logits=False, **items).loss
        close(whole.loss, plain + 0.5 * whole.aux_loss)


@pytest.mark.pairwise
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon_multi_query", "t5"])
def test_mixed_precision_is_near(family: str, method: str, checkpointed: bool) -> None:
    """Under autocast some families have queries in float32 beside values in half precision, unless there is a cache."""
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    torch.manual_seed(0)
    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    model = get_peft_model(families.build(family, task), kind(task_type=task, num_virtual_tokens=4)).train()
    if checkpointed:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    batch = tiny.ragged()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels, use_cache=False).loss
    for options in ({"use_cache": False}, {}):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=labels, **options).loss
        loss.backward()
        torch.testing.assert_close(loss.float(), expected, rtol=0.03, atol=0.0)


# ---- what a loop asks of a model ---------------------------------------------------------------------------------


def test_columns_of_a_dataset_reach_the_model() -> None:
    """Trainer drops what `forward` does not name."""
    names = inspect.signature(make("llama", "prefix").forward).parameters
    assert {"input_type_mask", "task_ids", "start_positions", "end_positions", "pixel_values"} <= set(names)
    assert [name for name in names if "label" in name] == ["labels"]


def test_trainer_takes_a_prompt_over_quantised_weights(tmp_path: Path) -> None:
    """It refuses a quantised model of which it believes that it would have to train the weights themselves."""
    base: Any = tiny.build("llama")
    base.is_quantized, base.hf_quantizer = True, SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer_of(base, tmp_path, some_rows())
    trainer_of(get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4)), tmp_path, some_rows())


@pytest.mark.slow
def test_question_answering_in_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import default_data_collator

    rows = [
        {"input_ids": ids, "start_positions": 1, "end_positions": 3} for ids in torch.randint(3, 99, (8, 9)).tolist()
    ]
    data: Any = Dataset.from_list(rows)
    config = PrefixTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=4)
    model = get_peft_model(families.build("bert", "QUESTION_ANS"), config)
    trainer = trainer_of(model, tmp_path, data, data, max_steps=2, label_names=["start_positions", "end_positions"])
    trainer.data_collator = default_data_collator
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_seq2seq_trainer_sets_how_to_generate(tmp_path: Path) -> None:
    """A generation config that is set on the model is the base model's."""
    config = GenerationConfig(
        max_new_tokens=3, min_new_tokens=3, pad_token_id=0, decoder_start_token_id=0, eos_token_id=2
    )
    model = get_peft_model(families.build("t5", "SEQ_2_SEQ_LM"), PromptTuningConfig(num_virtual_tokens=4))
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_config=config, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model, arguments, DataCollatorForSeq2Seq(tiny.tokenizer(), model), processing_class=tiny.tokenizer()
    )
    assert model.get_base_model().generation_config.max_new_tokens == 3
    found = trainer.predict(some_rows(4))  # type: ignore
    written = torch.as_tensor(found.predictions)
    assert not bool(written[:, 4:].any()) and bool(written[:, 1:3].all())  # padded by Trainer
    assert found.metrics["test_loss"] > 0  # type: ignore


def test_a_pipeline_writes_what_generate_does() -> None:
    tokenizer, model = tiny.tokenizer(), make("llama", "prompt_tuning")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)  # type: ignore
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    found = write("the cat sat on", **options, return_full_text=False)[0]["generated_text"]
    inputs = tokenizer("the cat sat on", return_tensors="pt")
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert found == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_model_prints_its_own_name() -> None:
    assert repr(make("llama", "prefix")).startswith("SoftPromptModel(")
