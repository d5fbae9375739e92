"""Rows of several sequences, and TRL's SFTTrainer, which packs them and asks for log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from model_kit import METHODS, TWO_KINDS, close, ids_of, make
from torch import Tensor
from transformers import DataCollatorWithFlattening

from softprompt import CPTConfig, PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model
from softprompt.errors import ConfigError, UnsupportedError

LENGTHS = (4, 6, 3)


def sequences() -> list[Tensor]:
    torch.manual_seed(3)
    return [ids_of(length) for length in LENGTHS]


def packed(rows: list[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(row.shape[1]) for row in rows])[None],
    }


def predicts_first(model: SoftPromptModel) -> bool:
    """Whether a virtual token predicts a row's first."""
    return isinstance(model.active_peft_config, PromptTuningConfig)


def apart(model: SoftPromptModel, rows: list[Tensor], labels: list[Tensor]) -> Tensor:
    """The loss of rows, each alone: the mean over all labels that count."""
    first = predicts_first(model)
    total, count = torch.zeros(()), 0
    for row, own in zip(rows, labels, strict=True):
        number = int((own if first else own[:, 1:]).ne(-100).sum())
        total, count = total + number * model(input_ids=row, labels=own).loss, count + number
    return total / count


def gradient(loss: Tensor, model: SoftPromptModel) -> list[Tensor]:
    found = torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad])
    assert all(torch.count_nonzero(each) for each in found)
    return list(found)


def model_of(family: str, method: str) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(families.build(family, "CAUSAL_LM"), METHODS[method](task_type="CAUSAL_LM")).eval()


@pytest.mark.pairwise
@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_window", "gptj", "falcon_multi_query"])
def test_a_packed_row_learns_what_its_sequences_do(family: str, method: str, answers: bool) -> None:
    """Also with labels where a sequence begins: there the prompt predicts, and never the sequence before."""
    model, rows = model_of(family, method), sequences()
    labels = [row.clone() for row in rows]
    for own in labels:
        own[:, :2] = -100 if answers else own[:, :2]
    whole = torch.cat(labels, dim=1)
    loss = model(**packed(rows), labels=whole).loss
    expected = apart(model, rows, labels)
    close(loss, expected)
    for got, wanted in zip(gradient(loss, model), gradient(expected, model), strict=True):
        close(got, wanted)
    number = int((whole if predicts_first(model) or answers else whole[:, :-3]).ne(-100).sum())
    divided = model(**packed(rows), labels=whole, num_items_in_batch=torch.tensor(2 * number)).loss
    close(divided, expected / 2)


def test_several_packed_rows() -> None:
    model, rows = make("llama", "prompt_tuning"), [sequences(), [ids_of(5), ids_of(2), ids_of(6)]]
    each = [packed(row) for row in rows]
    batch = {name: torch.cat([row[name] for row in each]) for name in each[0]}
    together = model(**batch, labels=batch["input_ids"]).loss
    alone = [*rows[0], *rows[1]]
    close(together, apart(model, alone, alone))


@pytest.mark.parametrize("method", TWO_KINDS)
def test_transformers_own_packing(method: str) -> None:
    """`DataCollatorWithFlattening` makes one row of a batch; whether a cache is made by default does not matter."""
    model, rows = make("llama", method), sequences()
    batch = DataCollatorWithFlattening()([{"input_ids": row[0].tolist()} for row in rows])
    labels = [row.clone() for row in rows]
    for own in labels:
        own[:, 0] = -100
    for options in ({}, {"use_cache": True}):
        close(model(**batch, **options).loss, apart(model, rows, labels))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("family", "placement"), [("llama", "after_bos"), ("lfm2", "front")])
def test_a_prompt_inside_the_rows_is_refused(family: str, placement: str, labelled: bool) -> None:
    """Only the first sequence would see it."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, placement=placement)
    model, row = get_peft_model(families.build(family, "CAUSAL_LM"), config).eval(), packed(sequences())
    more = {"labels": row["input_ids"]} if labelled else {}
    with pytest.raises(ConfigError, match="a row of its own"):
        model(**row, **more)


@pytest.mark.parametrize("labelled", [False, True])
def test_sequences_with_slots_of_their_own(labelled: bool) -> None:
    """Each sequence holds the prompt at its slots, and sees itself alone."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, placement="template")
    model, rows = get_peft_model(tiny.build("llama"), config).eval(), sequences()
    slots = [torch.full_like(row, -1) for row in rows]
    for own in slots:
        own[0, 1:3] = torch.arange(2)
    row = packed(rows)
    more = {"labels": row["input_ids"]} if labelled else {}
    out = model(**row, **more, slots=torch.cat(slots, dim=1)).logits.split(LENGTHS, dim=1)
    for ids, own, got in zip(rows, slots, out, strict=True):
        close(got, model(input_ids=ids, slots=own).logits)


# ---- log-probabilities per token ---------------------------------------------------------------------------------


CASES = {
    "prompt": ("llama", lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prefix": ("llama", lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "after_bos": ("llama", lambda: PromptTuningConfig(num_virtual_tokens=4, placement="after_bos")),
    "cache": ("falcon_multi_query", lambda: PromptTuningConfig(num_virtual_tokens=4)),
    "state": ("lfm2", lambda: PromptTuningConfig(num_virtual_tokens=4)),
    "experts": ("mixtral", lambda: PromptTuningConfig(num_virtual_tokens=4)),
}


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_sum_to_the_loss(case: str, answers: bool) -> None:
    """What TRL makes its loss of is what the model's own loss is made of, to the gradient."""
    family, config = CASES[case]
    torch.manual_seed(0)
    model = get_peft_model(families.build(family, "CAUSAL_LM"), config()).eval()
    for side in ("right", "left"):
        batch = tiny.ragged(side=side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if answers:
            labels = labels.where(batch["attention_mask"].cumsum(1) > 2, -100)
        scores, expected = model(**batch, labels=labels, fused_lm_head=True), model(**batch, labels=labels)
        loss = -scores.log_probs.sum() / scores.label_mask.sum()
        close(loss, expected.loss)
        close(scores.loss, expected.loss)
        for got, wanted in zip(gradient(loss, model), gradient(expected.loss, model), strict=True):
            close(got, wanted)
        assert not bool(scores.log_probs[~scores.label_mask].any())
        ahead = expected.logits[:, :-1].log_softmax(-1)
        if answers and case != "after_bos":
            mask = labels[:, 1:] != -100
            close(scores.entropy.sum(), -(ahead.exp() * ahead).sum(-1)[mask].sum(), 1e-4)
            assert int(scores.is_top1.sum()) == int((ahead.argmax(-1) == labels[:, 1:])[mask].sum())
            assert int(scores.label_mask.sum()) == int(mask.sum())


def test_experts_of_a_mixture_are_weighed_by_the_caller() -> None:
    model, ids = model_of("mixtral", "prompt_tuning"), ids_of(6, 2)
    expected = model(input_ids=ids, labels=ids, output_router_logits=True)
    scores = model(input_ids=ids, labels=ids, output_router_logits=True, per_token=True)
    close(scores.aux_loss, expected.aux_loss)
    weight = model.config.router_aux_loss_coef
    close(scores.loss + weight * scores.aux_loss, expected.loss)


def test_log_probabilities_of_the_base_alone() -> None:
    model, ids = make("llama", "prefix"), ids_of(6, 2)
    with model.disable_adapter():
        close(model(input_ids=ids, labels=ids, per_token=True).loss, model(input_ids=ids, labels=ids).loss)
    with pytest.raises(ConfigError, match="labels"):
        model(input_ids=ids, per_token=True)


def test_a_loss_of_more_than_the_rows_labels_has_none() -> None:
    config = CPTConfig(cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4])
    model, ids = get_peft_model(tiny.build("llama"), config), ids_of(6)
    with pytest.raises(UnsupportedError, match="Trainer"):
        model(input_ids=ids, labels=ids, per_token=True)


# ---- SFTTrainer --------------------------------------------------------------------------------------------------

TEXTS = [
    ("the cat sat", " on the mat"),
    ("the dog ran to", " the red house by the river"),
    ("all night", " long"),
    ("name[The Mill] =>", " The Mill serves French food."),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")  # TRL sets it
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
def test_sft_trainer_counts_the_completions(method: str, packing: bool, tmp_path: Path) -> None:
    """One step of plain gradient descent, with TRL's defaults: the loss of the completions, row by row, and its
    gradient; packed or not, with layers run again in the backward pass."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer, model = tiny.tokenizer(), make("llama", method)
    rows, labels = [], []
    for asked, answer in TEXTS:
        begin, whole = tokenizer(asked)["input_ids"], tokenizer(asked + answer + "</s>")["input_ids"]
        rows.append(torch.tensor([whole]))
        labels.append(torch.tensor([[-100] * len(begin) + whole[len(begin) :]]))
    expected = apart(model, rows, labels)
    slopes, expected = gradient(expected, model), expected.detach()
    before = [each.detach().clone() for each in model.parameters() if each.requires_grad]
    options: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 2 if packing else 4, "bf16": False,
        "packing": packing, "max_length": 64, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0,
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    data = Dataset.from_list([{"prompt": asked, "completion": answer} for asked, answer in TEXTS])
    trainer = trl.SFTTrainer(model, trl.SFTConfig(**options), train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) == (1 if packing else 4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    after = [each.detach() for each in model.parameters() if each.requires_grad]
    for new, old, slope in zip(after, before, slopes, strict=True):
        torch.testing.assert_close(old - new, slope, rtol=1e-3, atol=1e-6)
