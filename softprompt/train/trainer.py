"""The training loop: a plain PyTorch loop over the prompt's parameters, with the base model frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softprompt.elsewhere import place_of, sharded
from softprompt.errors import ConfigError, RunInterrupted, TrainingError
from softprompt.evaluate import pad_id
from softprompt.loading import Dispatch, load_base, load_tokenizer
from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe
from softprompt.train.batches import Batches, BatchOrder, InMemory, batches_per_epoch, rate_factor
from softprompt.train.build import build_prompt
from softprompt.train.distributed import Team
from softprompt.train.divergence import Watch
from softprompt.train.head_start import start_head
from softprompt.train.multitask import Distillation, teacher_prompts
from softprompt.train.multitask_data import TaskOrder
from softprompt.train.objective import Objective, merged, objective_of, own_loss, quietly
from softprompt.train.optimizers import build_optimizer
from softprompt.train.progress import StopRequest, TrainingProgress
from softprompt.train.run_data import RunData, context_length, read_source, row_length
from softprompt.train.run_folder import VERBALIZER, RunFolder
from softprompt.train.run_result import Progress, RunResult
from softprompt.train.saved_state import APART, restore, state_of
from softprompt.train.sharding import shard_base, shards
from softprompt.train.start import START, choose_start, kept_draw
from softprompt.train.stream import Streamed
from softprompt.train.tuned_base import save_with_base, tune_base

StepHook = Callable[[dict[str, Any]], None]


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
        team: Team,
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
        self.watch = Watch(_given(recipe.learning_rate), folder.path, len(tokenizer))
        self.team = team
        self.batches = _batches(recipe, data, team)
        self.total = total_steps(recipe, len(data.train))
        quarter = max(1, math.ceil(self.total / 4))
        self.eval_every = recipe.eval_steps or min(self.batches.per_epoch or quarter, quarter)
        self.device = place_of(model)

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        folder: RunFolder,
        state: Mapping[str, Any] | None,
        console: Console,
        team: Team | None = None,
    ) -> Trainer:
        """Read the data, load the model, build the prompt (or take it from ``state``) and open the folder."""
        team = team or Team()
        source = read_source(recipe)
        tokenizer = load_tokenizer(recipe.model)
        teachers = teacher_prompts(recipe, folder, console, team)  # their runs come first
        torch.manual_seed(recipe.seed)  # a classification head is drawn while loading
        cloze = recipe.task == "CLOZE"
        shared, device, place = shards(recipe, team.size), team.device(recipe.device), Dispatch.of(recipe)
        first = "cpu" if shared else device
        base = load_base(recipe.model, tokenizer, source.label_names, recipe.dtype, first, cloze, place)
        draw = kept_draw(folder, state)
        model = build_prompt(recipe, base, tokenizer, source.texts(), state is None, source.examples(), draw)
        if shared:
            shard_base(model, device, recipe.shard_size)
        context = context_length(model.facts, tokenizer)
        data = source.encode(recipe, tokenizer, context, base)
        loss = own_loss if teachers is None else Distillation.of(base, teachers, recipe)
        if data.cut:
            console.print(f"{data.cut} of {len(data.train)} training rows were cut to fit", highlight=False)
        objective = objective_of(recipe, data, tokenizer, row_length(recipe, context), model, loss)
        start = None
        if state is None:
            start = choose_start(recipe, model, tokenizer, source, data, objective, console)
            start_head(recipe, model, data.train, pad_id(tokenizer), console)
        if recipe.base_learning_rate is not None:
            tune_base(model, folder.path)
        trainer = cls(recipe, folder, model, tokenizer, data, console, objective, team)
        folder.begin(recipe)
        if data.cloze is not None:
            folder.write_json(VERBALIZER, data.cloze.to_dict())
        if start is not None:
            folder.write_json(START, start)
        trainer.agree()
        if state is not None:
            restore(trainer, state)
        folder.rewind(trainer.progress.step)
        return trainer

    def agree(self) -> None:
        """Start alike in all processes, but draw random numbers apart."""
        self.team.wait()
        if not self.folder.there():
            raise ConfigError(
                f"process {self.team.rank} does not see the run folder {self.folder.path} that the first process made; "
                "choose an `out` on a disk that all machines share"
            )
        self.team.from_main([*self.trainable.values(), *self.fixed.values()])
        if not self.team.main:
            torch.manual_seed(self.recipe.seed + APART * self.team.rank)

    def run(self, on_step: StepHook | None = None) -> RunResult:
        """Train to the last step, then write the samples, the summary and the report."""
        from softprompt.train.finish import finish

        with StopRequest() as stop, TrainingProgress(self.console, self.total, self.progress.step) as display:
            if self.progress.step == 0:
                self._begin(display, on_step)
            while self.progress.step < self.total:
                self._stop_if(stop)
                row = self._advance()
                display.update(row)
                if on_step is not None:
                    on_step(row)
            self._stop_if(stop)
        result = self.result()
        if self.team.main or sharded(self.model.get_base_model()):  # then all have to take part
            finish(self, result)
        self.team.wait()
        return result

    def _stop_if(self, stop: StopRequest) -> None:
        if self.team.any(stop.requested):
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
        self.watch.number(progress, row.get("eval_loss", 0.0), "held-out loss", progress.step)
        if last or (recipe.save_steps and progress.step % recipe.save_steps == 0):
            self.save()
        return row

    def _step(self, step: int) -> dict[str, Any]:
        """Forward, backward and update for one batch; step counts from 0 here and from 1 in the row."""
        begun = time.perf_counter()
        factor = rate_factor(step, self.total, _given(self.recipe.warmup), _given(self.recipe.schedule))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self._train_mode()
        scores, tokens = self._gradients(self.batches.rows(step))
        self.watch.loss(self.progress, scores["loss"], step + 1)
        norm = float(nn.utils.clip_grad_norm_(self.trainable.values(), self.recipe.clip or math.inf))
        self.watch.number(self.progress, norm, "gradient", step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begun
        self.progress.seconds += seconds
        self.progress.tokens += tokens
        per_epoch = self.batches.per_epoch
        return {
            "step": step + 1,
            **({"epoch": round((step + 1) / per_epoch, 4)} if per_epoch else {}),
            **scores,
            "lr": _given(self.recipe.learning_rate) * factor,
            "grad_norm": norm,
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        }

    def _gradients(self, rows: Sequence[Any]) -> tuple[dict[str, float], int]:
        """Gradients of the step's batch, of which `rows` are this process's; its loss and its parts, and its tokens.

        Every process's means are weighed by what they are the means of, so that the sums are those of the whole batch.
        A process without rows computes one of no weight: with a sharded base all have to take part.
        """
        loss, parts = self.objective.loss(self.model, rows or self.data.train[:1])
        loss.backward()
        scores, tokens = {"loss": float(loss.detach()), **parts}, sum(len(row.input_ids) for row in rows)
        if self.team.alone:
            return scores, tokens
        weight = self.objective.counted(rows)
        told = torch.tensor([*(value * weight for value in scores.values()), weight, tokens])
        gradients = [_gradient(parameter).mul_(weight) for parameter in self.trainable.values()]
        self.team.sum([*gradients, told])
        *sums, weights, tokens = told.tolist()
        for gradient in gradients:
            gradient.div_(weights)
        return dict(zip(scores, (value / weights for value in sums), strict=True)), round(tokens)

    def _train_mode(self) -> None:
        self.model.train()
        if not self.recipe.base_dropout:
            self.model.get_base_model().eval()

    def _evaluate(self, bare: bool = False) -> dict[str, float]:
        """Held-out scores of the model as it is. Draws no random numbers that training would draw."""
        rows, weighs = self.data.held_out, self.objective.weighs
        one = self.team.alone or sharded(self.model.get_base_model())  # which all have to call alike
        apart = weighs is not None and not one and len(rows) >= self.team.size
        own = self.team.share(rows) if apart else rows
        with quietly(self.model):
            scores = self.objective.evaluate(self.model, own, self.recipe.eval_batch_size, bare)
        return merged(self.team.gather(scores), weighs) if apart and weighs is not None else scores

    def _measure(self, row: dict[str, Any]) -> dict[str, float]:
        """Evaluate, add the scores to ``row``, and keep the prompt if it is the best (or if nothing can tell)."""
        scores = self._evaluate() if self.data.held_out else {}
        row.update(_prefixed("eval", scores))
        if scores and not math.isfinite(scores["loss"]):
            return scores
        if not scores or not self.progress.best or _rank(scores) > _rank(self.progress.best):
            self.watch.parameters(self.progress, self.trainable)
            if self.team.main:
                self._keep()
            self.progress.best, self.progress.best_step = scores, self.progress.step
        return scores

    def _keep(self) -> None:
        """Write the prompt as it is."""
        if self.recipe.base_learning_rate is not None:
            save_with_base(self.model, self.tokenizer, self.folder.path, self.recipe.keep_encoder)
        else:
            self.model.save_pretrained(self.folder.path, keep_encoder=self.recipe.keep_encoder)

    def save(self) -> None:
        """Write the resumable state; every process takes part."""
        self.watch.parameters(self.progress, self.trainable)
        state = state_of(self)
        self.folder.save_state(state)

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
            rank=self.team.rank,
            processes=self.team.size,
        )


def total_steps(recipe: Recipe, examples: int) -> int:
    """The number of optimiser steps: ``steps``, or what ``epochs`` come to."""
    if recipe.epochs is None:
        return _given(recipe.steps)
    return max(1, round(recipe.epochs * batches_per_epoch(examples, _given(recipe.batch_size))))


def _batches(recipe: Recipe, data: RunData, team: Team) -> Batches:
    size = _given(recipe.batch_size)
    if data.stream is not None:
        return Streamed(data.stream, size, recipe.shuffle_window, recipe.seed, recipe.group_by_length, team)
    if data.task_names is None:
        return InMemory(data.train, BatchOrder(data.lengths, size, recipe.seed, recipe.group_by_length), team)
    tasks = [row.task for row in data.train]  # type: ignore[union-attr, misc]
    return InMemory(data.train, TaskOrder(tasks, size, recipe.seed), team)  # type: ignore[arg-type]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, zeros where the loss does not reach it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


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
