"""How good is a prompt trained with the default settings, beside PEFT's? E2E, held-out loss and BLEU.

    python benchmarks/quality_e2e.py --model stories260K --seeds 3      runs what is missing, writes the table
    python benchmarks/quality_e2e.py --model embedded --seeds 3
    python benchmarks/quality_e2e.py --table                            only writes benchmarks/results/e2e.md

Three arms for each method: `softprompt train` with its default settings; PEFT with its default initialisation and the
learning rate people use for it; PEFT with the best of a grid (every setting of `GRID` for `--grid-steps` steps, the
best two again for all steps, the best of those, or the defaults if better, with all seeds – chosen by the loss that
is reported, in PEFT's favour). `--like MODEL --finalists 1` shortens this for a second model.
The rest is the same for all: virtual tokens, examples and their order, batch size, number of steps, linear warm-up and
decay, gradients clipped at 1, no weight decay, float32, loss on the target only, last step kept. PEFT, which brings no
training loop, gets ours with torch's AdamW; the optimiser and its momentum are part of our default settings. Its
prompts are trained and saved by PEFT, then read and scored by the code that scores ours; `_check_same_loss` makes sure
that PEFT itself gives the same loss.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Records, assets, fingerprint, machine, spread_of, table
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt import SoftPromptModel
from softprompt.data import Encoded, Example, collate, encode_all, expand, load_examples
from softprompt.evaluate import evaluate_loss, generate_texts, pad_id, score_texts
from softprompt.loading import load_base, load_tokenizer, resolve_model
from softprompt.recipe import EMBEDDED, Recipe
from softprompt.recipe.defaults import defaults_for
from softprompt.train import train
from softprompt.train.batches import BatchOrder, rate_factor, spread
from softprompt.train.run_data import starting_text

TEMPLATE = "{mr} => {ref}"
TOKENS = 20
BATCH = 16
TRAIN_ROWS = 1000  # training meaning representations that are read: some 9,000 pairs, more than any run here sees
WARMUP = 0.06
LOSS_PAIRS = 400  # dev pairs for the loss, evenly spread over all 4,672
BLEU_INPUTS = 100  # dev meaning representations for BLEU, evenly spread over all 547, with all their references
NEW_TOKENS = 96
CANDIDATES = 3  # settings that `--like MODEL` takes over from that model's grid
METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")
ARMS = {"ours": "softprompt, defaults", "default": "PEFT, defaults", "best": "PEFT, best found"}


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to train a method with PEFT; `from_text` starts from the training examples that ours starts from."""

    rate: float
    options: dict[str, Any] = field(default_factory=dict)
    from_text: bool = False

    def __str__(self) -> str:
        parts = [f"{value}" if name == "encoder_reparameterization_type" else f"{name.split('_')[1]} {value}"
                 for name, value in self.options.items()]  # fmt: skip
        return ", ".join([*parts, *(["from text"] if self.from_text else []), f"lr {self.rate:g}"])


# PEFT's own default initialisation and widths. It has no default learning rate; these are from memory of its guides:
# prompt tuning 3e-2 and prefix tuning 1e-2 (prompt-based methods), P-tuning 1e-3 (sequence classification).
PEFT_DEFAULTS = {"prompt_tuning": Setting(3e-2), "p_tuning": Setting(1e-3), "prefix_tuning": Setting(1e-2)}


def _ffn(width: int) -> dict[str, Any]:
    return {"prefix_projection": True, "encoder_hidden_size": width}


def _encoder(kind: str, width: int) -> dict[str, Any]:
    return {"encoder_reparameterization_type": kind, "encoder_hidden_size": width}


GRID: dict[str, list[Setting]] = {
    "prompt_tuning": [
        *(Setting(rate) for rate in (0.1, 0.3, 1.0)),
        *(Setting(rate, from_text=True) for rate in (0.3, 1.0)),
    ],
    "p_tuning": [
        *(Setting(rate, _encoder("MLP", 128)) for rate in (3e-3, 1e-2, 2e-2)),
        *(Setting(rate, _encoder("MLP", 512)) for rate in (3e-3, 1e-2)),
        Setting(5e-3, _encoder("LSTM", 128)),
    ],
    "prefix_tuning": [
        *(Setting(rate, _ffn(128)) for rate in (1e-2, 2e-2)),
        Setting(5e-3, _ffn(512)),
        *(Setting(rate, from_text=True) for rate in (0.1, 0.25, 0.5)),
    ],
}


class Bench:
    """One base model with the data, encoded once."""

    def __init__(self, name: str, records: Records) -> None:
        data = assets() / "data" / "e2e"
        self.name = name
        self.path = name if name == EMBEDDED else str(assets() / "models" / name)
        self.files = (str(data / "train.jsonl"), str(data / "dev.jsonl"))
        self.weights = fingerprint(Path(resolve_model(self.path)))
        self.records = records
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.path)
        base = load_base(self.path, self.tokenizer, device="cpu")
        room = min(base.config.max_position_embeddings, self.tokenizer.model_max_length) - TOKENS
        examples = expand(load_examples(self.files[0], template=TEMPLATE, limit=TRAIN_ROWS))
        self.texts = [example.input + example.border + example.targets[0] for example in examples]
        self.train = encode_all(examples, self.tokenizer, room)
        held_out = load_examples(self.files[1], template=TEMPLATE)
        pairs = expand(held_out)
        self.pairs = encode_all([pairs[n] for n in spread(len(pairs), LOSS_PAIRS)], self.tokenizer, room)
        self.asked: list[Example] = [held_out[n] for n in spread(len(held_out), BLEU_INPUTS)]

    def base(self) -> PreTrainedModel:
        return load_base(self.path, self.tokenizer, device="cpu")

    def score(self, model: nn.Module, with_bleu: bool) -> dict[str, float]:
        """`loss` in nats per target token and, if wanted, `bleu` and `chrf` of greedy answers."""
        scores = {"loss": round(evaluate_loss(model, self.pairs)["loss"], 4)}
        if with_bleu:
            texts = generate_texts(model, self.tokenizer, self.asked, NEW_TOKENS, batch_size=32)
            found = score_texts(texts, [example.targets for example in self.asked])
            scores |= {name: round(value, 2) for name, value in found.items()}
        return scores

    def record(self, scores: dict[str, float], **what: Any) -> None:
        self.records.add({"model": self.name, "weights": self.weights, **what, **scores})

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return self.records.find(model=self.name, weights=self.weights, **wanted)

    # ---- the arms ------------------------------------------------------------------------------------------------

    def frozen(self) -> None:
        if not self.find(arm="frozen"):
            self.record(self.score(self.base(), with_bleu=True), arm="frozen")

    def ours(self, method: str, seed: int, steps: int) -> None:
        """What `softprompt train` does when told the model, the data, the method and the seed, and nothing else."""
        key = {"arm": "ours", "method": method, "seed": seed, "steps": steps, "setting": describe_default(method)}
        if self.find(**key):
            return
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(model=self.path, method=method, train=self.files[0], template=TEMPLATE, seed=seed,
                            steps=steps, train_limit=TRAIN_ROWS, out=f"{folder}/run", samples=1)  # fmt: skip
            result = train(recipe)
            model = SoftPromptModel.from_pretrained(self.base(), result.folder)
            scores = self.score(model, with_bleu=True)
        seconds = round(result.seconds, 1)
        self.record(scores, **key, parameters=result.trainable_parameters, seconds=seconds)

    def peft(self, arm: str, method: str, setting: Setting, seed: int, steps: int) -> float:
        """Train with PEFT, save, score; returns the held-out loss. `arm` "grid" scores no texts."""
        key = {"arm": arm, "method": method, "seed": seed, "steps": steps, "setting": str(setting)}
        for row in self.find(**key):
            return row["loss"]
        model = peft_model(method, setting, self, seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        begun = time.perf_counter()
        self._fit(model, trained, setting.rate, seed, steps)
        seconds = time.perf_counter() - begun
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = SoftPromptModel.from_pretrained(self.base(), folder)
        self._check_same_loss(model, saved)
        scores = self.score(saved, with_bleu=arm != "grid")
        count = sum(p.numel() for p in trained)
        self.record(scores, **key, parameters=count, seconds=round(seconds, 1))
        return scores["loss"]

    def _fit(self, model: Any, trained: list[nn.Parameter], rate: float, seed: int, steps: int) -> None:
        """The loop of `softprompt train`, with PEFT's model in it."""
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        order = BatchOrder([len(row.input_ids) for row in self.train], BATCH, seed)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, steps, WARMUP, "linear")
            batch = collate([self.train[n] for n in order[step]], pad_id(self.tokenizer))
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _check_same_loss(self, theirs: Any, ours: SoftPromptModel) -> None:
        rows: list[Encoded] = self.pairs[:8]
        batch = collate(rows, pad_id(self.tokenizer))
        with torch.no_grad():
            losses = [float(model.eval()(**batch).loss) for model in (theirs, ours)]
        if abs(losses[0] - losses[1]) > 1e-3 * max(1.0, losses[0]):
            raise SystemExit(f"PEFT's loss is {losses[0]}, the same prompt's here {losses[1]}: not a fair comparison")

    def best(self, method: str, wanted: argparse.Namespace) -> Setting:
        """PEFT's best setting: the candidates for few steps, then the best of them for all steps."""
        short = {s: self.peft("grid", method, s, 0, wanted.grid_steps) for s in self._candidates(method, wanted.like)}
        finalists = sorted(short, key=lambda s: short[s])[: wanted.finalists]
        return min(finalists, key=lambda s: self.peft("best", method, s, 0, wanted.steps))

    def _candidates(self, method: str, like: str | None) -> list[Setting]:
        """The whole grid, or the `CANDIDATES` of it that were best on another model."""
        if like is None:
            return GRID[method]
        losses = {row["setting"]: row["loss"] for row in self.records.find(model=like, arm="grid", method=method)}
        return sorted(GRID[method], key=lambda s: losses.get(str(s), float("inf")))[:CANDIDATES]


def peft_model(method: str, setting: Setting, bench: Bench, seed: int) -> Any:
    """A PEFT model with its prompt initialised; the text is the one our own default starts from."""
    import peft

    classes: dict[str, Any] = {
        "prompt_tuning": peft.PromptTuningConfig,
        "p_tuning": peft.PromptEncoderConfig,
        "prefix_tuning": peft.PrefixTuningConfig,
    }
    text = starting_text(bench.texts, bench.tokenizer, TOKENS, seed)
    options = dict(setting.options)
    if setting.from_text and method == "prompt_tuning":
        options |= {
            "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text,
            "tokenizer_name_or_path": resolve_model(bench.path),
        }  # fmt: skip
    torch.manual_seed(seed)
    config = classes[method](task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **options)
    model = peft.get_peft_model(bench.base(), config)
    if setting.from_text and method == "prefix_tuning":
        peft.initialize_kv_prefix_from_text(model, bench.tokenizer, text=text, use_chat_template=False)
    return (
        model.eval()
    )  # no dropout in either library: the prompts have none by default and the base models none at all


@cache
def describe_default(method: str) -> str:
    """Our default setting in a few words."""
    default = defaults_for(method, "CAUSAL_LM")
    options = {name: value for name, value in default.method_options.items() if value is not False}
    return f"from {default.init}, {default.optimizer}, {Setting(default.learning_rate, options)}"


def run(bench: Bench, wanted: argparse.Namespace) -> None:
    """Run what is missing, seed by seed, so that a run that is stopped has something of everything."""
    bench.frozen()
    parts, steps = wanted.parts.split(","), wanted.steps
    for seed in range(wanted.seeds):
        for method in wanted.methods.split(","):
            if "ours" in parts:
                bench.ours(method, seed, steps)
            if "default" in parts:
                bench.peft("default", method, PEFT_DEFAULTS[method], seed, steps)
            if "best" in parts:
                bench.peft("best", method, bench.best(method, wanted), seed, steps)


# ---- the table -------------------------------------------------------------------------------------------------------


def write_table(records: Records) -> str:
    """Write benchmarks/results/e2e.md from the records; the newest weights of a model count."""
    parts = []
    for name in dict.fromkeys(row["model"] for row in records.rows):
        weights = records.find(model=name)[-1]["weights"]
        parts.append(_of_model(name, records.find(model=name, weights=weights)))
    text = "\n".join(parts) + "\n" + _footer()
    (RESULTS / "e2e.md").write_text(text, encoding="utf-8")
    return text


def _of_model(name: str, rows: list[dict[str, Any]]) -> str:
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in (*ARMS, "frozen", "grid")}
    lines = [["frozen model", "–", "–", "–", f"{row['loss']:.3f}", f"{row['bleu']:.1f}"] for row in arms["frozen"][-1:]]
    for method in METHODS:
        for arm in ARMS:
            pool = arms[arm] + (arms["default"] if arm == "best" else [])  # PEFT's defaults may be its best
            found = [row for row in pool if row["method"] == method]
            if found:
                lines.append(_line(method, arm, _of_one_setting(found, arm)))
    grid = {(row["method"], row["setting"]) for row in arms["grid"]}
    short = max((row["steps"] for row in arms["grid"]), default=0)
    steps = max((row["steps"] for row in arms["ours"] + arms["default"]), default=0)
    head = (
        f"**{name}**, {steps} steps of {BATCH} pairs, {TOKENS} virtual tokens. PEFT's best was looked for among "
        f"{len(grid)} settings of the three methods ({short} steps each, then the best for all steps).\n\n"
    )
    return head + table(["method", "trained by", "setting", "trained parameters", "loss", "BLEU"], lines)


def _of_one_setting(rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """Of PEFT's settings with the most seeds the rows of the one with the lowest mean loss; elsewhere of the newest."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault(f"{row['setting']} {row['steps']}", []).append(row)
    if arm != "best":
        return list(settings.values())[-1]
    return min(settings.values(), key=lambda found: (-len(found), sum(row["loss"] for row in found) / len(found)))


def _line(method: str, arm: str, rows: list[dict[str, Any]]) -> list[str]:
    loss, bleu = (spread_of([row[name] for row in rows], digits) for name, digits in (("loss", 3), ("bleu", 1)))
    strong = "**" if arm == "ours" else ""
    seeds = f" ({len(rows)} seed{'s' * (len(rows) > 1)})"
    cells = [f"`{method}`", ARMS[arm] + seeds, rows[0]["setting"], f"{rows[0]['parameters']:,}"]
    return [*cells, f"{strong}{loss}{strong}", f"{strong}{bleu}{strong}"]


def _footer() -> str:
    return (
        f"Loss in nats per target token ({LOSS_PAIRS} dev pairs); BLEU by sacrebleu with all references ({BLEU_INPUTS} "
        f"dev inputs, greedy, at most {NEW_TOKENS} new tokens); mean ± standard deviation over the seeds. The same "
        f"examples in the same order, batch size, steps, warm-up, decay and clipping for both, float32; PEFT's prompts "
        f"are trained with AdamW. {machine()}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help=f"{EMBEDDED}, or a folder in assets/models; may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--grid-steps", type=int, default=100, help="steps of each setting of PEFT's grid")
    parser.add_argument("--finalists", type=int, default=2, help="settings of the grid that get all steps")
    parser.add_argument("--like", help="try only the settings of the grid that were best on this model")
    parser.add_argument("--parts", default="ours,default,best", help="which arms to run, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="which methods to run, separated by commas")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = Records(RESULTS / "e2e.json")
    for name in [] if arguments.table else arguments.model or ["stories260K", EMBEDDED]:
        run(Bench(name, records), arguments)
    print(write_table(records))


if __name__ == "__main__":
    main()
