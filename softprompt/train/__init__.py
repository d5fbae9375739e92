"""Training: a plain PyTorch loop over the prompt's parameters, with the base model frozen.

Everything random follows from the seed and the step, and all of it is in the saved state, so a run that is stopped and
resumed ends with the same bits as one that is not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console

from softprompt.errors import ConfigError
from softprompt.recipe import Recipe, require_paths
from softprompt.recipe.defaults import AUTO
from softprompt.train.build import prompt_config, with_source
from softprompt.train.distributed import processes
from softprompt.train.run_folder import RECIPE, RunFolder
from softprompt.train.run_result import RunResult
from softprompt.train.sharding import shards
from softprompt.train.trackers import check_trackers, tracked
from softprompt.train.trainer import StepHook, Trainer

__all__ = ["RunResult", "StepHook", "Trainer", "train"]

# Settings that may differ between a run and its continuation, because no trained number depends on them.
FREE_TO_CHANGE = frozenset(
    {  # a set's literal, in which ruff finds a name that stands there twice
        "out",
        "save_steps",
        "samples",
        "max_new_tokens",
        "eval_batch_size",
        "keep_encoder",
        "report_to",
        "device_map",
        "offload_folder",
        "max_memory",
        "shard",
        "shard_size",
    }
)


def train(
    recipe: Recipe, resume: bool = False, console: Console | None = None, on_step: StepHook | None = None
) -> RunResult:
    """Run a recipe and write its folder; with ``resume`` go on with the run in that folder, or begin it.

    A run that was killed at any moment ends, resumed, with the bits of one that was not.
    Started by `torchrun` or `accelerate launch`, the processes share the work of every step, and the first one writes.
    ``on_step`` is called with each metrics row after it is written. Raises ``RunInterrupted`` when stopped by Ctrl-C or
    SIGTERM, after saving what ``resume`` needs; ``TrainingError`` when the loss is no longer a number or has exploded
    (the best prompt so far stays in the folder); ``ConfigError``, ``DataError`` and ``CheckpointError`` for what their
    names say.
    """
    given = recipe
    recipe = with_source(recipe).resolved()
    require_paths(recipe)
    prompt_config(recipe)  # a wrong method or option is told before anything is loaded
    check_trackers(recipe)
    with processes(recipe.device) as team:
        shards(recipe, team.size)  # what contradicts it is told too
        console = (console or Console(stderr=True)) if team.main else Console(quiet=True)
        folder, state = team.on_main(lambda: _opened(recipe, resume, console))
        folder.writes = team.main
        trainer = Trainer.load(recipe, folder, state, console, team)
        if given.method == AUTO:
            console.print(f"method: {recipe.method}, the best known for {recipe.task}", highlight=False)
        with tracked(trainer, on_step) as hook:
            return trainer.run(hook)


def _opened(recipe: Recipe, resume: bool, console: Console) -> tuple[RunFolder, dict[str, Any] | None]:
    """The run's folder, and the state to go on from if there is one."""
    if not resume:
        return RunFolder.check_free(recipe.out), None
    folder = RunFolder.to_resume(recipe.out)
    if folder.there():
        return folder, _matching_state(folder, recipe, console)
    _tell(console, f"there is no run in {recipe.out} yet, so it begins")
    return folder, None


def _matching_state(folder: RunFolder, recipe: Recipe, console: Console) -> dict[str, Any] | None:
    """The saved state, if the recipe is the one it was saved under."""
    stored, now = Recipe.from_yaml(folder.path / RECIPE).resolved().to_dict(), recipe.to_dict()
    for name in dict.fromkeys([*now, *stored]):
        if name not in FREE_TO_CHANGE and stored.get(name) != now.get(name):
            raise ConfigError(
                f"the run in {folder.path} was started with {name}={stored.get(name)!r}, but now it is "
                f"{now.get(name)!r}; resume with the same settings, or start a new run in another `out`"
            )
    state = folder.load_state(partial(_tell, console))
    if state is None:
        _tell(console, f"the run in {folder.path} has saved no state, so it begins again")
    return state


def _tell(console: Console, words: str) -> None:
    console.print(words, highlight=False, soft_wrap=True)
