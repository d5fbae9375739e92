"""Training runs, all real, on tiny models: what they write, that they resume to the same bits, and how they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from softprompt.errors import CheckpointError, ConfigError, DataError, RunInterrupted, TrainingError
from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe
from softprompt.train import RunResult, train
from softprompt.train.batches import BatchOrder, epoch_batches, rate_factor, spread
from softprompt.train.run_folder import RunFolder, remove_run
from softprompt.train.state_file import write_state

METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models on disk (a decoder, an encoder) and two small sets of data."""
    folder = tmp_path_factory.mktemp("workplace")
    for family in ("llama", "bert"):
        tiny.build(family).save_pretrained(folder / family)
        tiny.tokenizer().save_pretrained(folder / family)
    places = ["the mat", "the red house", "the river"]
    rows = [{"who": f"cat {n}", "said": f"cat {n} sat on {places[n % 3]}"} for n in range(44)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "heldout.jsonl", rows[::5])
    labelled = [{"text": "the cat sat " * (1 + n % 3) if n % 2 else "a dog ran", "label": n % 2} for n in range(40)]
    write_rows(folder / "labelled.jsonl", labelled)
    return folder


def recipe(workplace: Path, out: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": str(workplace / "llama"),
        "train": str(workplace / "train.jsonl"),
        "eval": str(workplace / "heldout.jsonl"),
        "template": "{who} => {said}",
        "out": str(out),
        "num_virtual_tokens": 4,
        "steps": 8,
        "batch_size": 8,
        "samples": 2,
        "max_new_tokens": 4,
        "device": "cpu",
    }
    if changes.get("task") == "SEQ_CLS":
        settings |= {"model": str(workplace / "bert"), "template": None}
        settings |= dict.fromkeys(("train", "eval"), str(workplace / "labelled.jsonl"))
    return Recipe(**{**settings, **changes})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


class StopAfter:
    """Sends this process the signal that Ctrl-C sends, once, after a given step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def __call__(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_lowers_the_held_out_loss_and_writes_its_folder(workplace: Path, tmp_path: Path, method: str) -> None:
    result = train(recipe(workplace, tmp_path / "run", method=method, steps=12))
    assert result.best["loss"] < result.start["loss"] - 0.1
    assert result.best["loss"] < result.frozen["loss"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "metrics.jsonl", "samples.json",
        "summary.json", "report.html", "checkpoint",
    }  # fmt: skip
    rows = rows_of(result.folder)
    assert [row["step"] for row in rows] == list(range(13))
    assert all({"loss", "lr", "grad_norm", "epoch"} <= row.keys() for row in rows[1:])
    assert rows[-1]["eval_loss"] == pytest.approx(result.best["loss"])
    assert Recipe.from_yaml(result.folder / "recipe.yaml") == result.recipe


def test_what_is_saved_is_what_was_measured(workplace: Path, tmp_path: Path) -> None:
    from softprompt.evaluate import evaluate_loss
    from softprompt.loading import load_base, load_tokenizer
    from softprompt.train.run_data import read_source

    result = train(recipe(workplace, tmp_path / "run"))
    tokenizer = load_tokenizer(result.recipe.model)
    base = load_base(result.recipe.model, tokenizer, device="cpu")
    data = read_source(result.recipe).encode(result.recipe, tokenizer, tiny.CONTEXT, base)
    loaded = SoftPromptModel.from_pretrained(base, result.folder)
    assert evaluate_loss(loaded, data.held_out)["loss"] == pytest.approx(result.best["loss"], abs=1e-6)  # type: ignore[arg-type]


@pytest.mark.pairwise
@pytest.mark.parametrize("init", ["random", "vocab", "text", "examples"])
@pytest.mark.parametrize("method", METHODS)
def test_every_start_works_with_every_method(workplace: Path, tmp_path: Path, method: str, init: str) -> None:
    text = "the cat sat on the mat and the dog ran to the river" if init == "text" else None
    result = train(recipe(workplace, tmp_path / "run", method=method, init=init, init_text=text, steps=1, samples=0))
    assert result.steps == 1


def test_a_run_is_determined_by_its_recipe(workplace: Path, tmp_path: Path) -> None:
    options = {"method_options": {"prefix_dropout": 0.2}, "steps": 6}
    first = train(recipe(workplace, tmp_path / "one", **options))
    torch.rand(17)  # whatever random numbers were drawn before a run
    second = train(recipe(workplace, tmp_path / "two", **options))
    other = train(recipe(workplace, tmp_path / "three", seed=1, **options))
    assert rows_of(first.folder) == rows_of(second.folder)
    assert rows_of(first.folder) != rows_of(other.folder)
    weights = [load_file(r.folder / "adapter_model.safetensors")["prompt_embeddings"] for r in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def _final_state(result: RunResult) -> dict[str, Any]:
    state = RunFolder(result.folder).load_state()
    assert state is not None
    return state


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_resumed_equals_uninterrupted_bit_for_bit(workplace: Path, tmp_path: Path, task: str, number: int) -> None:
    options = {"task": task, "steps": 14, "method_options": {"prefix_dropout": 0.1}, "eval_steps": 3}
    straight = train(recipe(workplace, tmp_path / "straight", **options))
    stopped = recipe(workplace, tmp_path / "stopped", **options)
    with pytest.raises(RunInterrupted, match=r"stopped at step 7 of 14.*--resume"):
        train(stopped, on_step=StopAfter(7, number))
    assert not (tmp_path / "stopped" / "report.html").exists()
    torch.rand(5)
    resumed = train(stopped, resume=True)
    ours, theirs = _final_state(resumed), _final_state(straight)
    assert all(torch.equal(value, theirs["trainable"][name]) for name, value in ours["trainable"].items())
    saved = [load_file(r.folder / "adapter_model.safetensors") for r in (resumed, straight)]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    assert rows_of(resumed.folder) == rows_of(straight.folder)
    assert (resumed.best, resumed.best_step) == (straight.best, straight.best_step)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cartridge", "cpt"])
def test_what_a_method_does_not_train_is_there_again(workplace: Path, tmp_path: Path, method: str) -> None:
    text = "the cat sat on the mat and the dog ran to the red house by the river while it rained all night long"
    options = {
        "method": method,
        "init": "text",
        "init_text": text,
        "num_virtual_tokens": 5,
        "steps": 6,
        "save_steps": 2,
    }
    straight = train(recipe(workplace, tmp_path / "straight", **options))
    stopped = recipe(workplace, tmp_path / "stopped", **options)
    with pytest.raises(RunInterrupted):
        train(stopped, on_step=StopAfter(3, signal.SIGINT))
    resumed = train(stopped, resume=True)
    assert rows_of(resumed.folder) == rows_of(straight.folder)
    ours, theirs = (load_file(each.folder / "adapter_model.safetensors") for each in (resumed, straight))
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])


def test_resume_after_a_crash_goes_back_to_the_last_saved_state(workplace: Path, tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def crash(row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise Crash

    straight = train(recipe(workplace, tmp_path / "straight", steps=10))
    settings = recipe(workplace, tmp_path / "crashed", steps=10, save_steps=3)
    with pytest.raises(Crash):
        train(settings, on_step=crash)
    with open(tmp_path / "crashed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line that the crash cut short
    resumed = train(settings, resume=True)
    assert rows_of(resumed.folder) == rows_of(straight.folder)
    assert all(
        torch.equal(value, _final_state(straight)["trainable"][name])
        for name, value in _final_state(resumed)["trainable"].items()
    )


def test_resume_before_any_state_starts_again(workplace: Path, tmp_path: Path) -> None:
    settings = recipe(workplace, tmp_path / "run", steps=4)
    straight = train(recipe(workplace, tmp_path / "straight", steps=4))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(settings.to_yaml())
    assert rows_of(train(settings, resume=True).folder) == rows_of(straight.folder)


def test_a_run_stopped_before_its_first_step_resumes(workplace: Path, tmp_path: Path) -> None:
    straight = train(recipe(workplace, tmp_path / "straight", steps=3))
    settings = recipe(workplace, tmp_path / "run", steps=3)
    with pytest.raises(RunInterrupted, match="stopped at step 0 of 3"):
        train(settings, on_step=StopAfter(0))
    assert rows_of(train(settings, resume=True).folder) == rows_of(straight.folder)


def test_resuming_a_finished_run_only_writes_its_report_again(workplace: Path, tmp_path: Path) -> None:
    first = train(recipe(workplace, tmp_path / "run", steps=3))
    (first.folder / "report.html").unlink()
    again = train(recipe(workplace, tmp_path / "run", steps=3), resume=True)
    assert (again.folder / "report.html").exists()
    assert again.steps == 3


def test_resume_refuses_another_recipe_or_other_data(workplace: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes((workplace / "train.jsonl").read_bytes())
    settings = recipe(workplace, tmp_path / "run", train=str(data))
    with pytest.raises(RunInterrupted):
        train(settings, on_step=StopAfter(2))
    with pytest.raises(ConfigError, match="was started with learning_rate="):
        train(settings.replace(learning_rate=0.5), resume=True)
    with pytest.raises(ConfigError, match="was started with eval="):
        train(settings.replace(eval=None), resume=True)
    data.write_text(data.read_text().replace("mat", "hat"))
    with pytest.raises(ConfigError, match=r"data of the run .* has changed"):
        train(settings, resume=True)


def test_resume_never_unpickles_and_refuses_a_damaged_state(workplace: Path, tmp_path: Path) -> None:
    settings = recipe(workplace, tmp_path / "run")
    with pytest.raises(RunInterrupted):
        train(settings, on_step=StopAfter(2))
    state = RunFolder(tmp_path / "run").state_path(2)
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"no state in .*checkpoint is whole"):
        train(settings, resume=True)
    overwrite(state, {"trap": Trap(tmp_path / "sprung")})
    with pytest.raises(CheckpointError, match=r"step-00000002.pt is damaged"):
        train(settings, resume=True)
    assert not (tmp_path / "sprung").exists()
    for part in ("trainable", "optimizer", "processes", "progress", "data"):
        state.write_bytes(whole)
        saved = torch.load(state, weights_only=True)
        overwrite(state, {**saved, part: 7})
        with pytest.raises((CheckpointError, ConfigError), match=r"is damaged|has changed"):
            train(settings, resume=True)
    overwrite(state, {"version": 99})
    with pytest.raises(CheckpointError, match="not written by this version"):
        train(settings, resume=True)


def overwrite(path: Path, state: dict[str, Any]) -> None:
    """A whole file, whatever it holds."""
    with open(path, "wb") as file:
        write_state(file, state)


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_the_best_prompt_is_kept_not_the_last(workplace: Path, tmp_path: Path) -> None:
    """Held-out data unlike the training data: its loss falls while the prompt learns words, then rises again."""
    unlike = write_rows(tmp_path / "unlike.jsonl", [{"who": "cat 3", "said": "the dog ran by the house all night"}])
    settings = recipe(workplace, tmp_path / "run", eval=unlike, steps=60, eval_steps=2, learning_rate=0.5)
    result = train(settings)
    scores = {row["step"]: row["eval_loss"] for row in rows_of(result.folder) if "eval_loss" in row}
    assert len(scores) == 31
    assert result.best["loss"] == min(scores.values()) < scores[60]
    assert scores[result.best_step] == result.best["loss"] < scores[0]


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_best(workplace: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    model = tiny.build("llama")
    settings = recipe(workplace, tmp_path / "run", learning_rate=1e38, clip=0, eval_steps=1)
    with pytest.raises(
        TrainingError, match=r"the (held-out loss|gradient) is (nan|inf) at step \d+; lower learning_rate"
    ):
        train(settings)
    kept = load_file(tmp_path / "run" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.isfinite(kept).all()
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    tiny.tokenizer().save_pretrained(broken)
    with pytest.raises(TrainingError, match="the held-out loss is nan before training"):
        train(recipe(workplace, tmp_path / "other", model=str(broken), init="random"))


def test_classification_trains_prompt_and_head(workplace: Path, tmp_path: Path) -> None:
    result = train(recipe(workplace, tmp_path / "run", task="SEQ_CLS", steps=30, head_learning_rate=0.01))
    assert result.best["accuracy"] > 0.9
    assert result.frozen == {}
    assert {"eval_accuracy", "eval_loss"} <= rows_of(result.folder)[-1].keys()
    samples = json.loads((result.folder / "samples.json").read_text())
    assert [sample["after"] for sample in samples] == [sample["references"][0] for sample in samples]
    tensors = load_file(result.folder / "adapter_model.safetensors")
    assert any("classifier" in name for name in tensors)
    assert "<h3>frozen model</h3>" not in (result.folder / "report.html").read_text()


def test_without_held_out_data_the_last_prompt_is_kept(workplace: Path, tmp_path: Path) -> None:
    result = train(recipe(workplace, tmp_path / "run", eval=None))
    assert result.best == result.start == result.frozen == {}
    assert result.best_step == result.steps == 8
    assert "Training examples" in (result.folder / "report.html").read_text()


def test_chats_are_trained_on_through_the_chat_template(workplace: Path, tmp_path: Path) -> None:
    turns = [("user", "where is the cat"), ("assistant", "on the mat")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data = write_rows(tmp_path / "chat.jsonl", [chat] * 12)
    result = train(recipe(workplace, tmp_path / "run", train=data, eval=data, template=None, steps=12))
    assert result.best["loss"] < result.start["loss"]
    samples = json.loads((result.folder / "samples.json").read_text())
    assert samples[0]["input"] == "user: where is the cat"
    assert samples[0]["references"] == ["on the mat"]


def test_the_encoder_is_dropped_unless_asked_for(workplace: Path, tmp_path: Path) -> None:
    train(recipe(workplace, tmp_path / "run", steps=1, keep_encoder=True, method_options={"prefix_projection": True}))
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_the_base_model_is_not_touched(workplace: Path, tmp_path: Path) -> None:
    before = load_file(workplace / "llama" / "model.safetensors")
    trained: list[RunResult] = [train(recipe(workplace, tmp_path / "run", base_dropout=False, group_by_length=False))]
    after = load_file(workplace / "llama" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert trained[0].trainable_parameters + trained[0].base_parameters > trained[0].base_parameters


def test_a_folder_with_anything_in_it_is_refused(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="notes is not empty; choose another `out`"):
        train(recipe(workplace, tmp_path / "notes"))
    (tmp_path / "notes" / "recipe.yaml").write_text("train: x")
    with pytest.raises(ConfigError, match="go on with the run in it by --resume"):
        train(recipe(workplace, tmp_path / "notes"))
    with pytest.raises(ConfigError, match="is a file"):
        train(recipe(workplace, tmp_path / "notes" / "thesis.txt"))
    with pytest.raises(ConfigError, match="is not writable"):
        train(recipe(workplace, tmp_path / "notes" / "thesis.txt" / "below"))
    with pytest.raises(TrainingError, match=r"holds what no run wrote \(thesis.txt\)"):
        remove_run(tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


def test_nothing_is_written_when_the_start_fails(workplace: Path, tmp_path: Path) -> None:
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, r"no method 'prefix_tunin'; did you mean 'prefix_tuning'\?", {"method": "prefix_tunin"}),
        (ConfigError, r"unknown field 'encoder_hidden'; did you mean", {"method_options": {"encoder_hidden": 1}}),
        (ConfigError, "there is no model folder /nonexistent/model", {"model": "/nonexistent/model"}),
        (DataError, "none.jsonl", {"train": str(tmp_path / "none.jsonl")}),
        (DataError, "does not fit", {"max_length": 2}),
        (ConfigError, "device 'cuda:99' cannot be used", {"device": "cuda:99"}),
    ]
    for kind, message, changes in wrong:
        with pytest.raises(kind, match=message) as caught:
            train(recipe(workplace, tmp_path / "run", **changes))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    """A limit on the size of files, which the system reports the way it reports a full disk."""
    resource = pytest.importorskip("resource")
    run = RunFolder(tmp_path)
    run.save_state({"progress": {"step": 1}, "numbers": torch.zeros(3)})
    run.write_text("samples.json", "[]")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"progress": {"step": 2}, "numbers": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"step-00000002.pt cannot be written: File too large; free some space"
        ):
            run.save_state(big)
        with pytest.raises(CheckpointError, match=r"samples.json cannot be written"):
            run.write_text("samples.json", "x" * 100_000)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be written"):
            run.log({"step": 1, "words": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state = run.load_state()
    assert state is not None
    assert torch.equal(state["numbers"], torch.zeros(3))
    assert run.read_json("samples.json") == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_remove_run_takes_a_run_and_nothing_else(workplace: Path, tmp_path: Path) -> None:
    train(recipe(workplace, tmp_path / "run", steps=1))
    remove_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    remove_run(tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(workplace: Path, tmp_path: Path) -> None:
    """A real process, a real signal, at whatever moment it arrives."""
    settings = recipe(workplace, tmp_path / "run", steps=4000, eval_steps=4000, save_steps=0)
    (tmp_path / "recipe.yaml").write_text(settings.to_yaml())
    code = (
        "import sys\nfrom softprompt.recipe import Recipe\nfrom softprompt.train import train\n"
        "from softprompt.errors import RunInterrupted\n"
        "try:\n    train(Recipe.from_yaml(sys.argv[1]))\nexcept RunInterrupted as stop:\n    sys.exit(str(stop))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "the state is saved in" in errors
    state = RunFolder(tmp_path / "run").load_state()
    assert state is not None
    assert 5 <= state["progress"]["step"] < 4000


def test_batches_hold_every_example_once_per_epoch() -> None:
    lengths = [(7 * n) % 23 + 1 for n in range(101)]
    for by_length in (True, False):
        first = epoch_batches(lengths, 8, seed=3, epoch=0, by_length=by_length)
        assert sorted(n for batch in first for n in batch) == list(range(101))
        assert first == epoch_batches(lengths, 8, seed=3, epoch=0, by_length=by_length)
        assert first != epoch_batches(lengths, 8, seed=3, epoch=1, by_length=by_length)
        assert first != epoch_batches(lengths, 8, seed=4, epoch=0, by_length=by_length)


def test_grouping_by_length_saves_padding() -> None:
    lengths = [(7 * n) % 23 + 1 for n in range(400)]

    def padded(by_length: bool) -> int:
        batches = epoch_batches(lengths, 8, seed=0, epoch=0, by_length=by_length)
        return sum(len(batch) * max(lengths[n] for n in batch) for batch in batches)

    assert padded(True) < 1.1 * sum(lengths) < padded(False)


def test_order_by_step_is_the_epochs_one_after_another() -> None:
    order = BatchOrder([5] * 10, 4, seed=0)
    epochs = [epoch_batches([5] * 10, 4, 0, epoch) for epoch in range(3)]
    assert [order[step] for step in range(9)] == [batch for epoch in epochs for batch in epoch]
    assert order[1] == epochs[0][1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_then_falls(schedule: str) -> None:
    rates = [rate_factor(step, 100, 0.1, schedule) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates) > 0
    assert rates[-1] == 1.0 if schedule == "constant" else rates[-1] < 0.02


def test_spread_takes_numbers_from_the_whole_range() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(0, 4) == []
