"""One recipe with several seeds, measured on a test set: a line of a table with mean and standard deviation.

    python examples/repeat.py RECIPE.yaml --train train.jsonl --eval dev32.jsonl --test val.jsonl [name=value ...]

Further settings of the recipe follow as `name=value`. Every seed's run is kept under --out.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from softprompt.cli.prompted import open_prompted
from softprompt.cli.use import EvalSettings, measure
from softprompt.recipe import Recipe, read_yaml
from softprompt.train import train
from softprompt.train.run_folder import SUMMARY, remove_run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True, help="chooses the step that is kept")
    parser.add_argument("--test", required=True, help="is measured once per seed")
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="runs")
    parser.add_argument("settings", nargs="*", help="name=value")
    given = parser.parse_intermixed_args(arguments)
    settings = dict(setting.split("=", 1) for setting in given.settings)
    values = {**read_yaml(given.recipe), **{name: yaml.safe_load(value) for name, value in settings.items()}}
    found = []
    for seed in range(given.seeds):
        name = "-".join([Path(given.recipe).stem, *settings.values(), f"seed{seed}"])
        out = Path(given.out) / name.replace("/", "_")
        found.append(one_seed({**values, "train": given.train, "eval": given.eval, "seed": seed}, out, given))
    print(row(values, found))


def one_seed(values: dict[str, Any], out: Path, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train, unless the run is there already, and measure; scores by the names `frozen` and `prompt`."""
    if not (out / SUMMARY).is_file():
        remove_run(out)
        train(Recipe.from_dict({**values, "out": str(out)}), console=Console(quiet=True))
    settings = EvalSettings(given.test, None, None, None, "validation", given.test_limit, 1, 32)
    return measure(lambda: open_prompted(out, None), out, settings, frozen=True)


def row(values: dict[str, Any], found: list[dict[str, dict[str, float]]]) -> str:
    """`| what | rows | commonest answer | frozen | prompt ± deviation |`, shares in percent."""
    name = "accuracy" if "accuracy" in found[0]["prompt"] else "p_at_1"
    shares = [100 * scores["prompt"][name] for scores in found]
    spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
    frozen = f"{100 * found[0]['frozen'][name]:.1f}" if "frozen" in found[0] else "–"
    first = found[0]["prompt"]
    cells = [values.get("only") or values["method"], f"{first['rows']:,.0f}", f"{100 * first['majority']:.1f}", frozen]
    return f"| {' | '.join(cells)} | {statistics.mean(shares):.1f} ± {spread:.1f} |"


if __name__ == "__main__":
    main()
