"""Verbalizers and the scores of labels on every kind of model, against the plain formulation: word by word."""

from __future__ import annotations

import math
from typing import Any

import cloze_kit
import naive
import pytest
import tiny
import torch
from torch import Tensor

from softprompt import (
    PrefixTuningConfig,
    PromptConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)
from softprompt.cloze import Cloze, EncodedCloze, answer_of
from softprompt.cloze.verbalizer import Verbalizer
from softprompt.data.cloze import ClozeExample
from softprompt.errors import ConfigError, DataError, UnsupportedError
from softprompt.evaluate import evaluate_cloze, predict_cloze
from softprompt.template import Answer, Template

TEMPLATE = "{a} [P1] question : {b} ? [P*2] answer [P1] : [MASK] ."
WORDS = {"pos": ["yes", "yes home"], "neg": ["no", "bad"], "so": ["maybe the red house"]}  # of one and several tokens
EXAMPLES = [
    ClozeExample({"a": "the cat sat", "b": "a dog ran home"}, "pos"),
    ClozeExample({"a": "the cat sat on the mat", "b": "it"}, "so"),
    ClozeExample({"a": "a", "b": "red house"}, "neg"),
]


def task(answer: Answer, template: str = TEMPLATE, words: Any = None, **options: Any) -> tuple[SoftPromptModel, Cloze]:
    """A model with a prompt at the template's slots, and the task."""
    base, parsed = cloze_kit.base(answer), Template(template)
    config = PromptEncoderConfig(num_virtual_tokens=parsed.num_virtual_tokens, template=template)
    model = get_peft_model(base, config)
    return model, Cloze(base, cloze_kit.tokenizer(answer), parsed, Verbalizer.parse(words or WORDS), **options)


def word_score(model: SoftPromptModel, cloze: Cloze, row: EncodedCloze, word: tuple[int, ...]) -> Tensor:
    """Log-probability of a word, by hand: a forward pass of its own, without padding."""
    base: Any = model.get_base_model()
    embedded = cloze_kit.embedded(model, row.row)
    if cloze.answer is Answer.MASK:
        logits, first = base(inputs_embeds=embedded).logits[0], row.row.answer_position
    elif cloze.answer is Answer.NEXT:
        text = base.get_input_embeddings()(torch.tensor([word]))
        logits, first = base(inputs_embeds=torch.cat([embedded, text], 1)).logits[0], embedded.shape[1] - 1
    else:
        sentinel = cloze.tokenizer.convert_tokens_to_ids("<extra_id_0>")
        written = torch.tensor([[base.config.decoder_start_token_id, sentinel, *word]])
        logits, first = base(inputs_embeds=embedded, decoder_input_ids=written).logits[0], 1
    logs = logits.log_softmax(-1)
    return torch.stack([logs[first + place, token] for place, token in enumerate(word)]).sum()


def label_scores(model: SoftPromptModel, cloze: Cloze, row: EncodedCloze) -> Tensor:
    """Log of the mean probability of each label's words."""
    found = []
    for label in range(len(cloze.verbalizer.words)):
        scores = []
        for number in cloze.words.of_label(label):
            word = cloze.words.ids[number]
            scores.append(word_score(model, cloze, row, word) / (len(word) if cloze.mean else 1))
        found.append(torch.stack(scores).exp().mean().log())
    return torch.stack(found)


def test_forms_of_a_verbalizer() -> None:
    expected = {"entailment": ("yes",), "not_entailment": ("no", "never mind")}
    assert Verbalizer.parse({"entailment": "yes", "not_entailment": ["no", "never mind"]}).words == expected
    assert Verbalizer.parse("entailment=yes, not_entailment=no|never mind").words == expected
    assert Verbalizer.parse({True: "yes", False: "no", 2: 1}).labels == ["true", "false", "2"]
    assert Verbalizer.candidates(["b", "a", "b"]).words == {"b": ("b",), "a": ("a",)}
    for verbalizer in (Verbalizer.parse(expected), Verbalizer.candidates("abc")):
        assert Verbalizer.from_dict(verbalizer.to_dict()) == verbalizer


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        ({}, "at least two labels"),
        ({"only": "one"}, "at least two labels.*only"),
        ({"a": "x", "b": ""}, "no word for the label 'b'"),
        ({"a": "x", "b": []}, "no word for the label 'b'"),
        ({"a": "x", "b": None}, "must be text"),
        ({"a": ["x", "x"], "b": "y"}, "twice"),
        ({"a": True, "b": False}, "in quotes"),
        ("a", "label=word"),
        ("a=x,=y", "label=word"),
        ("a=x,a=y", "twice"),
        ("a=x,b=", "no word for the label 'b'"),
    ],
)
def test_a_verbalizer_that_means_nothing_is_refused(value: Any, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        Verbalizer.parse(value)


def test_words_that_the_tokenizer_cannot_tell_apart_or_does_not_know() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.MASK)
    with pytest.raises(ConfigError, match="cannot tell 'NO' of 'b' from 'no' of 'a'"):
        Verbalizer.parse({"a": "no", "b": "NO"}).table(tokenizer)
    with pytest.raises(ConfigError, match="does not know the word 'ß' of the label 'b'"):
        Verbalizer.parse({"a": "no", "b": "ß"}).table(tokenizer)


def test_a_word_is_written_after_a_blank_where_the_template_has_one() -> None:
    tokenizer, words = tiny.tokenizer(), Verbalizer.parse({"a": "the", "b": "red"})
    for template, text in (("{x} [MASK]", " the"), ("{x} [P] [MASK]", " the"), ("{x}=[MASK]", "the"), ("{x}", " the"),
                           ("{x}\n", "the"), ("[MASK] {x}", "the")):  # fmt: skip
        table = words.table(tokenizer, Template(template).answer_after_blank)
        assert list(table.ids[0]) == tokenizer(text, add_special_tokens=False)["input_ids"], template


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("answer", Answer)
def test_scores_are_those_of_the_plain_formulation(answer: Answer, score: str) -> None:
    model, cloze = task(answer, word_score=score)
    assert cloze.words.longest > 2
    rows = cloze.encode(EXAMPLES, tiny.CONTEXT)
    with torch.no_grad():
        found = cloze.scores(model, rows)
        for row, scores in zip(rows, found, strict=True):
            torch.testing.assert_close(scores, label_scores(model, cloze, row), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(cloze.scores(model, [row])[0], scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["labels", "vocabulary"])
@pytest.mark.parametrize("answer", Answer)
def test_losses_and_their_gradients(answer: Answer, loss: str) -> None:
    model, cloze = task(answer, loss=loss)
    rows = cloze.encode(EXAMPLES, tiny.CONTEXT)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = cloze.loss(model, rows)
    gradients = torch.autograd.grad(found, parameters)
    scores = torch.stack([label_scores(model, cloze, row) for row in rows])
    logs = scores.log_softmax(-1) if loss == "labels" else scores
    plain = -torch.stack([log[row.label] for log, row in zip(logs, rows, strict=True)]).mean()
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    for own, expected in zip(gradients, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-3)
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_a_prompt_in_front_scores_words_too(config: type[PromptConfig]) -> None:
    base, template = cloze_kit.base(Answer.NEXT), Template("{a} question : {b} ? answer :")
    model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    cloze = Cloze(base, tiny.tokenizer(), template, Verbalizer.parse({"a": "the", "b": "cat"}))
    assert cloze.words.longest == 1
    rows = cloze.encode([ClozeExample({"a": "the cat", "b": "x"}, "a")])
    with torch.no_grad():
        logits, _ = naive.logits(model, torch.tensor([rows[0].input_ids]))
        expected = logits[0, -1].log_softmax(-1)[[word[0] for word in cloze.words.ids]]
        torch.testing.assert_close(cloze.scores(model, rows)[0], expected, atol=1e-4, rtol=1e-4)


def test_only_the_continuations_that_are_needed_are_run() -> None:
    _, cloze = task(Answer.NEXT, words={"a": "the", "b": "the cat", "c": "the cat sat", "d": "a dog"})
    found, host = cloze._continuations(range(4))
    ids = cloze.words.ids
    assert sorted(found) == sorted([ids[2][:-1], ids[3][:-1]])
    for word, place in zip(ids, host, strict=True):
        assert found[place][: len(word) - 1] == word[:-1]


def test_more_sequences_than_one_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cloze = task(Answer.NEXT)
    rows = cloze.encode(EXAMPLES)
    with torch.no_grad():
        whole = cloze.scores(model, rows)
        monkeypatch.setattr("softprompt.cloze.CHUNK", 2)
        torch.testing.assert_close(cloze.scores(model, rows), whole, atol=1e-5, rtol=1e-5)


def test_room_is_kept_for_the_longest_word() -> None:
    model, cloze = task(Answer.NEXT)
    long = ClozeExample({"a": "the cat " * 200, "b": "it"}, "pos")
    (row,) = cloze.encode([long], tiny.CONTEXT)
    assert len(row.input_ids) + cloze.words.longest - 1 <= tiny.CONTEXT
    assert torch.isfinite(cloze.scores(model, [row])).all()


def test_accuracy_and_the_share_of_the_commonest_label() -> None:
    model, cloze = task(Answer.NEXT)
    rows = cloze.encode([*EXAMPLES, EXAMPLES[0]])
    with torch.no_grad():
        scores = cloze.scores(model, rows)
    right = sum(int(s.argmax()) == row.label for s, row in zip(scores, rows, strict=True)) / 4
    found = evaluate_cloze(model, cloze, rows, batch_size=3)
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor([row.label for row in rows]))
    assert found == {"accuracy": right, "loss": pytest.approx(float(loss), abs=1e-5), "majority": 0.5, "rows": 4}
    assert predict_cloze(model, cloze, rows, 2) == [cloze.verbalizer.labels[int(s.argmax())] for s in scores]
    assert model.training


def test_an_answer_that_is_no_candidate_counts_as_wrong() -> None:
    base = cloze_kit.base(Answer.NEXT)
    words = Verbalizer.candidates(["yes", "no", "bad"])
    cloze = Cloze(base, tiny.tokenizer(), Template("{a} : [MASK]"), words, loss="vocabulary")
    answers = ["yes", "no", "else", "no"]
    rows = cloze.encode([ClozeExample({"a": "cat"}, label) for label in answers])
    found = evaluate_cloze(base, cloze, rows)
    chosen = predict_cloze(base, cloze, rows)[0]
    assert found["p_at_1"] == answers.count(chosen) / 4
    assert (found["outside"], found["majority"], found["rows"]) == (1, 0.5, 4)
    scores = cloze.scores(base, rows[:1])[0].detach()
    assert found["loss"] == pytest.approx(float(-(scores[0] + 2 * scores[1]) / 3), abs=1e-5)
    with pytest.raises(DataError, match="nothing to learn"):
        cloze.loss(base, rows)
    with pytest.raises(DataError, match="no answer in the data is one of the candidates"):
        evaluate_cloze(base, cloze, rows[2:3])
    with pytest.raises(DataError, match="no examples"):
        evaluate_cloze(base, cloze, [])


def test_a_label_outside_the_verbalizer_names_the_row() -> None:
    _, cloze = task(Answer.NEXT)
    with pytest.raises(
        DataError, match=r"data line 3: the label 'other' is not in the verbalizer, which has pos, neg, so"
    ):
        cloze.encode([ClozeExample({"a": "x", "b": "y"}, "other", "data line 3")])


def test_models_that_predict_no_words_and_settings_that_are_not_known() -> None:
    with pytest.raises(UnsupportedError, match="BertForSequenceClassification predicts no words"):
        answer_of(tiny.build("bert"))
    for option in ({"word_score": "max"}, {"loss": "hinge"}):
        with pytest.raises(ConfigError, match="must be one of"):
            task(Answer.NEXT, **option)


def test_no_class_is_imported_to_know_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has hundreds of them; importing all takes many seconds of a short run."""

    def all_classes(_: Any) -> list[type]:
        raise AssertionError("all classes were asked for")

    monkeypatch.setattr("transformers.models.auto.auto_factory._LazyAutoMapping.values", all_classes)
    assert answer_of(tiny.build("llama")) is Answer.NEXT


def test_a_label_of_many_words_has_no_advantage() -> None:
    table = Verbalizer.parse({"a": ["x", "y", "z"], "b": "w"}).table(tiny.tokenizer())
    scores = table.label_scores(torch.full((2, 4), math.log(0.1)))
    torch.testing.assert_close(scores, torch.full((2, 2), math.log(0.1)))
