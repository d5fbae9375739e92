"""Runs that choose their start, that choose their method, and that train on a bfloat16 base."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli_kit import Shell
from rich.console import Console
from safetensors.torch import load_file

from softprompt import CPTConfig
from softprompt.data import collate
from softprompt.errors import ConfigError, RunInterrupted
from softprompt.loading import load_base, load_tokenizer
from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe
from softprompt.recipe.auto import method_of
from softprompt.recipe.defaults import BEST
from softprompt.train import RunResult, train
from softprompt.train.build import with_source
from softprompt.train.run_data import read_source
from softprompt.train.run_folder import RunFolder
from softprompt.train.start import START, example_order, scored_examples


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    for family in ("llama", "bert"):
        tiny.build(family).save_pretrained(folder / family)
        tiny.tokenizer().save_pretrained(folder / family)
    places = ["the mat", "the red house", "the river"]
    rows = [{"who": f"cat {n}", "said": f"cat {n} sat on {places[n % 3]}"} for n in range(44)]
    write_rows(folder / "train.jsonl", rows)
    labelled = [{"text": "the cat sat " * (1 + n % 3) if n % 2 else "a dog ran", "label": n % 2} for n in range(40)]
    write_rows(folder / "labelled.jsonl", labelled)
    return folder


def recipe(workplace: Path, out: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": str(workplace / "llama"), "train": str(workplace / "train.jsonl"), "template": "{who} => {said}",
        "out": str(out), "num_virtual_tokens": 12, "steps": 4, "batch_size": 4, "samples": 0, "device": "cpu",
    }  # fmt: skip
    if changes.get("task") == "SEQ_CLS":
        settings |= {"model": str(workplace / "bert"), "template": None, "train": str(workplace / "labelled.jsonl")}
    return Recipe(**{**settings, **changes})


def run(settings: Recipe, **options: Any) -> RunResult:
    return train(settings, console=Console(quiet=True), **options)


def prompt_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def stop_at(step: int) -> Any:
    def stop(row: dict[str, Any]) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


# ---- the best of several starts ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning", "cpt"])
def test_a_run_starts_from_its_best_candidate(workplace: Path, tmp_path: Path, method: str) -> None:
    """The losses are those of the rows scored one by one; what is kept is the least; nothing of it is done again."""
    options = {"method": method, "init_candidates": 3, "init_text": "who :", "init": "examples", "eval_steps": 4}
    settings = recipe(workplace, tmp_path / "run", num_virtual_tokens=24, steps=2, **options)
    with pytest.raises(RunInterrupted):
        run(settings, on_step=stop_at(0))
    chosen = json.loads((tmp_path / "run" / START).read_text())
    assert chosen["losses"][chosen["start"]] == min(chosen["losses"].values())
    assert chosen["start"] == f"examples, draw {chosen['draw']}" or chosen["start"] in ("vocabulary", "random")
    assert len(set(chosen["losses"].values())) == len(chosen["losses"]) == (3 if method == "cpt" else 5)
    assert _loss_by_rows(settings, tmp_path / "run") == pytest.approx(min(chosen["losses"].values()), abs=1e-5)
    whole = run(settings.replace(out=str(tmp_path / "whole")))
    resumed = run(settings, resume=True)
    assert torch.equal(prompt_of(resumed.folder), prompt_of(whole.folder))
    assert json.loads((whole.folder / START).read_text()) == chosen


def _loss_by_rows(settings: Recipe, folder: Path) -> float:
    """The loss of the saved, untrained prompt on the rows that candidates are compared on, each row by itself."""
    resolved = settings.resolved()
    tokenizer = load_tokenizer(resolved.model)
    base = load_base(resolved.model, tokenizer, device="cpu")
    data = read_source(resolved).encode(resolved, tokenizer, tiny.CONTEXT, base)
    model = SoftPromptModel.from_pretrained(base, folder)
    total, count = 0.0, 0
    for number in scored_examples(resolved, len(data.train)):
        batch = collate([data.train[number]], 0)  # type: ignore[list-item]
        tokens = int((batch["labels"] != -100).sum())
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        total, count = total + float(loss), count + tokens
    return total / count


def test_resuming_compares_nothing_again(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(workplace, tmp_path / "run", method="cpt", init_candidates=3, num_virtual_tokens=40)
    with pytest.raises(RunInterrupted):
        run(settings, on_step=stop_at(2))
    before = CPTConfig.from_pretrained(tmp_path / "run")

    def never(*arguments: Any) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr("softprompt.train.start.best_of", never)
    monkeypatch.setattr("softprompt.train.start._best_context", never)
    result = run(settings, resume=True)
    assert CPTConfig.from_pretrained(result.folder) == before
    monkeypatch.undo()
    whole = run(settings.replace(out=str(tmp_path / "whole")))
    assert torch.equal(prompt_of(result.folder), prompt_of(whole.folder))


def test_no_candidate_holds_a_row_that_it_is_compared_on(workplace: Path, tmp_path: Path) -> None:
    settings = recipe(workplace, tmp_path, init_candidates=4).resolved()
    aside = scored_examples(settings, 44)
    assert len(aside) == 16
    for draw in range(4):
        order = example_order(settings, 44, draw)
        assert sorted([*order, *aside]) == list(range(44))
    assert scored_examples(settings, 3) != [] and len(example_order(settings, 3)) == 2
    assert example_order(settings, 1) == [0]
    alone = settings.replace(init_candidates=None)
    assert scored_examples(alone, 44) == [] and len(example_order(alone, 44)) == 44


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_candidates": 0}, "init_candidates is 0; it must be at least 1"),
        ({"init_candidates": 2, "init": "vocab"}, "draws of training examples, but init: vocab is set"),
        ({"init_candidates": 2, "init_from": "folder"}, "draws of training examples, but init: prompt is set"),
        ({"init_candidates": 2, "task": "SEQ_CLS"}, "before training its loss says nothing"),
        ({"init": "vocab", "init_text": "words"}, "init_text is set but init is 'vocab'"),
    ],
)
def test_settings_of_a_start_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**changes)


def test_a_context_of_the_users_own_is_not_replaced(workplace: Path, tmp_path: Path) -> None:
    options = {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]}
    settings = recipe(workplace, tmp_path / "run", method="cpt", method_options=options, steps=1, learning_rate=1e-9)
    words = tiny.build("llama").get_input_embeddings()(torch.tensor([5, 6, 7, 8]))
    torch.testing.assert_close(prompt_of(run(settings).folder), words, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="method_options give the prompt its context"):
        run(settings.replace(init_candidates=2, out=str(tmp_path / "other")))


# ---- method: auto ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", BEST)
def test_a_recipe_without_a_method_says_which_it_takes(task: str) -> None:
    more: dict[str, Any] = {"template": "{a} [MASK]", "verbalizer": {"x": "a", "y": "b"}} if task == "CLOZE" else {}
    recipe = Recipe(train="a", out="b", task=task, **more)
    for given in (recipe, recipe.replace(method="auto")):
        resolved = given.resolved()
        assert resolved.method == BEST[task][0]
        assert resolved == resolved.resolved()
        assert f"method: {BEST[task][0]}\n" in resolved.to_yaml()


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"method": "cartridge"}, "cartridge"),
        ({"template": "{a} [P*3] {b}"}, "p_tuning"),
        ({"method_options": {"prefix_projection": True}}, "prefix_tuning"),
        ({"method_options": {"encoder_reparameterization_type": "LSTM"}}, "p_tuning"),
        ({"method_options": {"num_frozen_tokens": 2}}, "cartridge"),
        ({"method_options": {"opt_loss_decay_factor": 0.5}}, "cpt"),
        ({"source": "folder"}, "multitask_prompt_tuning"),
        ({"tasks": {"one": {"train": "x"}, "two": {"train": "y"}}}, "multitask_prompt_tuning"),
    ],
)
def test_the_method_is_one_that_can_do_what_is_asked(settings: dict[str, Any], method: str) -> None:
    assert method_of(Recipe(**settings)) == method


def test_no_method_can_do_it() -> None:
    with pytest.raises(ConfigError, match="no method with prefix_projection can do what this recipe asks"):
        Recipe(template="{a} [P*3] {b}", method_options={"prefix_projection": True}).resolved()


def test_the_method_of_the_prompt_to_start_from(workplace: Path, tmp_path: Path) -> None:
    first = run(recipe(workplace, tmp_path / "one", method="prompt_tuning", steps=1))
    again = with_source(Recipe(init_from=str(first.folder)))
    assert (again.method, again.num_virtual_tokens) == ("prompt_tuning", 12)


def test_the_command_takes_no_method(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("train", "--model", workplace / "llama", "--train", workplace / "train.jsonl", "--template",
             "{who} => {said}", "--steps", 1, "--num-virtual-tokens", 4, "--samples", 0)  # fmt: skip
    shell = Shell(capsys)
    shell.ok(*flags, "--out", tmp_path / "one")
    assert Recipe.from_yaml(tmp_path / "one" / "recipe.yaml").method == BEST["CAUSAL_LM"][0]
    status, _, err = shell.run(*flags, "--method", "auto", "--prefix-projection", "--placement", "front", "--out", "x")
    assert status == 2 and "no method with" in err


# ---- a float32 prompt before a bfloat16 base ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("prefix_tuning", "CAUSAL_LM"),
        ("prompt_tuning", "CAUSAL_LM"),
        ("cpt", "CAUSAL_LM"),
        ("prefix_tuning", "SEQ_CLS"),
    ],
)
def test_what_is_trained_is_float32_whatever_the_base(workplace: Path, tmp_path: Path, method: str, task: str) -> None:
    """Steps far below bfloat16's resolution add up, in the prompt and in a classifier's head."""
    more = {"learning_rate": 1e-5, "head_learning_rate": 1e-5, "optimizer": "adamw", "clip": 0, "warmup": 0}
    if method == "cpt":
        more["num_virtual_tokens"] = 40
    settings = recipe(workplace, tmp_path / "run", method=method, task=task, dtype="bfloat16", steps=3, **more)
    result = run(settings)
    state = RunFolder(result.folder).load_state()
    assert state is not None
    assert {value.dtype for value in state["trainable"].values()} == {torch.float32}
    moments = [each for values in state["optimizer"]["state"].values() for each in values.values()]
    assert {each.dtype for each in moments if isinstance(each, torch.Tensor)} == {torch.float32}
    start = run(settings.replace(out=str(tmp_path / "start"), steps=1, learning_rate=1e-8, head_learning_rate=1e-8))
    tensors, before = (load_file(each.folder / "adapter_model.safetensors") for each in (result, start))
    for name, tensor in tensors.items():
        assert tensor.dtype is torch.float32
        moved = (tensor - before[name]).abs().max()
        assert 0 < float(moved) < 1e-4, name
    names = ["0", "1"] if task == "SEQ_CLS" else None
    base = load_base(settings.model, load_tokenizer(settings.model), names, "bfloat16", "cpu")
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    model = SoftPromptModel.from_pretrained(base, result.folder)
    assert bool(torch.isfinite(model(**tiny.ragged()).logits).all())
