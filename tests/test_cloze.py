"""Cloze tasks and templates with virtual tokens inside, through `softprompt train`, `eval` and `generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import Shell, write_rows
from cloze_kit import ROWS, TEMPLATE, VERBALIZER, base_folder, recipe, run
from rich.console import Console
from transformers import BertModel

from softprompt import SoftPromptModel
from softprompt.cli.prompted import open_prompted
from softprompt.cloze import Cloze
from softprompt.cloze.verbalizer import Verbalizer
from softprompt.data.cloze import load_cloze
from softprompt.errors import ConfigError, DataError, SoftPromptError, TrainingError
from softprompt.evaluate import evaluate_cloze
from softprompt.loading import load_base, load_tokenizer
from softprompt.recipe import Recipe
from softprompt.template import Answer, Template
from softprompt.train import train

FACTS = [
    {"sub": sub, "obj": obj, "relation": relation}
    for sub, obj, relation in [("cat", "house", "P1"), ("dog", "red mat", "P1"), ("mat", "home", "P2")]
]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("answer", Answer)
def test_train_eval_and_generate(answer: Answer, tmp_path: Path, data: Path, shell: Shell) -> None:
    result = run(recipe(tmp_path, data, answer, steps=30))
    assert result.best["loss"] < result.start["loss"]
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert (config["template"], config["placement"], config["num_virtual_tokens"]) == (TEMPLATE, "template", 3)
    scores = json.loads(shell.ok("eval", "--prompt", result.folder, "--eval", data, "--json", "--device", "cpu"))
    for name, expected in (("prompt", result.best), ("frozen", result.frozen)):
        assert scores[name] == {key: pytest.approx(value, abs=1e-5) for key, value in expected.items()}
    assert set(scores["prompt"]) == {"accuracy", "loss", "majority", "rows"}
    page = shell.ok("eval", "--prompt", result.folder, "--eval", data, "--device", "cpu")
    assert "accuracy" in page and "commonest answer" in page
    said = shell.ok("generate", "--prompt", result.folder, "--file", data, "--device", "cpu").split()
    right = sum(word == str(row["label"]).lower() for word, row in zip(said, ROWS, strict=True)) / len(ROWS)
    assert right == pytest.approx(result.best["accuracy"])
    shown = json.loads(shell.ok("show", result.folder, "--json"))
    assert shown["template"] == TEMPLATE and len(shown["nearest"]) == 3
    assert "[P1]" in shell.ok("show", result.folder)
    one = shell.ok("generate", "--prompt", result.folder, "--input", ROWS[0]["text"], "--device", "cpu")
    assert one.strip() == said[0]
    metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["eval_accuracy"] <= result.best["accuracy"] and "frozen_accuracy" in metrics[0]
    assert "held-out accuracy" in (result.folder / "report.html").read_text()


def test_the_adapter_and_its_words_are_enough(tmp_path: Path, data: Path, shell: Shell) -> None:
    settings = recipe(tmp_path, data)
    result = run(settings)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "verbalizer.json"):
        shutil.copy(result.folder / name, bare)
    found = json.loads(shell.ok("eval", "--prompt", bare, "--model", settings.model, "--eval", data, "--json"))
    assert found["prompt"]["loss"] == pytest.approx(result.best["loss"], abs=1e-5)
    (bare / "verbalizer.json").write_text('{"closed": true}')
    status, _, error = shell.run("eval", "--prompt", bare, "--model", settings.model, "--eval", data)
    assert status == 2 and "verbalizer.json cannot be read" in error


def test_the_frozen_model_is_measured_without_the_virtual_tokens(tmp_path: Path, data: Path) -> None:
    settings = recipe(tmp_path, data, steps=1)
    result = run(settings)
    tokenizer = load_tokenizer(settings.model)
    base = load_base(settings.model, tokenizer, device="cpu", cloze=True)
    template = Template(TEMPLATE.replace("[P1] ", "").replace("[P*2] ", ""))
    cloze = Cloze(base, tokenizer, template, Verbalizer.parse(VERBALIZER))
    expected = evaluate_cloze(base, cloze, cloze.encode(load_cloze(data, template)))
    assert result.frozen == {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}
    samples = json.loads((result.folder / "samples.json").read_text())
    assert {sample["before"] for sample in samples} <= {"true", "false"}
    assert samples[0]["input"] == "the cat sat it was : [MASK] ." and samples[0]["references"] == ["true"]


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_a_prompt_in_front_of_a_cloze_template(method: str, tmp_path: Path, data: Path, shell: Shell) -> None:
    plain = "{text} it was : [MASK]"
    result = run(recipe(tmp_path, data, method=method, template=plain, num_virtual_tokens=4))
    found = json.loads(shell.ok("eval", "--prompt", result.folder, "--eval", data, "--json"))
    assert found["prompt"]["loss"] == pytest.approx(result.best["loss"], abs=1e-5)
    other = shell.ok("eval", "--prompt", result.folder, "--eval", data, "--json", "--template", "{text} : [MASK]")
    assert json.loads(other)["prompt"]["loss"] != pytest.approx(result.best["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("answer", [Answer.NEXT, Answer.MASK])
def test_lama_style_prediction(answer: Answer, tmp_path: Path, shell: Shell) -> None:
    facts = write_rows(tmp_path / "facts.jsonl", FACTS * 2)
    test = write_rows(tmp_path / "test.jsonl", [*FACTS, {"sub": "house", "obj": "bad", "relation": "P1"}])
    result = run(recipe(
        tmp_path, facts, answer, template="[P*2] {sub} [P*2] [MASK]", verbalizer=None, candidates="train", steps=40,
        target_column="obj", only="relation=P1", learning_rate=0.05,
    ))  # fmt: skip
    assert result.recipe.answer_loss == "vocabulary"
    assert result.best["loss"] < result.start["loss"]
    share = result.best["p_at_1"]
    assert share == 1.0 or answer is Answer.MASK
    saved = json.loads((result.folder / "verbalizer.json").read_text())
    assert saved["words"] == {"house": ["house"], "red mat": ["red mat"]}
    found = json.loads(shell.ok("eval", "--prompt", result.folder, "--eval", test, "--json"))["prompt"]
    assert found["p_at_1"] == pytest.approx(share * 2 / 3) and (found["outside"], found["rows"]) == (1, 3)
    page = shell.ok("eval", "--prompt", result.folder, "--eval", test)
    assert "P@1" in page and "no candidate" in page
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("eval_p_at_1", 0) for row in rows) == share
    assert "P@1" in (result.folder / "report.html").read_text()


def test_candidates_of_all_data_and_of_a_file(tmp_path: Path) -> None:
    train_file = write_rows(tmp_path / "train.jsonl", FACTS[:2])
    held_out = write_rows(tmp_path / "held.jsonl", FACTS[2:])
    words = tmp_path / "words.txt"
    words.write_text("house\nred mat\nhome\nbad\n")
    common = {"template": "{sub} [P] [MASK]", "verbalizer": None, "target_column": "obj", "eval": str(held_out)}
    for candidates, count in (("data", 3), (str(words), 4)):
        out = str(tmp_path / f"run{count}")
        result = run(recipe(tmp_path, train_file, candidates=candidates, out=out, steps=1, **common))
        assert len(json.loads((result.folder / "verbalizer.json").read_text())["words"]) == count


# ---- virtual tokens inside a template for generation -------------------------------------------------------------

GENERATION = "[P1] {text} [P*2] : {answer}"
PAIRS = [{"text": row["text"], "answer": "red house" if row["label"] else "on the mat"} for row in ROWS]


def by_hand(model: SoftPromptModel, tokenizer: Any, text: str, steps: int, penalty: float) -> str:
    """Greedy decoding of one row embedded column by column; the penalty sees real ids only."""
    start = [*tokenizer(text)["input_ids"], *tokenizer(" :")["input_ids"]]
    cut = len(tokenizer(text)["input_ids"])
    table, vectors = model.get_base_model().get_input_embeddings(), model.prompt_vectors()
    assert vectors is not None
    embedded = torch.cat([vectors[:1], table(torch.tensor(start[:cut])), vectors[1:], table(torch.tensor(start[cut:]))])
    written: list[int] = []
    for _ in range(steps):
        more = table(torch.tensor(written, dtype=torch.long))
        logits = model.get_base_model()(inputs_embeds=torch.cat([embedded, more])[None]).logits[0, -1]
        for seen in {*start, *written}:
            logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
        written.append(int(logits.argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.slow
def test_a_generation_template_with_slots(tmp_path: Path, shell: Shell) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    result = run(recipe(tmp_path, pairs, task="CAUSAL_LM", template=GENERATION, verbalizer=None, steps=20))
    assert result.best["loss"] < result.start["loss"]
    found = json.loads(shell.ok("eval", "--prompt", result.folder, "--eval", pairs, "--json", "--max-new-tokens", 8))
    assert found["prompt"]["loss"] == pytest.approx(result.best["loss"], abs=1e-5)
    assert found["frozen"]["loss"] == pytest.approx(result.frozen["loss"], abs=1e-5)
    opened = open_prompted(result.folder, None, device="cpu")
    for penalty in (1.0, 1.8):
        options = ("--max-new-tokens", 6, "--repetition-penalty", penalty, "--batch-size", 4)
        said = shell.ok("generate", "--prompt", result.folder, "--file", pairs, *options).splitlines()
        with torch.no_grad():
            expected = [by_hand(opened.model, opened.tokenizer, row["text"], 6, penalty) for row in PAIRS]
        assert said == [" ".join(text.split()) for text in expected]
    one = shell.ok("generate", "--prompt", result.folder, "--input", PAIRS[1]["text"], *options)
    assert " ".join(one.split()) == said[1]
    frozen = shell.ok("generate", "--prompt", result.folder, "--input", PAIRS[1]["text"], "--frozen")
    plain = shell.ok("generate", "--prompt", result.folder, "--input", f"{PAIRS[1]['text']} :", "--frozen")
    status, _, error = shell.run("generate", "--prompt", result.folder, "--input", "the cat", "--raw")
    assert status == 2 and "needs slots" in error
    assert frozen != plain  # the text is the field, and the template stands around it


# ---- what is wrong is named ---------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[SoftPromptError], str]] = [
    ({"verbalizer": None}, ConfigError, "neither is set"),
    ({"candidates": "train"}, ConfigError, "both are set"),
    ({"template": None}, ConfigError, "needs a template"),
    ({"task": "CAUSAL_LM"}, ConfigError, "verbalizer is set but task is 'CAUSAL_LM'"),
    ({"task": "SEQ_CLS", "verbalizer": None}, ConfigError, "takes no template"),
    ({"task": "CAUSAL_LM", "verbalizer": None}, ConfigError, r"has \[MASK\], but a target is generated"),
    ({"task": "CAUSAL_LM", "verbalizer": None, "template": "{text} => {label} [P]"}, ConfigError, "put them before it"),
    ({"verbalizer": {"true": True, "false": False}}, ConfigError, "in quotes"),
    ({"verbalizer": {"true": "great", "no": "bad"}}, DataError, "label 'false' is not in the verbalizer"),
    ({"verbalizer": {"true": "great", "false": "great"}}, ConfigError, "cannot tell"),
    ({"template": "{text} [P*0] [MASK]"}, ConfigError, "at least one"),
    ({"template": "{words} [P] [MASK]"}, DataError, 'no column "words"'),
    ({"template": "{text} {label} [P] [MASK]"}, ConfigError, 'shows the column "label"'),
    ({"template": "{text} [MASK] [P]"}, ConfigError, r"behind \[MASK\]"),
    ({"target_column": "nothing"}, DataError, 'no column "nothing"'),
    ({"num_virtual_tokens": 5}, ConfigError, "num_virtual_tokens is 5, but the template"),
    ({"method": "prefix_tuning"}, ConfigError, "use method: .*p_tuning"),
    ({"candidates": "words", "verbalizer": None}, ConfigError, "must be train, data, or a .txt file"),
    ({"only": "kind"}, ConfigError, "COLUMN=VALUE"),
    ({"only": "kind=z"}, DataError, "no row with kind=z"),
    ({"only": "sort=z"}, DataError, 'no column "sort"'),
    ({"max_length": 6}, DataError, "does not fit"),
    ({"word_score": "max"}, ConfigError, "word_score is 'max'"),
    ({"answer_loss": "hinge"}, ConfigError, "answer_loss is 'hinge'"),
    ({"base_learning_rate": 0.1, "optimizer": "muon"}, ConfigError, "use adamw"),
    ({"base_learning_rate": 0}, ConfigError, "greater than 0"),
    ({"base_learning_rate": 0.1, "dtype": "bfloat16"}, ConfigError, "steps are lost in it; use dtype: float32"),
    ({"input_column": "text"}, ConfigError, "give one of the two"),
]


@pytest.mark.parametrize(("changes", "kind", "fragment"), WRONG, ids=[fragment for _, _, fragment in WRONG])
def test_wrong_settings(
    changes: dict[str, Any], kind: type[SoftPromptError], fragment: str, tmp_path: Path, data: Path
) -> None:
    with pytest.raises(kind, match=fragment):
        run(recipe(tmp_path, data, **changes))
    assert not (tmp_path / "run").exists()


def test_a_label_that_is_missing_or_blank(tmp_path: Path) -> None:
    for rows, fragment in (
        ([{"text": "a", "label": " "}], "is blank"),
        ([{"text": "a", "label": None}], "must be text"),
    ):
        data = write_rows(tmp_path / "rows.jsonl", [*ROWS[:2], *rows])
        with pytest.raises(DataError, match=fragment):
            run(recipe(tmp_path, data))


def test_a_model_without_a_head_for_words_is_refused(tmp_path: Path, data: Path) -> None:
    folder = base_folder(tmp_path / "bare", Answer.MASK)
    BertModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ConfigError, match="has no weights for predicting words"):
        run(recipe(tmp_path, data, model=str(folder)))


def test_another_template_must_have_the_same_virtual_tokens(tmp_path: Path, data: Path) -> None:
    result = run(recipe(tmp_path, data, steps=1))
    with pytest.raises(ConfigError, match=r"has 0 virtual tokens, but this prompt has 3 virtual tokens inside"):
        open_prompted(result.folder, None, template="{text} [MASK]")
    opened = open_prompted(result.folder, None, template="{text} [P*3] [MASK]")
    assert opened.cloze is not None and opened.cloze.template.text == "{text} [P*3] [MASK]"


def test_the_verbalizer_on_the_command_line(tmp_path: Path, data: Path, shell: Shell) -> None:
    settings = recipe(tmp_path, data)
    shell.ok(
        "train", "--model", settings.model, "--train", data, "--out", tmp_path / "run", "--task", "CLOZE",
        "--template", TEMPLATE, "--verbalizer", "true=great|yes yes,false=bad", "--steps", 1, "--method", "p_tuning",
    )  # fmt: skip
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml").verbalizer == VERBALIZER


def test_rows_that_were_cut_are_counted(tmp_path: Path, shell: Shell) -> None:
    rows = [*ROWS, {"text": "the cat sat " * 60, "label": True}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = recipe(tmp_path, data, max_length=60)
    with (tmp_path / "log").open("w") as log:
        result = train(settings, console=Console(file=log))
    assert "1 of 7 training rows were cut to fit" in (tmp_path / "log").read_text()
    assert result.best["cut"] == 1
    assert "rows that were cut to fit" in shell.ok("eval", "--prompt", result.folder, "--eval", data)
    found = json.loads(shell.ok("eval", "--prompt", result.folder, "--eval", data, "--json"))["prompt"]
    assert found == {name: pytest.approx(value, abs=1e-5) for name, value in result.best.items()}


def test_labels_in_yaml_may_be_truth_values(tmp_path: Path) -> None:
    place = tmp_path / "recipe.yaml"
    place.write_text('task: CLOZE\ntemplate: "{a} [MASK]"\nverbalizer: {true: "Yes", false: "No"}\n')
    settings = Recipe.from_yaml(place)
    assert settings.verbalizer == {"true": "Yes", "false": "No"}
    place.write_text(settings.to_yaml())
    assert Recipe.from_yaml(place) == settings


def test_a_loss_that_is_no_number_is_named(tmp_path: Path, data: Path) -> None:
    with pytest.raises(TrainingError, match=r"lower learning_rate|before training"):
        run(recipe(tmp_path, data, learning_rate=1e30, clip=0.0))
