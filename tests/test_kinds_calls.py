"""Inputs of each token count the real tokens, on every method and head: p columns more are refused in one sentence."""

from __future__ import annotations

from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from softprompt import ConfigError, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

P = 4
METHODS: dict[str, Any] = {
    "prompt_tuning": PromptTuningConfig,
    "p_tuning": lambda **more: PromptEncoderConfig(encoder_hidden_size=16, **more),
    "prefix_tuning": PrefixTuningConfig,
}
HEADS = [
    *(("llama", task) for task in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")),
    *(("gpt2", task) for task in ("CAUSAL_LM", "TOKEN_CLS")),
    *(("bloom", task) for task in ("CAUSAL_LM",)),
    *(("bert", task) for task in ("MASKED_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")),
    *(("bart", task) for task in ("SEQ_2_SEQ_LM", "SEQ_CLS")),
    ("t5", "SEQ_2_SEQ_LM"),
]


def made(family: str, task: str, method: str) -> Any:
    torch.manual_seed(0)
    told = None if task == "MASKED_LM" else task
    return get_peft_model(families.build(family, task), METHODS[method](task_type=told, num_virtual_tokens=P)).eval()


def target(family: str, task: str) -> dict[str, Tensor]:
    return {"labels": torch.arange(5, 11).view(2, 3)} if task == "SEQ_2_SEQ_LM" else {}


def wider(value: Tensor, filler: int = 1) -> Tensor:
    return pad(value, (P, 0), value=filler)


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), HEADS, ids=["-".join(each) for each in HEADS])
@torch.no_grad()
def test_inputs_with_columns_for_virtual_tokens_are_refused(family: str, task: str, method: str) -> None:
    model, batch, more = made(family, task, method), tiny.ragged((5, 9), "left"), target(family, task)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[:, -1] = tiny.EOS  # by which BART's classifier finds a row's end
    model(**batch, **more)
    per_token = {"attention_mask": wider(mask), "position_ids": torch.arange(P + 9)[None].expand(2, -1)}
    if family == "bert":
        per_token["token_type_ids"] = torch.zeros(2, P + 9, dtype=torch.long)
    if task in ("CAUSAL_LM", "MASKED_LM", "TOKEN_CLS"):
        per_token["labels"] = wider(ids % (tiny.LABELS if task == "TOKEN_CLS" else tiny.VOCAB), -100)
    for name, value in per_token.items():
        if name == "position_ids" and family in ("bart", "t5", "bloom"):  # which take none
            continue
        with pytest.raises(ConfigError, match=rf"^{name} has shape \(2, 13\), but the rows have 9 tokens; give one"):
            model(**{**batch, **more, name: value})


@torch.no_grad()
def test_inputs_of_real_tokens_stay_as_they_are() -> None:
    """Static caches, packed rows, targets of other lengths, and labels of a row, of every shape."""
    model, batch = made("llama", "CAUSAL_LM", "prompt_tuning"), tiny.ragged((5, 9), "left")
    again = model.generate(**batch, max_new_tokens=3, cache_implementation="static", do_sample=False)
    assert torch.equal(again, model.generate(**batch, max_new_tokens=3, do_sample=False))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    model(input_ids=torch.arange(3, 10)[None], position_ids=packed, labels=torch.arange(3, 10)[None])
    for length in (2, 9, 13):
        made("t5", "SEQ_2_SEQ_LM", "prefix_tuning")(**batch, labels=torch.arange(5, 5 + 2 * length).view(2, length))
    for family in ("llama", "bert"):
        classifier = made(family, "SEQ_CLS", "prompt_tuning")
        for labels in (torch.tensor([1, 2]), torch.tensor([[1], [2]]), torch.rand(2, tiny.LABELS)):
            classifier.get_base_model().config.problem_type = None
            classifier(**batch, labels=labels)


# ---- rows without a prompt -----------------------------------------------------------------------------------------


def of_row(base: Any, row: Tensor) -> tuple[Tensor, int]:
    """The sum of a row's losses by the model alone, its first token not counted, and how many there are."""
    logits = base(input_ids=row).logits[0, :-1]
    return cross_entropy(logits, row[0, 1:], reduction="sum"), row.shape[1] - 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mpt", "mamba"])
@torch.no_grad()
def test_rows_of_the_base_alone_predict_no_token_by_padding(family: str, method: str, side: str) -> None:
    if (family, method) == ("mamba", "prefix_tuning"):
        pytest.skip("mamba has no keys and values")
    model, batch = made(family, "CAUSAL_LM", method), tiny.ragged((5, 9), side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    rows = [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    alone = [of_row(model.get_base_model(), row) for row in rows]
    want = sum(total for total, _ in alone) / sum(count for _, count in alone)
    got = model(**batch, labels=labels, adapter_names=["__base__"] * 2)
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=1e-5)
    scores = model(**batch, labels=labels, adapter_names=["__base__"] * 2, per_token=True)
    torch.testing.assert_close(scores.loss, want, rtol=1e-5, atol=1e-5)
    mixed = model(**batch, labels=labels, adapter_names=["__base__", "default"]).loss
    prompted = model(input_ids=rows[1], labels=rows[1]).loss
    count = rows[1].shape[1] - (method == "prefix_tuning")
    want = (alone[0][0] + prompted * count) / (alone[0][1] + count)
    torch.testing.assert_close(mixed, want, rtol=1e-5, atol=1e-5)
