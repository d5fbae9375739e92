"""Training: a plain PyTorch loop over the prompt's parameters, with the base model frozen.

Everything random follows from the seed and the step, and all of it is in the saved state, so a run that is stopped and
resumed ends with the same bits as one that is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softprompt.errors import CheckpointError, ConfigError, RunInterrupted, TrainingError
from softprompt.loading import load_base, load_tokenizer
from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe, require_paths
from softprompt.train.batches import BatchOrder, batches_per_epoch, rate_factor
from softprompt.train.build import build_prompt, prompt_config, with_source
from softprompt.train.multitask import Distillation, teacher_prompts
from softprompt.train.multitask_data import TaskOrder
from softprompt.train.objective import Objective, objective_of, own_loss, quietly
from softprompt.train.optimizers import build_optimizer
from softprompt.train.progress import StopRequest, TrainingProgress
from softprompt.train.run_data import RunData, context_length, read_source, row_length
from softprompt.train.run_folder import RECIPE, STATE, VERBALIZER, RunFolder
from softprompt.train.run_result import Progress, RunResult
from softprompt.train.tuned_base import save_base, tune_base

# Settings that may differ between a run and its continuation, because no trained number depends on them.
FREE_TO_CHANGE = ("out", "save_steps", "samples", "max_new_tokens", "eval_batch_size", "keep_encoder")


StepHook = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe, resume: bool = False, console: Console | None = None, on_step: StepHook | None = None
) -> RunResult:
    """Run a recipe and write its folder; with ``resume`` go on with the run in that folder.

    ``on_step`` is called with each metrics row after it is written. Raises ``RunInterrupted`` when stopped by Ctrl-C or
    SIGTERM, after saving what ``resume`` needs; ``TrainingError`` when the loss is no longer a number (the best prompt
    so far stays in the folder); ``ConfigError``, ``DataError`` and ``CheckpointError`` for what their names say.
    """
    recipe = with_source(recipe).resolved()
    require_paths(recipe)
    prompt_config(recipe)  # a wrong method or option is told before anything is loaded
    folder = RunFolder.reopen(recipe.out) if resume else RunFolder.check_free(recipe.out)
    state = _matching_state(folder, recipe) if resume else None
    trainer = Trainer.load(recipe, folder, state, console or Console(stderr=True))
    return trainer.run(on_step)


def _matching_state(folder: RunFolder, recipe: Recipe) -> dict[str, Any] | None:
    """The saved state, if the recipe is the one it was saved under."""
    stored, now = Recipe.from_yaml(folder.path / RECIPE).resolved().to_dict(), recipe.to_dict()
    for name in dict.fromkeys([*now, *stored]):
        if name not in FREE_TO_CHANGE and stored.get(name) != now.get(name):
            raise ConfigError(
                f"the run in {folder.path} was started with {name}={stored.get(name)!r}, but now it is "
                f"{now.get(name)!r}; resume with the same settings, or start a new run in another `out`"
            )
    return folder.load_state()


class Trainer:
    """One run in memory: the model, its data, the optimiser and how far it is."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        model: SoftPromptModel,
        tokenizer: PreTrainedTokenizerBase,
        data: RunData,
        console: Console,
        objective: Objective,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.model = model
        self.tokenizer = tokenizer
        self.data = data
        self.console = console
        self.progress = Progress()
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.fixed = dict(model.prompt_encoder.named_buffers())  # what a prompt started with and does not train
        self.optimizer = build_optimizer(recipe, model, self.trainable)
        self.objective = objective
        self.order = _order(recipe, data)
        self.total = total_steps(recipe, len(data.train))
        self.eval_every = recipe.eval_steps or min(self.order.per_epoch, max(1, math.ceil(self.total / 4)))
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, recipe: Recipe, folder: RunFolder, state: Mapping[str, Any] | None, console: Console) -> Trainer:
        """Read the data, load the model, build the prompt (or take it from ``state``) and open the folder."""
        source = read_source(recipe)
        tokenizer = load_tokenizer(recipe.model)
        teachers = teacher_prompts(recipe, folder, console)  # their runs come first
        torch.manual_seed(recipe.seed)  # a classification head is drawn while loading
        cloze = recipe.task == "CLOZE"
        base = load_base(recipe.model, tokenizer, source.label_names, recipe.dtype, recipe.device, cloze)
        model = build_prompt(recipe, base, tokenizer, source.texts(), state is None, source.examples())
        context = context_length(model.geometry, tokenizer)
        data = source.encode(recipe, tokenizer, context, base)
        loss = own_loss if teachers is None else Distillation.of(base, teachers, recipe)
        if data.cut:
            console.print(f"{data.cut} of {len(data.train)} training rows were cut to fit", highlight=False)
        objective = objective_of(recipe, data, tokenizer, row_length(recipe, context), loss)
        if recipe.base_learning_rate is not None:
            tune_base(model, folder.path)
        trainer = cls(recipe, folder, model, tokenizer, data, console, objective)
        folder.begin(recipe)
        if data.cloze is not None:
            folder.write_json(VERBALIZER, data.cloze.to_dict())
        if state is not None:
            trainer.restore(state)
        folder.rewind_metrics(trainer.progress.step or -1)  # a run that stands at 0 measures its start again
        return trainer

    def run(self, on_step: StepHook | None = None) -> RunResult:
        """Train to the last step, then write the samples, the summary and the report."""
        from softprompt.train.finish import finish

        with StopRequest() as stop, TrainingProgress(self.console, self.total, self.progress.step) as display:
            if self.progress.step == 0:
                self._begin(display, on_step)
            while self.progress.step < self.total:
                self._stop_if(stop)
                row = self._advance()
                display.update(row, self.order.per_epoch)
                if on_step is not None:
                    on_step(row)
            self._stop_if(stop)
        result = self.result()
        finish(self, result)
        return result

    def _stop_if(self, stop: StopRequest) -> None:
        if stop.requested:
            self.save()
            raise RunInterrupted(
                f"stopped at step {self.progress.step} of {self.total}; the state is saved in {self.folder.path}, "
                "run the same command with --resume to go on"
            )

    def _begin(self, display: TrainingProgress, on_step: StepHook | None) -> None:
        """Measure the frozen model and the untrained prompt, and keep the latter as the best so far."""
        if self.data.held_out and self.objective.compares:
            with self.model.disable_adapter():
                self.progress.frozen = self._evaluate(bare=True)
        row: dict[str, Any] = {"step": 0, **_prefixed("frozen", self.progress.frozen)}
        self.progress.start = self._measure(row)
        self.folder.log(row)
        if not math.isfinite(row.get("eval_loss", 0.0)):
            raise TrainingError(
                f"the held-out loss is {row['eval_loss']} before training; check the weights of {self.recipe.model}, "
                "or use dtype: float32 if it is another one"
            )
        display.evaluated(row)
        if on_step is not None:
            on_step(row)

    def _advance(self) -> dict[str, Any]:
        """One step with its evaluation and its saved state, where they are due; returns the row that was logged."""
        recipe, progress = self.recipe, self.progress
        row = self._step(progress.step)
        progress.step += 1
        last = progress.step == self.total
        if last or progress.step % self.eval_every == 0:
            self._measure(row)
        self.folder.log(row)
        if last or (recipe.save_steps and progress.step % recipe.save_steps == 0):
            self.save()
        return row

    def _step(self, step: int) -> dict[str, Any]:
        """Forward, backward and update for one batch; step counts from 0 here and from 1 in the row."""
        begun = time.perf_counter()
        rows = [self.data.train[n] for n in self.order[step]]
        tokens = sum(len(row.input_ids) for row in rows)
        factor = rate_factor(step, self.total, _given(self.recipe.warmup), _given(self.recipe.schedule))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self._train_mode()
        loss, parts = self.objective.loss(self.model, rows)
        self._must_be_number(loss, "loss", step + 1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self.recipe.clip or math.inf)
        self._must_be_number(norm, "gradient", step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begun
        self.progress.seconds += seconds
        self.progress.tokens += tokens
        return {
            "step": step + 1,
            "epoch": round((step + 1) / self.order.per_epoch, 4),
            "loss": float(loss.detach()),
            **parts,
            "lr": _given(self.recipe.learning_rate) * factor,
            "grad_norm": float(norm),
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        }

    def _train_mode(self) -> None:
        self.model.train()
        if not self.recipe.base_dropout:
            self.model.get_base_model().eval()

    def _must_be_number(self, value: Tensor, what: str, step: int) -> None:
        if not bool(torch.isfinite(value)):
            raise TrainingError(
                f"the {what} is {float(value.detach())} at step {step}; lower learning_rate (now "
                f"{self.recipe.learning_rate:g}); the best prompt so far, of step {self.progress.best_step}, is kept "
                f"in {self.folder.path}"
            )

    def _evaluate(self, bare: bool = False) -> dict[str, float]:
        """Held-out scores of the model as it is. Draws no random numbers that training would draw."""
        with quietly(self.model):
            return self.objective.evaluate(self.model, self.data.held_out, self.recipe.eval_batch_size, bare)

    def _measure(self, row: dict[str, Any]) -> dict[str, float]:
        """Evaluate, add the scores to ``row``, and keep the prompt if it is the best (or if nothing can tell)."""
        scores = self._evaluate() if self.data.held_out else {}
        row.update(_prefixed("eval", scores))
        if scores and not math.isfinite(scores["loss"]):
            return scores
        if not scores or not self.progress.best or _rank(scores) > _rank(self.progress.best):
            self.model.save_pretrained(self.folder.path, keep_encoder=self.recipe.keep_encoder)
            if self.recipe.base_learning_rate is not None:
                save_base(self.model, self.tokenizer, self.folder.path)
            self.progress.best, self.progress.best_step = scores, self.progress.step
        return scores

    def save(self) -> None:
        """Write the resumable state."""
        devices = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        self.folder.save_state(
            {
                "progress": vars(self.progress),
                "trainable": {name: parameter.detach().cpu() for name, parameter in self.trainable.items()},
                "fixed": {name: buffer.cpu() for name, buffer in self.fixed.items()},
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": devices,
                "data": self.data.fingerprint(),
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state.

        ``ConfigError`` when the data or the model is not what it was, ``CheckpointError`` when parts of it are missing.
        """
        try:
            self._restore(state)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            place = self.folder.path / STATE
            raise CheckpointError(f"{place} is damaged ({reason}); start a new run in another `out`") from None

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.data.fingerprint():
            raise ConfigError(
                f"the data of the run in {self.folder.path} has changed since it was saved; resume with the same "
                "files, or start a new run in another `out`"
            )
        stored, own = {**state["trainable"], **state.get("fixed", {})}, {**self.trainable, **self.fixed}
        if {name: tuple(each.shape) for name, each in stored.items()} != {n: tuple(e.shape) for n, e in own.items()}:
            raise ConfigError(f"the state in {self.folder.path} belongs to another model or method; start a new run")
        with torch.no_grad():
            for name, each in own.items():
                each.copy_(stored[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def result(self) -> RunResult:
        trainable = sum(parameter.numel() for parameter in self.trainable.values())
        everything = sum(parameter.numel() for parameter in self.model.parameters())
        progress = self.progress
        return RunResult(
            folder=self.folder.path,
            recipe=self.recipe,
            steps=progress.step,
            best_step=progress.best_step,
            frozen=progress.frozen,
            start=progress.start,
            best=progress.best,
            trainable_parameters=trainable,
            base_parameters=everything - trainable,
            seconds=progress.seconds,
        )


def total_steps(recipe: Recipe, examples: int) -> int:
    """The number of optimiser steps: ``steps``, or what ``epochs`` come to."""
    if recipe.epochs is None:
        return _given(recipe.steps)
    return max(1, round(recipe.epochs * batches_per_epoch(examples, _given(recipe.batch_size))))


def _order(recipe: Recipe, data: RunData) -> BatchOrder | TaskOrder:
    size = _given(recipe.batch_size)
    if data.task_names is None:
        return BatchOrder(data.lengths, size, recipe.seed, recipe.group_by_length)
    return TaskOrder([row.task for row in data.train], size, recipe.seed)  # type: ignore[union-attr, misc]


def _rank(scores: Mapping[str, float]) -> tuple[float, float]:
    """Higher is better: accuracy or P@1 where there is one, then a lower loss."""
    return (scores.get("accuracy", scores.get("p_at_1", 0.0)), -scores["loss"])


def _prefixed(prefix: str, scores: Mapping[str, float]) -> dict[str, float]:
    shown = (name for name in scores if name in ("loss", "accuracy", "p_at_1") or name.startswith("loss_"))
    return {f"{prefix}_{name}": scores[name] for name in shown}


def _given(value: Any) -> Any:
    """A field that ``Recipe.resolved`` has filled."""
    assert value is not None
    return value
