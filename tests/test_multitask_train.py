"""Training on several named tasks, all real, on a tiny model: teachers, sources, a target, and one task folded out."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import tiny
import torch
from cli_kit import Shell, write_rows
from safetensors.torch import load_file
from torch.nn.functional import log_softmax

from softprompt import SoftPromptModel, fold_task
from softprompt.data import collate
from softprompt.errors import ConfigError, RunInterrupted
from softprompt.methods import MultitaskPromptTuningConfig
from softprompt.recipe import Recipe
from softprompt.train import Trainer, train
from softprompt.train.build import prompt_config
from softprompt.train.run_folder import RunFolder, remove_run

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

NAMES = ("mat", "river", "dog")
ANSWERS = {"mat": "the mat {n}", "river": "{n} by the river", "dog": "a dog ran to the house"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk and three tasks with the same inputs and different answers; `dog` is smaller."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny.build("llama").save_pretrained(folder / "llama")
    tiny.tokenizer().save_pretrained(folder / "llama")
    for name, answer in ANSWERS.items():
        rows = [{"who": f"cat {n}", "said": answer.format(n=n)} for n in range(10 if name == "dog" else 30)]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def tasks(workplace: Path) -> dict[str, dict[str, str]]:
    files = {name: str(workplace / f"{name}.jsonl") for name in NAMES}
    return {name: {"train": file, "eval": file, "template": "{who} => {said}"} for name, file in files.items()}


def recipe(workplace: Path, out: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": str(workplace / "llama"), "tasks": tasks(workplace), "out": str(out), "samples": 3, "device": "cpu",
        "method": "multitask_prompt_tuning", "num_virtual_tokens": 4, "steps": 8, "batch_size": 8, "save_steps": 3,
        "max_new_tokens": 4, "teacher": {"steps": 4},
    }  # fmt: skip
    settings |= changes
    return Recipe(**{name: value for name, value in settings.items() if value is not None})


@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished source run; nobody changes it."""
    out = tmp_path_factory.mktemp("run") / "source"
    train(recipe(workplace, out, steps=12))
    return out


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items())


# ---- source training -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_source_run_lowers_every_tasks_loss_and_writes_its_folder(run: Path, workplace: Path) -> None:
    rows = rows_of(run)
    for name in NAMES:
        assert rows[-1][f"eval_loss_{name}"] < rows[0][f"eval_loss_{name}"] - 0.1
        assert (run / "teachers" / name / "summary.json").is_file()
    assert rows[-1]["eval_loss"] == pytest.approx(sum(rows[-1][f"eval_loss_{name}"] for name in NAMES) / 3)
    step = rows[1]
    assert step["loss"] == pytest.approx(step["task_loss"] + 0.9 * (step["teacher_kl"] + step["teacher_distance"]))
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["task_names"] == list(NAMES)
    assert config["num_tasks"] == 3
    summary = json.loads((run / "summary.json").read_text())
    assert "--task mat" in summary["command"]
    assert {sample["references"][0].split()[-1] for sample in json.loads((run / "samples.json").read_text())} >= {
        "river",
        "house",
    }
    assert tensors(run)["prefix_task_cols"].shape == (3, 4, 1)
    assert Recipe.from_yaml(run / "recipe.yaml").tasks == tasks(workplace)


class StopAfter:
    """Sends this process the signal that Ctrl-C sends, once, after a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(run: Path, workplace: Path, tmp_path: Path) -> None:
    settings = recipe(workplace, tmp_path / "run", steps=12)
    with pytest.raises(RunInterrupted, match="stopped at step 5 of 12"):
        train(settings, on_step=StopAfter(5))
    train(settings, resume=True)
    assert same(run, tmp_path / "run")
    assert rows_of(run) == rows_of(tmp_path / "run")


@pytest.mark.slow
def test_a_run_interrupted_among_its_teachers_goes_on(
    run: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, advance = recipe(workplace, tmp_path / "run", steps=12), Trainer._advance

    def stopping(trainer: Trainer) -> dict[str, Any]:
        row = advance(trainer)
        if trainer.folder.path.name == "river" and row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(Trainer, "_advance", stopping)
    with pytest.raises(RunInterrupted, match="stopped at step 2 of 4"):
        train(settings)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "teachers" / "dog").exists()
    train(settings, resume=True)
    assert same(run, tmp_path / "run")
    remove_run(tmp_path / "run")


@pytest.mark.slow
def test_teachers_may_be_there_already_or_not_be_wanted(run: Path, workplace: Path, tmp_path: Path) -> None:
    train(recipe(workplace, tmp_path / "same", steps=12, teachers=str(run / "teachers"), teacher=None))
    assert same(run, tmp_path / "same")
    assert not (tmp_path / "same" / "teachers").exists()
    train(recipe(workplace, tmp_path / "alone", distillation=0.0))
    assert not (tmp_path / "alone" / "teachers").exists()
    assert "teacher_kl" not in rows_of(tmp_path / "alone")[1]


def test_the_loss_is_the_tasks_own_and_the_teachers(run: Path, workplace: Path) -> None:
    """Against the teachers one by one, as they were saved, and the two formulas written out."""
    settings = recipe(workplace, run, teachers=str(run / "teachers"), teacher=None, base_dropout=False).resolved()
    trainer = Trainer.load(settings, RunFolder.reopen(run), None, _console())
    places = [0, 31, 2, 65]
    rows: Any = [trainer.data.train[n] for n in places]
    batch = collate(rows, tiny.PAD)
    assert batch["task_ids"].tolist() == [0, 1, 0, 2]
    model = trainer.model.eval()
    loss = trainer.objective.loss(model, rows)[0]
    said = model(**batch, output_hidden_states=True)
    kls, numerators, denominators = [], torch.zeros(2), torch.zeros(2)
    for row, task in enumerate(batch["task_ids"].tolist()):
        place = run / "teachers" / NAMES[task]
        teacher = SoftPromptModel.from_pretrained(tiny.build("llama"), place)
        length = int(batch["attention_mask"][row].sum())
        ids, answers = batch["input_ids"][row : row + 1, :length], batch["labels"][row, 1:length] != -100
        told = teacher(input_ids=ids, output_hidden_states=True)
        p = log_softmax(told.logits[0, :-1][answers] / 2, dim=-1)
        q = log_softmax(said.logits[row, : length - 1][answers] / 2, dim=-1)
        kls.append(4 * (p.exp() * (p - q)).sum(-1))
        for layer in (1, 2):
            own, theirs = said.hidden_states[layer][row, :length], told.hidden_states[layer][0]
            numerators[layer - 1] += (own - theirs).square().sum().detach()
            denominators[layer - 1] += theirs.square().sum().detach()
    expected = said.loss + 0.9 * (torch.cat(kls).mean() + (numerators / denominators).mean())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in model.get_base_model().parameters())


def _console() -> Any:
    from rich.console import Console

    return Console(quiet=True)


@pytest.mark.slow
def test_encoder_decoders_learn_several_tasks(workplace: Path, tmp_path: Path) -> None:
    families.build("t5", "SEQ_2_SEQ_LM").save_pretrained(tmp_path / "t5")
    tiny.tokenizer().save_pretrained(tmp_path / "t5")
    changes = {"model": str(tmp_path / "t5"), "task": "SEQ_2_SEQ_LM", "samples": 1}
    result = train(recipe(workplace, tmp_path / "run", **changes))
    assert result.best["loss"] < result.start["loss"] - 0.05
    assert rows_of(tmp_path / "run")[1]["teacher_kl"] > 0


# ---- targets ---------------------------------------------------------------------------------------------------------


def target(workplace: Path, out: Path, source: Path, **changes: Any) -> Recipe:
    file = str(workplace / "dog.jsonl")
    settings = {"tasks": None, "teacher": None, "train": file, "eval": file, "template": "{who} => {said}"}
    settings |= {"source": str(source), "num_virtual_tokens": None, "steps": 4, **changes}
    return recipe(workplace, out, **settings)


@pytest.mark.parametrize("source_task", [None, "river"])
def test_a_target_starts_from_the_source_and_needs_it_no_more(
    run: Path, workplace: Path, tmp_path: Path, source_task: str | None
) -> None:
    shutil.copytree(run, tmp_path / "source")
    result = train(target(workplace, tmp_path / "target", tmp_path / "source", source_task=source_task))
    shutil.rmtree(tmp_path / "source")
    assert result.best["loss"] < result.start["loss"] - 0.05
    found, source = tensors(tmp_path / "target"), tensors(run)
    assert found["prefix_task_rows"].shape == (1, 1, 32)
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "target")
    assert torch.equal(again.encoder().state_dict()["prefix_task_cols"], found["prefix_task_cols"])
    settings = target(workplace, tmp_path / "other", run, source_task=source_task, num_virtual_tokens=4).resolved()
    config = prompt_config(settings)
    assert isinstance(config, MultitaskPromptTuningConfig)
    from softprompt import get_peft_model

    start = get_peft_model(tiny.build("llama"), config).encoder().state_dict()
    cols = source["prefix_task_cols"]
    torch.testing.assert_close(start["prefix_task_cols"][0], cols[1] if source_task else cols.mean(0))
    torch.testing.assert_close(start["embedding.weight"], source["prompt_embeddings"])


def test_task_parameters_have_a_learning_rate_of_their_own(run: Path, workplace: Path, tmp_path: Path) -> None:
    settings = target(workplace, tmp_path / "t", run, learning_rate=0.25, task_learning_rate=0.125)
    train(settings)
    trainer = Trainer.load(settings.replace(num_virtual_tokens=4, out=str(tmp_path / "u")).resolved(),
                           RunFolder(tmp_path / "u"), None, _console())  # fmt: skip
    groups = {group["peak"]: [tuple(p.shape) for p in group["params"]] for group in trainer.optimizer.param_groups}
    assert groups == {0.25: [(4, 32)], 0.125: [(1, 4, 1), (1, 1, 32)]}


# ---- one task alone --------------------------------------------------------------------------------------------------


def test_a_folded_task_is_an_ordinary_prompt_here_and_in_peft(run: Path, tmp_path: Path) -> None:
    several = SoftPromptModel.from_pretrained(tiny.build("llama"), run)
    batch, expected = tiny.ragged(), torch.empty(0)
    for number, name in enumerate(NAMES):
        fold_task(run, tmp_path / name, name)
        assert tensors(tmp_path / name)["prompt_embeddings"].shape == (4, 32)
        alone = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / name)
        with torch.no_grad():
            expected = several(**batch, task_ids=torch.full((3,), number)).logits
            assert torch.equal(alone(**batch).logits, expected)
    theirs: Any = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "dog"))
    with torch.no_grad():
        got = theirs(**batch).logits[:, 4:][batch["attention_mask"].bool()]
    torch.testing.assert_close(got, expected[batch["attention_mask"].bool()], atol=2e-5, rtol=1e-4)


def test_folding_what_has_no_tasks(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 3 tasks; choose one of mat, river, dog"):
        fold_task(run, tmp_path / "a")
    with pytest.raises(ConfigError, match="there is no task 'cat'"):
        fold_task(run, tmp_path / "a", "cat")
    fold_task(run, tmp_path / "a", 2)
    with pytest.raises(ConfigError, match="PROMPT_TUNING prompt, which has no tasks"):
        fold_task(tmp_path / "a", tmp_path / "b")


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_on_one_task_of_several(
    run: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(capsys)
    file = workplace / "river.jsonl"
    measured = ("--eval", file, "--limit", 5, "--json", "--max-new-tokens", 4)
    scores = json.loads(shell.ok("eval", "--prompt", run, "--task", "river", *measured))
    assert json.loads(shell.ok("eval", "--prompt", run, "--task", 1, *measured)) == scores
    assert json.loads(shell.ok("eval", "--prompt", run, "--task", "mat", *measured)) != scores
    shell.ok("convert", run, "--to", "prompt_tuning", "--task", "river", "--out", tmp_path / "river")
    alone = ("--model", workplace / "llama", "--template", "{who} => {said}", *measured)
    assert json.loads(shell.ok("eval", "--prompt", tmp_path / "river", *alone)) == scores
    asked = ("--input", "cat 3", "--max-new-tokens", 6)
    answer = shell.ok("generate", "--prompt", run, "--task", "river", *asked)
    assert answer == shell.ok("generate", "--prompt", tmp_path / "river", *asked, "--model", workplace / "llama",
                              "--template", "{who} => {said}")  # fmt: skip
    shell.ok("convert", run, "--to", "kv", "--task", "river", "--out", tmp_path / "one.safetensors")
    shell.ok("convert", tmp_path / "river", "--to", "kv", "--out", tmp_path / "two.safetensors", "--model",
             workplace / "llama")  # fmt: skip
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert "mat, river, dog" in shell.ok("show", run, "--nearest", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--input", "x"), "has 3 tasks; choose one of mat, river, dog"),
        (("generate", "--input", "x", "--task", "mud"), "there is no task 'mud' in this prompt"),
        (("eval", "--eval", "{data}"), "has 3 tasks; choose one of mat, river, dog"),
    ],
)
def test_commands_without_a_task(
    run: Path, workplace: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    filled = [each.format(data=workplace / "mat.jsonl") for each in arguments]
    status, _, err = Shell(capsys).run(*filled, "--prompt", run)
    assert status == 2
    assert message in err


@pytest.mark.slow
def test_the_command_trains_from_a_recipe(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = recipe(workplace, tmp_path / "run", steps=2, teacher={"steps": 2}, samples=0)
    (tmp_path / "recipe.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    Shell(capsys).ok("train", tmp_path / "recipe.yaml", "--task-learning-rate", "0.01")
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml").task_learning_rate == 0.01
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / "summary.json").unlink()
    Shell(capsys).ok("train", "--out", tmp_path / "run", "--resume")


# ---- recipes that cannot mean anything -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"mat": {"train": "x"}}}, "tasks holds only mat"),
        ({"tasks": {"mat": "x.jsonl", "dog": {"train": "y"}}}, "it must be a mapping such as 'train: FILE'"),
        ({"tasks": {"mat": {"eval": "x"}, "dog": {"train": "y"}}}, "tasks: mat names no training data"),
        ({"tasks": {"mat": {"train": "x", "evl": "x"}, "dog": {"train": "y"}}}, "did you mean 'eval'"),
        ({"tasks": {"mat": {"train": "x", "train_limit": "a"}, "dog": {"train": "y"}}}, "must be a whole number"),
        ({"tasks": {"a/b": {"train": "x"}, "dog": {"train": "y"}}}, "the name 'a/b' cannot name a folder"),
        ({"train": "x"}, "both tasks and train are set"),
        ({"template": "{a} {b}"}, "both tasks and template are set"),
        ({"source": "x"}, "both tasks and source are set"),
        ({"task": "SEQ_CLS"}, "several tasks have no common classes"),
        (
            {"tasks": None, "teacher": None, "train": "x", "source": "y", "init": "examples"},
            "say where the prompt starts",
        ),
        ({"teachers": "x"}, "leave `teacher` out"),
        ({"tasks": None}, "teachers are for several tasks"),
        ({"tasks": None, "teacher": None, "source_task": "mat"}, "source is not set"),
        ({"distillation": -1.0}, "distillation is -1.0; it must be 0 or more"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
    ],
)
def test_wrong_recipes(workplace: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(workplace, tmp_path / "run", **changes)


def test_other_methods_and_teachers_that_do_not_fit(run: Path, workplace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt_tuning serves one task alone; .* method: multitask_prompt_tuning"):
        train(recipe(workplace, tmp_path / "run", method="prompt_tuning"))
    shutil.copytree(run / "teachers", tmp_path / "teachers")
    shutil.rmtree(tmp_path / "teachers" / "dog")
    shutil.copytree(run, tmp_path / "teachers" / "dog")
    with pytest.raises(ConfigError, match=r"the teacher in .*dog is multitask_prompt_tuning"):
        train(recipe(workplace, tmp_path / "run", teachers=str(tmp_path / "teachers"), teacher=None))
    with pytest.raises(ConfigError, match="is a PROMPT_TUNING prompt of one task"):
        train(target(workplace, tmp_path / "run", run / "teachers" / "mat"))
    assert not (tmp_path / "run").exists()
