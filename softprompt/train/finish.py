"""The end of a run: samples before and after, the summary, the report – all made with the prompt that was saved."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.elsewhere import all_words
from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe
from softprompt.report import write_report
from softprompt.report.nearest import nearest_tokens
from softprompt.template import Template
from softprompt.train.run_folder import SAMPLES, SUMMARY
from softprompt.train.tuned_base import restore_base

if TYPE_CHECKING:
    from softprompt.train import Trainer
    from softprompt.train.run_result import RunResult

_KEPT = "kept"  # the name under which the saved prompt is loaded beside the one in training


def finish(trainer: Trainer, result: RunResult) -> None:
    """Write ``samples.json``, ``summary.json`` and ``report.html`` into the run's folder."""
    folder = trainer.folder
    if trainer.recipe.base_learning_rate is not None:
        restore_base(trainer.model, folder.path)
    with _kept_prompt(trainer.model, folder.path):
        folder.write_json(SAMPLES, _samples(trainer))
        folder.write_json(SUMMARY, _summary(trainer, result))
    if folder.writes:
        write_report(folder.path)


@contextmanager
def _kept_prompt(model: SoftPromptModel, folder: Path) -> Iterator[None]:
    """The model with the prompt of the folder: what a user of the folder will get, not what is in memory."""
    name = model.active_adapter
    model.load_adapter(folder, _KEPT)
    model.set_adapter(_KEPT)
    try:
        yield
    finally:
        model.set_adapter(name)
        model.delete_adapter(_KEPT)


def _samples(trainer: Trainer) -> list[dict[str, Any]]:
    """Answers with the prompt and, unless the base model has been tuned too or had no head before, without it."""
    shown, objective, size = trainer.data.shown, trainer.objective, trainer.recipe.eval_batch_size
    if not shown:
        return []
    after = objective.answers(trainer.model, shown, size)
    before = [""] * len(shown)
    if _compares(trainer):
        with trainer.model.disable_adapter():
            before = objective.answers(trainer.model, shown, size, bare=True)
    rows = zip(shown, before, after, strict=True)
    return [{**objective.shown(example), "before": b, "after": a} for example, b, a in rows]


def _compares(trainer: Trainer) -> bool:
    return trainer.objective.compares and trainer.recipe.base_learning_rate is None


def _summary(trainer: Trainer, result: RunResult) -> dict[str, Any]:
    model, recipe = trainer.model, trainer.recipe
    vectors, base = model.prompt_vectors(), model.get_base_model()
    return {
        "method": recipe.method,
        "base_name": recipe.model,
        "steps": result.steps,
        "best_step": result.best_step,
        "frozen": result.frozen,
        "start": result.start,
        "best": result.best,
        "classifies": not _compares(trainer),
        "label_names": trainer.data.label_names,
        "train_examples": trainer.data.train_examples,
        "eval_examples": len(trainer.data.held_out),
        "trainable_parameters": result.trainable_parameters,
        "base_parameters": result.base_parameters,
        "saved_parameters": _saved_parameters(trainer.folder.path),
        "adapter_bytes": (trainer.folder.path / "adapter_model.safetensors").stat().st_size,
        "seconds": round(result.seconds, 2),
        "processes": result.processes,
        "tokens": trainer.progress.tokens,
        "tokens_per_s": round(trainer.progress.tokens / max(result.seconds, 1e-9), 1),
        "nearest": None if vectors is None else nearest_tokens(vectors.cpu(), all_words(base), trainer.tokenizer),
        "norms": _norms(model) if vectors is None else None,
        "command": generate_command(recipe),
        "versions": _versions(),
    }


def generate_command(recipe: Recipe, text: str = "…") -> str:
    """The shell command that uses a run's prompt."""
    found_by_itself = recipe.model == "embedded" or recipe.base_learning_rate is not None
    model = "" if found_by_itself else f" --model {shlex.quote(recipe.model)}"
    if recipe.task == "CLOZE" and recipe.template:
        fields = dict.fromkeys(Template(recipe.template).fields, text)
        text = json.dumps(fields, ensure_ascii=False) if len(fields) > 1 else text
    task = f" --task {shlex.quote(next(iter(recipe.tasks)))}" if recipe.tasks else ""
    return f"softprompt generate{model} --prompt {shlex.quote(recipe.out)}{task} --input {shlex.quote(text)}"


def _norms(model: SoftPromptModel) -> list[tuple[float, float]]:
    """Mean length of keys and of values per layer, over heads and virtual tokens."""
    kept = model.fold()
    return [(float(key.norm(dim=-1).mean()), float(value.norm(dim=-1).mean())) for key, value in kept.pairs]


def _saved_parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  (not a mapping)


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in ("softprompt", "torch", "transformers", "tokenizers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found
