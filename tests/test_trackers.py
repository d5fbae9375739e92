"""Trackers are told what metrics.jsonl says: TensorBoard's events read back, the others where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from cli_kit import Shell
from rich.console import Console
from sweep_kit import make_workplace, values

from softprompt.errors import ConfigError, TrainingError
from softprompt.recipe import Recipe
from softprompt.train import train
from softprompt.train.trackers import Trackers, check_trackers

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


def recipe(workplace: Path, out: Path, *trackers: str, **changes: Any) -> Recipe:
    settings = {"steps": 4, "eval_steps": 2, "report_to": list(trackers), **changes}
    return Recipe.from_dict(values(workplace, out, sweep=None, **settings))


def told(run: Path) -> dict[str, dict[int, float]]:
    """What metrics.jsonl says, by the names that transformers' callbacks use."""
    found: dict[str, dict[int, float]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            name = {"lr": "learning_rate"}.get(name, name)
            shown = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            if name != "step":
                found.setdefault(shown, {})[row["step"]] = value
    return found


def events(run: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars, read by its own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    found = {}
    for name in reader.Tags()["scalars"]:
        steps = [event.step for event in reader.Scalars(name)]
        assert len(steps) == len(set(steps)), f"{name} was told a step twice"
        found[name] = {event.step: event.value for event in reader.Scalars(name)}
    return found


def same(one: dict[str, dict[int, float]], other: dict[str, dict[int, float]]) -> bool:
    return one.keys() == other.keys() and all(
        {step: pytest.approx(value, rel=1e-6) for step, value in one[name].items()} == other[name] for name in one
    )


def test_tensorboard_has_every_row(workplace: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out, seen = tmp_path / "run", []
    train(recipe(workplace, out, "tensorboard"), console=QUIET, on_step=lambda row: seen.append(row["step"]))
    found = events(out)
    assert same(told(out), found)
    assert sorted(found["train/loss"]) == [1, 2, 3, 4] and sorted(found["eval/loss"]) == [0, 2, 4]
    assert seen == [0, 1, 2, 3, 4]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    shown = reader.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(shown)["num_virtual_tokens"] == 3  # our recipe, not a Trainer's defaults


def test_a_run_is_the_same_with_and_without(workplace: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    losses = []
    for name, trackers in (("with", ("tensorboard",)), ("without", ())):
        train(recipe(workplace, tmp_path / name, *trackers), console=QUIET)
        losses.append(told(tmp_path / name)["train/loss"])
    assert losses[0] == losses[1]
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_a_resumed_run_goes_on_in_the_same_events(workplace: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"

    def crash(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(recipe(workplace, out, "tensorboard", save_steps=2), console=QUIET, on_step=crash)
    assert sorted(events(out)["train/loss"]) == [1, 2, 3]
    train(recipe(workplace, out, "tensorboard", save_steps=2), resume=True, console=QUIET)
    assert same(told(out), events(out))


def test_the_events_are_closed_when_a_run_fails(workplace: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(TrainingError):
        train(recipe(workplace, tmp_path / "run", "tensorboard", learning_rate=1e38), console=QUIET)
    assert 1 in events(tmp_path / "run")["train/loss"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["tensorbord"], "report_to names 'tensorbord'; it must be one of tensorboard, wandb, mlflow"),
        ([1], "report_to is [1]; it must be a list of names"),
        ({"tensorboard": True}, "it must be a list of names"),
    ],
)
def test_other_names_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict({"report_to": given})
    assert words in str(caught.value)


def test_one_name_is_a_list_of_one() -> None:
    made = Recipe.from_dict({"report_to": "wandb"})
    assert made.report_to == ["wandb"] and Recipe.from_dict(yaml.safe_load(made.to_yaml())) == made


def test_a_missing_package_is_one_sentence(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import softprompt.train.trackers as trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(workplace, tmp_path / "run", sweep=None)), encoding="utf-8")
    status, _, error = Shell(capsys).run("train", path, "--report-to", "mlflow")
    assert (status, error) == (2, "error: report_to names mlflow, which is not installed; run: pip install mlflow\n")
    assert not (tmp_path / "run").exists()


def test_uploads_by_wandb_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import softprompt.train.trackers as trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    with pytest.raises(ConfigError, match="WANDB_LOG_MODEL is 'end'"):
        check_trackers(Recipe(report_to=["wandb"]))


class Broken:
    """A tracker whose server goes away at the second row."""

    def __init__(self) -> None:
        self.rows = 0

    def on_log(self, *arguments: Any, **more: Any) -> None:
        self.rows += 1
        if self.rows == 2:
            raise ConnectionError("gone")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken()
    console = Console(width=80)
    trackers = Trackers({"mlflow": broken}, Recipe(out=str(tmp_path)), tiny.build("llama"), 3, console)
    for step in range(1, 4):
        trackers.log({"step": step, "loss": 1.0})
    trackers.end()
    assert broken.rows == 2
    assert capsys.readouterr().out == "mlflow is told no more: gone\n"


@pytest.mark.filterwarnings("ignore")  # of MLflow's own database
def test_mlflow_has_every_row(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("one", "two"):  # two runs of one process are two runs there
        train(recipe(workplace, tmp_path / name, "mlflow"), console=QUIET)
    client = mlflow.tracking.MlflowClient()
    found = {run.info.run_name: run for run in client.search_runs(["0"])}
    assert found.keys() == {"one", "two"} and {run.info.status for run in found.values()} == {"FINISHED"}
    history = {each.step: each.value for each in client.get_metric_history(found["two"].info.run_id, "loss")}
    assert history == {s: pytest.approx(v) for s, v in told(tmp_path / "two")["train/loss"].items()}
    assert found["one"].data.params["num_virtual_tokens"] == "3"


def test_wandb_offline_has_every_row(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        train(recipe(workplace, tmp_path / name, "wandb"), console=QUIET)
        assert wandb.run is None
    files = [path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(files) == 2
    for written in files:  # in their own format, in which names are plain text
        assert written.count(b"train/learning_rate") >= 4 and written.count(b"eval/loss") >= 3
        assert b"num_virtual_tokens" in written
