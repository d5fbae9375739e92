"""Sweeps that really run: several processes on one folder, kills, failures, and tables equal to the runs' own files."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_kit import Shell
from rich.console import Console
from sweep_kit import make_workplace, plan, results, take_all, values, work_quietly

from softprompt.errors import ConfigError, RunInterrupted, TrainingError
from softprompt.sweep import SweepOptions
from softprompt.sweep.plan import Plan
from softprompt.sweep.run import PRELOAD, run_sweep
from softprompt.sweep.study import open_study

pytest.importorskip("optuna")

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def rows_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def scores(out: Path) -> dict[str, float]:
    """Scores by what was varied."""
    return {json.dumps(row["values"], sort_keys=True): row["mean"] for row in results(out)["settings"]}


@pytest.mark.slow
def test_two_processes_share_one_sweep_and_the_table_is_that_of_the_runs(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    found = run_sweep(plan(workplace, out), jobs=2, console=QUIET)
    assert found == results(out)
    assert [row["state"] for row in found["settings"]] == ["finished"] * 4
    assert len(scores(out)) == 4
    assert len(list((out / "runs").iterdir())) == 8  # every setting with every seed, none twice
    for row in found["settings"]:
        runs = [summary(out / run["folder"]) for run in row["runs"]]
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        losses = [run["best"]["loss"] for run in runs]
        assert row["mean"] == statistics.fmean(losses) and row["deviation"] == statistics.stdev(losses)
        assert losses[0] != losses[1]
        assert (
            row["trainable_parameters"] == runs[0]["trainable_parameters"] == 32 * row["values"]["num_virtual_tokens"]
        )
        assert row["seconds"] == statistics.fmean(run["seconds"] for run in runs)
        assert row["tokens"] == statistics.fmean(run["tokens"] for run in runs) > 0
        assert f"| {row['mean']:.4g} ± {row['deviation']:.2g} |" in (out / "sweep.md").read_text(encoding="utf-8")
    means = [row["mean"] for row in found["settings"]]
    assert means == sorted(means)
    best = found["settings"][0]["runs"]
    assert found["best"]["folder"] == str(out / min(best, key=lambda run: run["score"])["folder"])
    page = (out / "sweep.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and page.count("<circle") == 8  # all were trained on as many tokens
    workers = {line.split('"worker":"')[1].split('"')[0] for line in _journal(out) if '"worker":"' in line}
    assert len(workers) == 2 and not list((out / "workers").iterdir())


def _journal(out: Path) -> list[str]:
    return (out / "sweep.journal").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_four_processes_at_once_never_take_the_same(workplace: Path, tmp_path: Path, sampler: str) -> None:
    block = {"num_virtual_tokens": [1, 2, 3, 4], "learning_rate": [0.1, 0.2, 0.3, 0.4]}
    sweep = plan(workplace, tmp_path / "sweep", sweep=block, options={"sampler": sampler, "trials": 12})
    start = context().Barrier(4)
    workers = [context().Process(target=take_all, args=(sweep, start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    done = [t for t in open_study(sweep).trials if "same_as" not in t.user_attrs]
    assert [trial.state.name for trial in done] == ["COMPLETE"] * 12
    assert len({json.dumps(trial.params, sort_keys=True) for trial in done}) == 12
    assert len({trial.user_attrs["worker"] for trial in done}) > 1


def context() -> Any:
    """Processes that are forked from one that has imported everything."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(workplace: Path, tmp_path: Path) -> None:
    """SIGKILL in the second setting: the first is kept, the second resumed, and both end as they would have."""
    longer = {"sweep": {"steps": [2, 90]}, "save_steps": 5, "eval_steps": 45}
    killed, whole = plan(workplace, tmp_path / "killed", **longer), plan(workplace, tmp_path / "whole", **longer)
    run = killed.folder / "runs" / "0001-seed0"
    worker = context().Process(target=work_quietly, args=(killed,))
    worker.start()
    while len(rows_of(run)) < 14:
        assert worker.is_alive()
        time.sleep(0.005)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    before = rows_of(run)
    assert len(before) < 90 and not (run / "summary.json").exists()
    first = (killed.folder / "runs" / "0000-seed0" / "summary.json").stat().st_mtime_ns

    work_quietly(killed)
    assert (killed.folder / "runs" / "0000-seed0" / "summary.json").stat().st_mtime_ns == first
    assert rows_of(run)[:11] == before[:11]  # up to a saved state even the speeds are those measured then
    assert sorted(path.name for path in (killed.folder / "runs").iterdir()) == ["0000-seed0", "0001-seed0"]
    assert [row["state"] for row in results(killed.folder)["settings"]] == ["finished"] * 2
    work_quietly(whole)
    assert scores(killed.folder) == scores(whole.folder)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the first run, again and again; at last it ends in the same folder; once more, and nothing is run."""
    import softprompt.sweep.worker as worker

    sweep = plan(workplace, tmp_path / "sweep", sweep={"learning_rate": [0.1], "seed": [0, 1]}, steps=5)
    for stop in range(1, 5):  # more often than a setting may be killed

        def interrupt(row: dict[str, Any], stop: int = stop) -> None:
            if row["step"] == stop:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(worker, "_watch", interrupt)
            with pytest.raises(RunInterrupted):
                run_sweep(sweep, console=QUIET)
        assert len(rows_of(sweep.folder / "runs" / "0000-seed0")) == stop + 1
    assert [row["state"] for row in results(sweep.folder)["settings"]] == ["running"]
    found = run_sweep(sweep, console=QUIET)
    assert [row["state"] for row in found["settings"]] == ["finished"]
    assert [run["folder"] for run in found["settings"][0]["runs"]] == ["runs/0000-seed0", "runs/0000-seed1"]
    assert run_sweep(sweep, console=QUIET) == found


def test_failures_are_recorded_with_their_reasons(workplace: Path, tmp_path: Path) -> None:
    methods = {
        "prompt_tuning": {"learning_rate": [0.1, 1e38]},
        "p_tuning": {"num_virtual_tokens": [159]},
    }
    sweep = plan(workplace, tmp_path / "sweep", sweep={"method": methods}, method=None, steps=3)
    found = run_sweep(sweep, console=QUIET)
    assert [row["state"] for row in found["settings"]] == ["finished", "failed", "failed"]
    exploded, too_long = found["settings"][1:]
    assert exploded["values"]["learning_rate"] == 1e38 and "learning_rate" in exploded["reason"]
    assert too_long["values"]["num_virtual_tokens"] == 159 and "token" in too_long["reason"]
    assert found["best"]["setting"] == "0000"
    table = (sweep.folder / "sweep.md").read_text(encoding="utf-8")
    assert exploded["reason"] in table and too_long["reason"] in table
    assert run_sweep(sweep, console=QUIET)["settings"] == found["settings"]  # failures are not repeated


def test_what_fails_for_all_alike_ends_the_sweep(workplace: Path, tmp_path: Path) -> None:
    sweep = plan(
        workplace, tmp_path / "sweep", train="nowhere.jsonl", sweep={"learning_rate": [0.1, 0.2, 0.3, 0.4, 0.5]}
    )
    with pytest.raises(TrainingError, match=r"no setting has worked, and 3 failed alike: .*nowhere\.jsonl"):
        run_sweep(sweep, console=QUIET)
    assert len(results(sweep.folder)["settings"]) == 3


@pytest.mark.slow
def test_a_setting_that_lags_behind_is_given_up(workplace: Path, tmp_path: Path) -> None:
    rates = [0.3, 0.25, 0.2, 0.35, 0.4, 1e-9]
    sweep = plan(
        workplace,
        tmp_path / "sweep",
        options={"prune": True},
        sweep={"learning_rate": rates, "seed": [0]},
        steps=2,
        eval_steps=1,
        schedule="constant",
    )
    found = run_sweep(sweep, console=QUIET)
    pruned = [row for row in found["settings"] if row["state"] == "pruned"]
    assert 1e-9 in [row["values"]["learning_rate"] for row in pruned]
    assert all("given up at step" in row["reason"] and row["mean"] is None for row in pruned)
    assert not (sweep.folder / "runs" / "0005-seed0" / "summary.json").exists()


@pytest.mark.slow
def test_the_command_prints_what_to_use_and_goes_on(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shell, out = Shell(capsys), tmp_path / "sweep"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values(workplace, out, sweep={"num_virtual_tokens": [2, 4]})), encoding="utf-8")
    said = shell.ok("sweep", recipe, "--trials", 1, "--max-new-tokens", 2)
    assert "held-out loss" in said and len(results(out)["settings"]) == 1
    command = next(line for line in said.splitlines() if line.startswith("Next: ")).removeprefix("Next: ")
    assert shell.ok(*shlex.split(command)[1:], "--max-new-tokens", 2)
    shell.ok("sweep", recipe)  # the rest of the grid
    assert len(results(out)["settings"]) == 2
    status, _, error = shell.run("sweep", recipe, "--batch-size", 2)
    assert status == 2 and "was started with batch_size: 4, but now it is 2" in error
    status, _, error = shell.run("sweep", recipe, "--num-virtual-tokens", 2)
    assert status == 2 and "the sweep varies it" in error
    status, _, error = shell.run("train", recipe, "--out", tmp_path / "run")
    assert status == 2 and "start it by `softprompt sweep`" in error
    status, _, error = shell.run("sweep", recipe, "--out", workplace)
    assert status == 2 and "holds something, but no sweep" in error


def test_torchrun_starts_no_sweep(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="not started by torchrun"):
        run_sweep(plan(workplace, tmp_path / "sweep"))


PAGE = Path(__file__).resolve().parent.parent / "docs" / "sweeps.md"
BLOCK = re.compile(r"<!-- (?P<kind>run: shell|sweep:) -->\n```\w+\n(?P<body>.*?)```", re.DOTALL)


@pytest.mark.slow
def test_the_pages_commands_run_and_its_block_is_a_space(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one setting and one step; the recipes are those in examples/sweep."""
    blocks = {match["kind"]: match["body"] for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}
    shown = Plan.of({"eval": "e.jsonl", "out": "o", **yaml.safe_load(blocks["sweep:"])}, SweepOptions(trials=5))
    assert set(shown.space.methods) == {"prefix_tuning", "prompt_tuning"} and shown.sampler == "tpe"
    commands = [shlex.split(line) for line in blocks["run: shell"].splitlines()]
    recipes = {root / command[2] for command in commands}
    assert recipes == set((root / "examples" / "sweep").glob("*.yaml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(root / "examples")
    (tmp_path / "softprompt").symlink_to(root / "softprompt")
    brief = ["--trials", "1", "--steps", "1", "--train-limit", "8", "--eval-limit", "2", "--batch-size", "2"]
    for command in commands:
        said = Shell(capsys).ok(*command[1:], *brief)
        out = Path(command[command.index("--out") + 1])
        assert f"Best prompt: {out}/runs/0000-seed" in said
        assert [row["state"] for row in results(out)["settings"]] == ["finished"]
