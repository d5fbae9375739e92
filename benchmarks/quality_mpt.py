"""Does a prompt learnt on six tasks help on a seventh? Multitask prompt tuning beside plain prompts and PEFT.

    python benchmarks/quality_mpt.py                   runs what is missing, writes the table
    python benchmarks/quality_mpt.py --arms scratch,folded,untaught,small,heavy,shared,long,three   what it depends on
    python benchmarks/quality_mpt.py --table           only writes benchmarks/results/mpt.md

The embedded model; tasks of mpt_tasks.py. Sources: `softprompt train` on all of them at once, with a teacher each. For
each target, k of its training rows are drawn five times. Every arm gets the same rows in the same order, the same
number of steps, warm-up, decay and clipping, and keeps its last step (k rows leave none to choose by). Learning rates:
for each arm the best of `RATES` by the mean loss over all targets on rows kept for that, after training on one other
draw of `GRID_SHOTS` rows. PEFT, which brings no training loop, gets ours with torch's AdamW, on the sources too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Records, assets, fingerprint
from mpt_table import (
    ARMS,
    BATCH,
    DRAWS,
    MAIN,
    RATES,
    SHOTS,
    SMALL_BATCH,
    STEPS,
    TEACHER_STEPS,
    TOKENS,
    WARMUP,
    WHY,
    WHY_SHOTS,
    write_table,
)
from mpt_tasks import SOURCES, TARGETS, TEMPLATE, few, write_tasks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from softprompt import MultitaskPromptTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model
from softprompt.data import IGNORED, Encoded, Example, collate, encode_all, load_examples
from softprompt.evaluate import pad_id
from softprompt.initialize import initialize_from_text
from softprompt.loading import load_base, load_tokenizer, resolve_model
from softprompt.recipe import EMBEDDED, Recipe
from softprompt.train import train
from softprompt.train.batches import BatchOrder, rate_factor
from softprompt.train.multitask_data import TaskOrder
from softprompt.train.optimizers import build_optimizer
from softprompt.train.run_data import starting_text

GRID_SHOTS, GRID_DRAW = 32, 99
PEFT_SOURCE = [("RANDOM", 0.1), ("RANDOM", 0.3), ("RANDOM", 1.0), ("TEXT", 0.3)]
PEFT_GRID_STEPS = 60


class Bench:
    """The model, the tasks in files and the records; `work` keeps the sources, so that a stopped run goes on."""

    def __init__(self, records: Records, work: Path, steps: int) -> None:
        self.records, self.work, self.steps = records, work, steps
        work.mkdir(parents=True, exist_ok=True)
        self.files = write_tasks(assets() / "data", work)
        self.tokenizer = load_tokenizer(EMBEDDED)
        self.weights = fingerprint(Path(resolve_model(EMBEDDED)))
        self.tests, self.kept = ({name: self.encoded(self.files[name][n]) for name in TARGETS} for n in (1, 2))

    def encoded(self, file: Path, task: int | None = None) -> list[Encoded]:
        rows = encode_all(load_examples(file, template=TEMPLATE), self.tokenizer, 500)
        return [Encoded(row.input_ids, row.labels, task) for row in rows]

    def base(self) -> Any:
        return load_base(EMBEDDED, self.tokenizer, device="cpu")

    def record(self, scores: dict[str, float], **what: Any) -> dict[str, Any]:
        row = {"weights": self.weights, **what, **scores}
        self.records.add(row)
        return row

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return self.records.find(weights=self.weights, **wanted)

    # ---- sources ---------------------------------------------------------------------------------------------------

    def source(self, name: str, among: Sequence[str] = SOURCES, **settings: Any) -> Path:
        """The folder of a source run, made if it is not there: `softprompt train` on several source tasks."""
        out = self.work / name
        if not (out / "summary.json").is_file():
            tasks = {each: {"train": str(self.files[each][0]), "template": TEMPLATE} for each in among}
            tasks = {each: {**data, "eval": str(self.files[each][1])} for each, data in tasks.items()}
            steps = settings.pop("steps", self.steps)
            recipe = Recipe(
                tasks=tasks, out=str(out), method="multitask_prompt_tuning", num_virtual_tokens=TOKENS, samples=0,
                steps=steps, batch_size=BATCH, eval_limit=120, eval_steps=steps, device="cpu", **settings,
            )  # fmt: skip
            result = train(recipe, resume=(out / "recipe.yaml").is_file())
            self.record(result.best, arm="source", name=name, steps=steps, seconds=round(result.seconds, 1))
        return out

    def source_of(self, arm: str) -> Path:
        """The folder of the prompt of several tasks that an arm starts from."""
        if arm == "small":
            return self.small()
        if arm == "untaught":
            return self.source(arm, distillation=0.0)
        teacher = {"steps": TEACHER_STEPS, "eval_steps": TEACHER_STEPS, "eval_limit": 60, "save_steps": 0}
        taught = self.source("taught", teacher=teacher)
        differing: dict[str, dict[str, Any]] = {
            "heavy": {"distillation": 4.0},
            "shared": {"task_learning_rate": 0.02},
            "long": {"steps": 3 * self.steps},
            "three": {"among": ("name", "food", "describe")},
        }
        return self.source(arm, teachers=str(taught / "teachers"), **differing[arm]) if arm in differing else taught

    def small(self) -> Path:
        """Our source training without teachers from PEFT's start of u and v."""
        out = self.work / "small" / "adapter_config.json"
        if not out.is_file():
            torch.manual_seed(0)
            model = self.multitask(num_tasks=len(SOURCES))
            initialize_from_text(model, self.tokenizer, self.start_text())
            with torch.no_grad():
                for name, parameter in model.encoder().named_parameters():
                    if name in model.encoder().task_parameters:
                        parameter.normal_(0, 0.02)
            self.fit_sources(model, rates("mpt", (0.3, 0.3)))
            self.record(self.source_scores(model), arm="source", name="small", steps=self.steps)
            model.save_pretrained(out.parent)
        return out.parent

    def peft_source(self) -> tuple[Path, str]:
        """PEFT's MPT on all sources: the best of `PEFT_SOURCE` after a few steps, for all steps."""
        for init, rate in PEFT_SOURCE:
            key = {"arm": "peft source grid", "setting": f"{init} {rate:g}"}
            if not self.find(**key):
                model = self.peft_multitask(init)
                self.fit_sources(model, rate, PEFT_GRID_STEPS)
                self.record(self.source_scores(model), **key)
        best = min(PEFT_SOURCE, key=lambda pair: self.find(setting=f"{pair[0]} {pair[1]:g}")[0]["loss"])
        folder, setting = self.work / "peft", f"{best[0]} {best[1]:g}"
        if not (folder / "adapter_config.json").is_file():
            model, begun = self.peft_multitask(best[0]), time.perf_counter()
            self.fit_sources(model, best[1])
            model.save_pretrained(str(folder))
            seconds = round(time.perf_counter() - begun, 1)
            self.record(self.source_scores(model), arm="source", name="peft", setting=setting, seconds=seconds)
        return folder, setting

    def source_rows(self, part: int) -> list[Encoded]:
        return [row for task, name in enumerate(SOURCES) for row in self.encoded(self.files[name][part], task)]

    def source_scores(self, model: nn.Module) -> dict[str, float]:
        rows = self.source_rows(1)
        losses = {f"loss_{name}": score(model, [r for r in rows if r.task == task][:20], self.tokenizer)["loss"]
                  for task, name in enumerate(SOURCES)}  # fmt: skip
        return {"loss": sum(losses.values()) / len(losses), **losses}

    def fit_sources(self, model: Any, how: float | Recipe, steps: int | None = None) -> None:
        rows = self.source_rows(0)
        order = TaskOrder([row.task or 0 for row in rows], BATCH, seed=0)
        fit(model, rows, order, steps or self.steps, how, self.tokenizer)

    def start_text(self) -> str:
        rows = [row for name in SOURCES for row in load_examples(self.files[name][0], template=TEMPLATE)]
        return starting_text([text_of(row) for row in rows], self.tokenizer, TOKENS, seed=0)

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def multitask(self, **options: Any) -> SoftPromptModel:
        config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **options)
        return get_peft_model(self.base(), config)

    def peft_multitask(self, init: str = "RANDOM", tasks: int = len(SOURCES), **options: Any) -> Any:
        import peft

        if init == "TEXT":
            options |= {"prompt_tuning_init_text": self.start_text(), "tokenizer_name_or_path": resolve_model(EMBEDDED)}
        torch.manual_seed(0)
        config = peft.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, num_tasks=tasks, prompt_tuning_init=init, **options
        )
        return peft.get_peft_model(self.base(), config)

    def start(self, arm: str, examples: Sequence[Example], draw: int) -> Any:
        """A model with the arm's prompt before adaptation."""
        average: dict[str, Any] = {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS"}
        place = "prompt_tuning_init_state_dict_path"
        if arm == "peft":
            file = self.peft_source()[0] / "adapter_model.safetensors"
            return self.peft_multitask("AVERAGE_SOURCE_TASKS", 1, **{place: str(file)})
        if arm == "nearest":
            return self.nearest(examples)
        if arm == "mpt" or (arm in WHY and arm not in ("folded", "scratch")):
            return self.multitask(**average, **{place: str(self.source_of(arm))})
        torch.manual_seed(draw)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
        model = self.multitask() if arm == "scratch" else get_peft_model(self.base(), config)
        if arm != "folded":  # the default of `softprompt train`: the text of training examples
            texts = [text_of(example) for example in examples]
            initialize_from_text(model, self.tokenizer, starting_text(texts, self.tokenizer, TOKENS, draw))
        else:
            mean: Any = self.multitask(**average, **{place: str(self.source_of(arm))}).encoder()
            model.encoder().start_from(mean.task_vectors())
        return model

    def nearest(self, examples: Sequence[Example]) -> SoftPromptModel:
        """MPT from the u and v of the source task whose prompt has the lowest loss on the few rows."""
        place, rows = str(self.source_of("nearest")), encode_all(examples, self.tokenizer, 500)
        models = [
            self.multitask(prompt_tuning_init="EXACT_SOURCE_TASK", prompt_tuning_init_state_dict_path=place,
                           prompt_tuning_init_task=task) for task in range(len(SOURCES))
        ]  # fmt: skip
        return min(models, key=lambda model: score(model, rows, self.tokenizer)["loss"])

    # ---- targets -----------------------------------------------------------------------------------------------------

    def adapt(
        self, arm: str, target: str, shots: int, draw: int, setting: tuple[float, float | None]
    ) -> dict[str, Any]:
        """Scores after `STEPS` steps on `shots` rows, and of the start."""
        key = {"arm": arm, "target": target, "shots": shots, "draw": draw, "setting": list(setting)}
        for row in self.find(**key):
            return row
        few_rows = few(self.files[target][0], shots, draw)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "few.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in few_rows), encoding="utf-8")
            examples, rows = load_examples(file, template=TEMPLATE), self.encoded(file)
        model = self.start(arm, examples, draw)
        scored = (self.kept if draw == GRID_DRAW else self.tests)[target]
        start = vectors_of(model)
        same = [] if arm in ("plain", "nearest", "scratch") else self.find(arm=arm, target=target)
        same = [row for row in same if (row["draw"] == GRID_DRAW) == (draw == GRID_DRAW)]
        before = same[0]["start_loss"] if same else score(model, scored, self.tokenizer)["loss"]
        order = BatchOrder([len(row.input_ids) for row in rows], SMALL_BATCH, draw)
        fit(model, rows, order, STEPS, setting[0] if arm == "peft" else rates(arm, setting), self.tokenizer)
        scores = score(model, scored, self.tokenizer)
        moved = round(float((vectors_of(model) - start).norm() / start.norm()), 3)
        return self.record({**scores, "start_loss": before, "moved": moved}, **key)

    def best_rates(self, arm: str) -> tuple[float, float | None]:
        """By the mean loss over the targets on rows and a draw that are not among those reported."""
        same = arm if arm in RATES else "mpt"

        def mean(setting: tuple[float, float | None]) -> float:
            return sum(self.adapt(same, target, GRID_SHOTS, GRID_DRAW, setting)["loss"] for target in TARGETS)

        return min(RATES[same], key=mean)


def text_of(example: Example) -> str:
    return example.input + example.border + example.targets[0]


def rates(arm: str, setting: tuple[float, float | None]) -> Recipe:
    """Our optimiser with these rates; everything else is the method's default."""
    method = "prompt_tuning" if arm in ("plain", "folded") else "multitask_prompt_tuning"
    return Recipe(train="-", out="-", method=method, learning_rate=setting[0], task_learning_rate=setting[1]).resolved()


@torch.no_grad()
def vectors_of(model: Any) -> Tensor:
    """The prompt of a target `[p, d]`, of either library."""
    encoder = model.prompt_encoder["default"]
    if isinstance(model, SoftPromptModel):
        return model.encoder().prompt().vectors[0].clone()  # pyright: ignore[reportAttributeAccessIssue]
    return encoder.embedding.weight * (encoder.prefix_task_cols[0] @ encoder.prefix_task_rows[0])


def fit(model: Any, rows: Sequence[Encoded], order: Any, steps: int, how: float | Recipe, tokenizer: Any) -> None:
    """The loop of `softprompt train`; `how` is our recipe, or a rate of AdamW."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(how, Recipe):
        optimizer = build_optimizer(how, model, trained)
    else:
        optimizer = torch.optim.AdamW(trained.values(), lr=how, weight_decay=0.0)
        optimizer.param_groups[0]["peak"] = how
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, steps, WARMUP, "linear")
        model(**inputs(model, [rows[n] for n in order[step]], tokenizer)).loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def inputs(model: Any, rows: Sequence[Encoded], tokenizer: Any) -> dict[str, Tensor]:
    """PEFT needs task_ids even where there is one task; ours needs them where there are several."""
    batch = collate(rows, pad_id(tokenizer))
    if not isinstance(model, SoftPromptModel) and "task_ids" not in batch:
        batch["task_ids"] = torch.zeros(len(rows), dtype=torch.long)
    return batch


@torch.no_grad()
def score(model: Any, rows: Sequence[Encoded], tokenizer: Any) -> dict[str, float]:
    """`loss` in nats per target token; `exact`, the share of rows whose every target token is the likeliest."""
    model.eval()
    total, tokens, right = 0.0, 0, 0
    for begin in range(0, len(rows), 25):
        batch = inputs(model, rows[begin : begin + 25], tokenizer)
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, -labels.shape[1] :][:, :-1]  # PEFT's have the prompt in front
        wanted = labels[:, 1:]
        total += float(cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"))
        tokens += int((wanted != IGNORED).sum())
        right += int(((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(1).sum())
    return {"loss": round(total / tokens, 4), "exact": round(right / len(rows), 4)}


# ---- running ---------------------------------------------------------------------------------------------------------


def run(bench: Bench, arms: Sequence[str], draws: Sequence[int]) -> None:
    """Draw by draw, so that a run that is stopped has something of everything."""
    chosen = {arm: bench.best_rates(arm) for arm in arms}
    for draw in draws:
        for shots in SHOTS:
            for target in TARGETS:
                for arm in arms:
                    if arm in MAIN or shots == WHY_SHOTS:
                        bench.adapt(arm, target, shots, draw, chosen[arm])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of source training")
    parser.add_argument("--draws", type=int, nargs="+", default=list(range(DRAWS)), help="which draws of k rows")
    parser.add_argument("--arms", default=",".join(MAIN), help=f"of {', '.join(ARMS)}, separated by commas")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "softprompt-mpt")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = Records(RESULTS / "mpt.json")
    if not arguments.table:
        run(Bench(records, arguments.work, arguments.steps), arguments.arms.split(","), arguments.draws)
    print(write_table(records))


if __name__ == "__main__":
    main()
