"""The end of a run: samples before and after, the summary, the report – all made with the prompt that was saved."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from softprompt.data import Example, LabelledExample, collate, encode_labels
from softprompt.evaluate import generate_texts, pad_id
from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe
from softprompt.report import write_report
from softprompt.report.nearest import nearest_tokens
from softprompt.train.run_folder import SAMPLES, SUMMARY

if TYPE_CHECKING:
    from softprompt.train import Trainer
    from softprompt.train.run_result import RunResult

_KEPT = "kept"  # the name under which the saved prompt is loaded beside the one in training


def finish(trainer: Trainer, result: RunResult) -> None:
    """Write ``samples.json``, ``summary.json`` and ``report.html`` into the run's folder."""
    folder = trainer.folder
    with _kept_prompt(trainer.model, folder.path):
        folder.write_json(SAMPLES, _samples(trainer))
        folder.write_json(SUMMARY, _summary(trainer, result))
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
    shown = trainer.data.shown
    if not shown:
        return []
    after = _answers(trainer)
    if trainer.recipe.task == "SEQ_CLS":  # the head is new, so there is no answer before training to compare with
        before = [""] * len(shown)
    else:
        with trainer.model.disable_adapter():
            before = _answers(trainer)
    rows = zip(shown, before, after, strict=True)
    return [{**_shown(example, trainer.data.label_names), "before": b, "after": a} for example, b, a in rows]


def _shown(example: Example | LabelledExample, names: list[str] | None) -> dict[str, Any]:
    if isinstance(example, LabelledExample):
        assert names is not None
        return {"input": example.text, "references": [names[example.label]]}
    turns = example.messages[:-1] if example.messages else []
    chat = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    return {"input": chat or example.input, "references": list(example.targets)}


def _answers(trainer: Trainer) -> list[str]:
    shown, recipe = trainer.data.shown, trainer.recipe
    if recipe.task != "SEQ_CLS":
        inputs: Any = shown
        return generate_texts(
            trainer.model, trainer.tokenizer, inputs, recipe.max_new_tokens, batch_size=recipe.eval_batch_size
        )
    return _labels(trainer)


@torch.no_grad()
def _labels(trainer: Trainer) -> list[str]:
    names, shown = trainer.data.label_names, trainer.data.shown
    assert names is not None
    rows = encode_labels(shown, trainer.tokenizer, trainer.length, truncate=True)  # type: ignore[arg-type]
    batch = collate(rows, pad_id(trainer.tokenizer))
    batch.pop("labels")
    trainer.model.eval()
    logits = trainer.model(**{name: value.to(trainer.device) for name, value in batch.items()}).logits
    return [names[number] for number in logits.argmax(-1).tolist()]


def _summary(trainer: Trainer, result: RunResult) -> dict[str, Any]:
    model, recipe = trainer.model, trainer.recipe
    vectors = model.prompt_vectors()
    words = model.get_base_model().get_input_embeddings().weight
    assert isinstance(words, torch.Tensor)
    return {
        "method": recipe.method,
        "base_name": recipe.model,
        "steps": result.steps,
        "best_step": result.best_step,
        "frozen": result.frozen,
        "start": result.start,
        "best": result.best,
        "classifies": recipe.task == "SEQ_CLS",
        "label_names": trainer.data.label_names,
        "train_examples": len(trainer.data.train),
        "eval_examples": len(trainer.data.held_out),
        "trainable_parameters": result.trainable_parameters,
        "base_parameters": result.base_parameters,
        "saved_parameters": _saved_parameters(trainer.folder.path),
        "adapter_bytes": (trainer.folder.path / "adapter_model.safetensors").stat().st_size,
        "seconds": round(result.seconds, 2),
        "tokens_per_s": round(trainer.progress.tokens / max(result.seconds, 1e-9), 1),
        "nearest": None if vectors is None else nearest_tokens(vectors.cpu(), words.cpu(), trainer.tokenizer),
        "norms": _norms(model) if vectors is None else None,
        "command": generate_command(recipe),
        "versions": _versions(),
    }


def generate_command(recipe: Recipe, text: str = "…") -> str:
    """The shell command that uses a run's prompt."""
    model = "" if recipe.model == "embedded" else f" --model {shlex.quote(recipe.model)}"
    task = f" --task {shlex.quote(next(iter(recipe.tasks)))}" if recipe.tasks else ""
    return f"softprompt generate{model} --prompt {shlex.quote(recipe.out)}{task} --input {shlex.quote(text)}"


def _norms(model: SoftPromptModel) -> list[tuple[float, float]]:
    """Mean length of keys and of values per layer, over heads and virtual tokens."""
    kept = model.fold()
    return [(float(key.norm(dim=-1).mean()), float(value.norm(dim=-1).mean())) for key, value in kept.layers]


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
