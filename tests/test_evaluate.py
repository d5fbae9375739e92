"""Scores mean what they say: every target token counts once, batching changes nothing, all references count."""

import math
from typing import Any

import pytest
import tiny
import torch

from softprompt import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.data import EncodedLabel, Example, encode_all, input_ids
from softprompt.errors import DataError
from softprompt.evaluate import evaluate_accuracy, evaluate_loss, generate_texts, predict_labels, score_texts

TEXTS = ["the cat", "the dog ran to the red house by the river", "it rained", "name[The Mill], food[French] =>"]


def examples() -> list[Example]:
    return [Example(text, (f"{text} and the mat" * (n + 1),), border=" ") for n, text in enumerate(TEXTS)]


def prompted(family: str = "llama") -> Any:
    return get_peft_model(tiny.build(family), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_loss_counts_every_target_token_once() -> None:
    model, encoded = tiny.build("llama"), encode_all(examples(), tiny.tokenizer(), tiny.CONTEXT)
    total, tokens = 0.0, 0
    for row in encoded:
        logits = model(torch.tensor([row.input_ids])).logits[0].detach().log_softmax(-1)
        for place, label in enumerate(row.labels):
            if label >= 0:
                total, tokens = total - float(logits[place - 1, label]), tokens + 1
    scores = evaluate_loss(model, encoded, batch_size=3)
    assert scores["tokens"] == tokens
    assert scores["loss"] == pytest.approx(total / tokens, abs=1e-4)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_batching_changes_no_score(config: Any) -> None:
    model = get_peft_model(tiny.build("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    encoded = encode_all(examples(), tiny.tokenizer(), tiny.CONTEXT)
    single, together = evaluate_loss(model, encoded, batch_size=1), evaluate_loss(model, encoded, batch_size=4)
    assert single["loss"] == pytest.approx(together["loss"], abs=1e-5)


def test_the_frozen_model_is_measured_without_the_prompt() -> None:
    model, encoded = prompted(), encode_all(examples(), tiny.tokenizer(), tiny.CONTEXT)
    with model.disable_adapter():
        frozen = evaluate_loss(model, encoded)
    assert frozen == evaluate_loss(tiny.build("llama"), encoded)
    assert frozen["loss"] != pytest.approx(evaluate_loss(model, encoded)["loss"], abs=1e-4)


def test_every_module_gets_its_own_mode_back() -> None:
    model = prompted()
    model.train()
    model.get_base_model().eval()
    before = [module.training for module in model.modules()]
    loss = evaluate_loss(model, encode_all(examples(), tiny.tokenizer(), tiny.CONTEXT))
    assert [module.training for module in model.modules()] == before
    assert set(before) == {True, False}
    assert isinstance(loss["loss"], float)


def test_generation_in_batches_is_generation_of_single_rows_in_order() -> None:
    tokenizer, model = tiny.tokenizer(), prompted()
    together = generate_texts(model, tokenizer, TEXTS, max_new_tokens=6, batch_size=4)
    alone = [generate_texts(model, tokenizer, [text], max_new_tokens=6)[0] for text in TEXTS]
    assert together == alone
    assert len(set(together)) > 1
    start = torch.tensor(input_ids([Example(TEXTS[1], ("",))], tokenizer))
    output = model.generate(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=6, do_sample=False)
    assert together[1] == tokenizer.decode(output[0, start.shape[1] :], skip_special_tokens=True).strip()


def test_all_references_count() -> None:
    answers = ["the cat sat on the mat today", "a dog ran to the red house"]
    perfect = score_texts(answers, [["something else entirely", answers[0]], [answers[1]]])
    assert perfect == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    worse = score_texts(answers, [["something else entirely"], [answers[1]]])
    assert worse["bleu"] < 60


def test_scores_need_one_set_of_references_per_text() -> None:
    with pytest.raises(DataError, match="2 texts cannot be scored against 1"):
        score_texts(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="no examples"):
        evaluate_loss(tiny.build("llama"), [])


def test_accuracy_and_classes() -> None:
    model = tiny.build("bert")
    rows = [EncodedLabel([5 + n, 6, 7 + n, 9][: 2 + n % 3], 0) for n in range(7)]
    classes = [int(model(torch.tensor([row.input_ids])).logits.argmax()) for row in rows]
    assert predict_labels(model, rows, batch_size=3) == classes
    labelled = [EncodedLabel(row.input_ids, place if n else (place + 1) % 3) for n, (row, place) in
                enumerate(zip(rows, classes, strict=True))]  # fmt: skip
    scores = evaluate_accuracy(model, labelled, batch_size=4)
    assert scores["accuracy"] == pytest.approx(6 / 7)
    single = sum(evaluate_accuracy(model, [row])["loss"] for row in labelled) / len(labelled)
    assert scores["loss"] == pytest.approx(single, abs=1e-5)
