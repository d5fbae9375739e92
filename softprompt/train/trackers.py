"""Trackers of experiments beside a run's own files: TensorBoard, Weights & Biases and MLflow.

They are reached by transformers' own callbacks, so projects, servers and names come from the environment variables that
its Trainer reads (WANDB_PROJECT, MLFLOW_TRACKING_URI, TENSORBOARD_LOGGING_DIR, …). A tracker is told the recipe and
every row of metrics.jsonl. One that fails while a run goes on is left out from then on; the run is not lost with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from rich.console import Console
from torch import nn

from softprompt import transformers_api as api
from softprompt.errors import ConfigError
from softprompt.recipe import Recipe

if TYPE_CHECKING:
    from softprompt.train.trainer import Trainer

EVENTS = "tensorboard"  # in the run's folder
NAMES = {"lr": "learning_rate"}  # where transformers' Trainer calls it otherwise

StepHook = Callable[[dict[str, Any]], None]


def check_trackers(recipe: Recipe) -> None:
    """``ConfigError`` for a tracker whose package is missing, or that is asked for what it cannot do here."""
    for name in recipe.report_to or ():
        if find_spec(name) is None:
            raise ConfigError(f"report_to names {name}, which is not installed; run: pip install {name}")
    upload = os.environ.get("WANDB_LOG_MODEL", "false").lower()
    if "wandb" in (recipe.report_to or ()) and upload != "false":
        raise ConfigError(f"WANDB_LOG_MODEL is {upload!r}, but only metrics are sent; unset it, and upload the folder")


@contextmanager
def tracked(trainer: Trainer, on_step: StepHook | None) -> Iterator[StepHook | None]:
    """A hook that tells the run's trackers each row and then calls ``on_step``; they are closed with the context."""
    if not trainer.recipe.report_to or not trainer.team.main:
        yield on_step
        return
    base = trainer.model.get_base_model()
    trackers = Trackers.begin(trainer.recipe, base, trainer.progress.step, trainer.total, trainer.console)

    def hook(row: dict[str, Any]) -> None:
        trackers.log(row)
        if on_step is not None:
            on_step(row)

    try:
        yield hook
    finally:
        trackers.end()


@final
class Settings:
    """The recipe, where transformers' callbacks look for their ``TrainingArguments``.

    The real ones would report the Trainer's defaults as if this run had been trained with them.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.output_dir = recipe.out
        self.run_name = Path(recipe.out).name or None
        self._values = recipe.to_dict()

    def to_dict(self) -> dict[str, Any]:
        return dict(self._values)

    def to_json_string(self) -> str:
        return json.dumps(self._values, indent=2, ensure_ascii=False)


@final
class Trackers:
    """The callbacks of one run, from ``begin`` to ``end``."""

    def __init__(self, callbacks: Mapping[str, Any], recipe: Recipe, base: nn.Module, total: int, console: Console):
        from transformers import TrainerControl, TrainerState

        self.callbacks = dict(callbacks)
        self.console = console
        self._finish_wandb = "wandb" in callbacks and _wandb_is_free()
        self._arguments, self._control, self._model = Settings(recipe), TrainerControl(), base
        self._state = TrainerState(max_steps=total)

    @classmethod
    def begin(cls, recipe: Recipe, base: nn.Module, step: int, total: int, console: Console) -> Trackers:
        """Start the recipe's trackers; ``step`` is how far a resumed run is. ``ConfigError`` if one cannot start."""
        made: dict[str, Any] = {}
        for name in recipe.report_to or ():
            with _starting(name):
                made[name] = _callback(name, Path(recipe.out), step)
        trackers = cls(made, recipe, base, total, console)
        try:
            for name in made:
                with _starting(name):
                    trackers._call(name, "on_train_begin", step)
        except ConfigError:
            trackers.end()
            raise
        return trackers

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass on one row of the metrics."""
        self._state.epoch = row.get("epoch", 0.0)
        logs = {NAMES.get(name, name): value for name, value in row.items() if name != "step"}
        self._all("on_log", row["step"], logs=logs)

    def end(self) -> None:
        """Close the trackers; what they have been told is written or sent by then."""
        self._all("on_train_end", self._state.global_step)
        if self._finish_wandb and "wandb" in self.callbacks:
            # transformers leaves it open, and the next run of this process would go on with it
            import_module("wandb").finish()

    def _all(self, event: str, step: int, **more: Any) -> None:
        for name in list(self.callbacks):
            try:
                self._call(name, event, step, **more)
            except Exception as error:
                del self.callbacks[name]
                self.console.print(f"{name} is told no more: {_reason(error)}", highlight=False, markup=False)

    def _call(self, name: str, event: str, step: int, **more: Any) -> None:
        self._state.global_step = step
        call = getattr(self.callbacks[name], event)
        call(self._arguments, self._state, self._control, model=self._model, **more)


def _callback(name: str, out: Path, step: int) -> Any:
    made = api.tracker(name)
    if name != "tensorboard" or os.environ.get("TENSORBOARD_LOGGING_DIR"):
        return made()
    from torch.utils.tensorboard import SummaryWriter

    # a resumed run goes on in the same folder: what the killed one had told after its saved state is dropped
    return made(SummaryWriter(str(out / EVENTS), purge_step=step + 1 if step else None))


@contextmanager
def _starting(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a server that does not answer, a missing login: each package has its own types
        raise ConfigError(
            f"{name} cannot be started ({_reason(error)}); mend it, or leave it out of report_to"
        ) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _wandb_is_free() -> bool:
    """Whether no run of Weights & Biases is under way that the user has begun."""
    return import_module("wandb").run is None
