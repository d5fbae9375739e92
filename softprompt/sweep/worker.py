"""A worker of a sweep: takes a setting, runs it with every seed, writes down what came of it, and takes the next."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from softprompt.errors import CheckpointError, RunInterrupted, SoftPromptError, TrainingError
from softprompt.recipe import Recipe
from softprompt.sweep.plan import Plan
from softprompt.sweep.presence import Presence
from softprompt.sweep.results import line_of, read_results, write_results
from softprompt.sweep.study import locked, open_study, take

if TYPE_CHECKING:
    from optuna import Study, Trial

RUNS = "runs"
HOPELESS = 3  # settings that fail for the same reason before any has worked

StepHook = Callable[[dict[str, Any]], None]


def work(plan: Plan, console: Console) -> None:
    """Try settings until none is left. ``RunInterrupted`` when stopped; ``TrainingError`` when nothing works at all."""
    study = open_study(plan)
    with Presence(plan.folder) as presence:
        while not _orphaned():
            with locked(plan.folder):
                trial = take(plan, study, presence)
                write_results(plan, study)
            if trial is None:
                return
            _try(plan, study, trial)
            with locked(plan.folder):
                write_results(plan, study)
            results = read_results(plan, study)
            console.print(line_of(results, trial.user_attrs["folder"]), highlight=False, markup=False, soft_wrap=True)
            _stop_if_hopeless(results)


def _try(plan: Plan, study: Study, trial: Trial) -> None:
    """One setting: its runs, one after the other, and its value or the reason why it has none."""
    from optuna import TrialPruned
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        try:
            runs = _runs(plan, trial)
            trial.set_user_attr("runs", runs)
            study.tell(trial, statistics.fmean(run["score"] for run in runs), skip_if_finished=True)
        except (RunInterrupted, KeyboardInterrupt, SystemExit):
            trial.set_user_attr("stopped", True)
            raise
        except UpdateFinishedTrialError:
            raise
        except TrialPruned as error:
            trial.set_user_attr("reason", str(error))
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        except Exception as error:
            trial.set_user_attr("reason", reason(error))
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    except UpdateFinishedTrialError:  # this process was taken for dead, and the setting is another's now
        return


def reason(error: Exception) -> str:
    """Why a setting failed, in one line; what is no error of the user's goes by its type too."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SoftPromptError) and text else f"{type(error).__name__}: {text}"


def _runs(plan: Plan, trial: Trial) -> list[dict[str, Any]]:
    """Run a setting with every seed; what is there already from a killed worker is kept, or resumed."""
    settings = plan.space.settings(trial.params)
    runs = []
    for place, seed in enumerate(plan.space.seeds):
        name = f"{RUNS}/{trial.user_attrs['folder']}-seed{seed}"
        recipe = plan.recipe(settings, seed, str(plan.folder / name))
        hook = _judge(plan, trial) if place == 0 and plan.prune else _watch
        runs.append({"folder": name, "seed": seed, **_numbers(plan, _run(recipe, hook))})
    return runs


def _run(recipe: Recipe, hook: StepHook) -> dict[str, Any]:
    """The summary of a run: of the one in its folder, resumed if it is not finished, or of a new one."""
    from softprompt.train import train
    from softprompt.train.run_folder import RECIPE, SUMMARY, remove_run

    folder = Path(recipe.out)
    if not (folder / SUMMARY).is_file():
        begun = (folder / RECIPE).is_file()
        if not begun:
            remove_run(folder)  # what a kill left of a run that had not begun
        train(recipe, resume=begun, console=Console(quiet=True), on_step=hook)
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / SUMMARY} cannot be read: {error}") from None


def _numbers(plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a run."""
    score = summary["best"].get(plan.metric)
    if score is None or not math.isfinite(score):
        raise TrainingError(f"the run has no {plan.metric} to judge by ({score}); it has {', '.join(summary['best'])}")
    seconds = summary["seconds"]
    tokens = summary.get("tokens", round(seconds * summary["tokens_per_s"]))
    kept = {name: summary[name] for name in ("best_step", "steps", "trainable_parameters", "saved_parameters")}
    return {"score": score, "seconds": seconds, "tokens": tokens, **kept, "command": summary["command"]}


def _judge(plan: Plan, trial: Trial) -> StepHook:
    """A hook that tells the study how the first seed does, and gives the setting up if it lags behind the others."""

    def hook(row: dict[str, Any]) -> None:
        _watch(row)
        score = row.get(f"eval_{plan.metric}")
        if row["step"] == 0 or score is None:
            return
        trial.report(score, row["step"])
        if trial.should_prune():
            from optuna import TrialPruned

            raise TrialPruned(f"given up at step {row['step']}, where its {plan.metric} was {score:.4g}")

    return hook


def _watch(row: dict[str, Any]) -> None:
    """End with the command that started this process: the state is saved, and the next command goes on with it."""
    if _orphaned():
        signal.raise_signal(signal.SIGTERM)


def _orphaned() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _stop_if_hopeless(results: dict[str, Any]) -> None:
    """Failures that no setting can cause alone, such as a missing file, are not repeated for all of them."""
    reasons = Counter(row["reason"] for row in results["settings"] if row["state"] == "failed")
    if any(row["state"] in ("finished", "pruned") for row in results["settings"]) or not reasons:
        return
    text, times = reasons.most_common(1)[0]
    if times >= HOPELESS:
        raise TrainingError(f"no setting has worked, and {times} failed alike: {text}")
