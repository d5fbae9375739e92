"""The demo: ``python -m softprompt.demo`` trains a prefix on the embedded model, loads it in a new process and uses it.

It needs no network and no GPU and takes a few minutes on two cores. Run again, it replaces its own earlier run and
nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from softprompt.demo_data import HELD_OUT, TEMPLATE, TRAIN
from softprompt.errors import SoftPromptError, TrainingError
from softprompt.recipe import Recipe
from softprompt.train import RunResult, train
from softprompt.train.run_folder import RECIPE, SAMPLES, remove_run

CONTENTS = {
    "adapter_model.safetensors": "the prompt; PEFT reads it too",
    "adapter_config.json": "what kind of prompt it is",
    "recipe.yaml": "every setting of the run",
    "metrics.jsonl": "loss, learning rate and speed of every step",
    "report.html": "curves and samples; open it in a browser",
    "checkpoint": "what --resume needs",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m softprompt.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="runs/demo", help="folder of the run (default: runs/demo)")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of the default")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=False, highlight=False)
    try:
        run_demo(Path(options.out), options.steps, console)
    except SoftPromptError as error:
        Console(stderr=True).print(f"demo: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def run_demo(out: Path, steps: int | None, console: Console) -> None:
    """Train, show, load in a new process, and say where everything is."""
    _replace_own_run(out)
    recipe = Recipe(train=str(TRAIN), eval=str(HELD_OUT), template=TEMPLATE, out=str(out), steps=steps)
    _heading(console, "1. Train a prefix on the frozen embedded model")
    result = train(recipe, console=console)
    _print_training(console, result)
    samples = json.loads((out / SAMPLES).read_text(encoding="utf-8"))
    _heading(console, "2. Cards it has never seen, before and after")
    for sample in samples[:3]:
        _print_sample(console, sample)
    _heading(console, "3. The saved prompt, loaded in a new process")
    _use_in_new_process(console, out, samples[0])
    _heading(console, "4. What is where")
    _print_contents(console, out)
    _heading(console, "5. What to type next")
    _print_next(console, out, samples[1]["input"])


def _replace_own_run(out: Path) -> None:
    """Remove an earlier run of the demo; any other folder is left for ``train`` to refuse."""
    if not (out / RECIPE).is_file():
        return
    earlier = Recipe.from_yaml(out / RECIPE)
    if Path(earlier.train).parts[-2:] == TRAIN.parts[-2:]:
        remove_run(out)


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{escape(text)}[/bold]\n")


def _print_training(console: Console, result: RunResult) -> None:
    table = Table("on held-out cards", "frozen model", "untrained prompt", "trained prompt")
    for name, words in (("loss", "loss (nats per token)"), ("perplexity", "perplexity")):
        cells = [f"{scores[name]:,.2f}" for scores in (result.frozen, result.start, result.best)]
        table.add_row(words, *cells)
    console.print()
    console.print(table)
    console.print(
        f"{result.steps} steps in {result.seconds:.0f} s; {result.base_parameters:,} frozen parameters, "
        f"{result.trainable_parameters:,} trained"
    )


def _print_sample(console: Console, sample: dict[str, Any]) -> None:
    console.print(escape(sample["input"]), style="bold")
    rows = {"reference": sample["references"][0], "frozen": sample["before"], "with prompt": sample["after"]}
    for name, text in rows.items():
        shown = " ".join(text.split()) or "(nothing)"
        line = Table.grid(padding=(0, 2))
        line.add_column(width=11, style="dim")
        line.add_column(ratio=1)
        line.add_row(name, escape(shown))
        console.print(Padding(line, (0, 0, 0, 2)))
    console.print()


def _use_in_new_process(console: Console, out: Path, sample: dict[str, Any]) -> None:
    """Generate and measure through the command line; the answer must be the one that training ended with."""
    card = _card(sample["input"])
    generate = ["generate", "--prompt", str(out), "--input", card]
    answer = _softprompt(console, generate, f"softprompt generate --prompt {out} --input {shlex.quote(card)}")
    console.print(escape(answer), soft_wrap=True)
    if " ".join(answer.split()) != " ".join(sample["after"].split()):
        raise TrainingError(f"the prompt in {out} answers {answer!r} in a new process, not {sample['after']!r}")
    evaluate = ["eval", "--prompt", str(out), "--eval", str(HELD_OUT), "--json"]
    scores = json.loads(_softprompt(console, evaluate, f"softprompt eval --prompt {out} --eval {HELD_OUT.name}"))
    table = Table("on all held-out cards", "frozen model", "with the prompt")
    for name, words in (("loss", "loss"), ("bleu", "BLEU, all references"), ("chrf", "chrF")):
        table.add_row(words, *(f"{scores[model][name]:.2f}" for model in ("frozen", "prompt")))
    console.print(table)


def _card(text: str) -> str:
    """A sample's input without the template's separator, which the command line adds again."""
    return text.removesuffix(TEMPLATE.split("}", 1)[1].split("{", 1)[0].rstrip()).rstrip()


def _softprompt(console: Console, arguments: list[str], shown: str) -> str:
    """Standard output of a ``softprompt`` command in a process of its own."""
    console.print(f"$ {escape(shown)}", soft_wrap=True)
    code = "import sys; from softprompt.cli import main; sys.exit(main())"
    places = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(places)},  # also from a plain checkout
        check=False,
    )
    if done.returncode:
        raise TrainingError(f"`softprompt {arguments[0]}` failed in a new process: {done.stderr.strip()}")
    return done.stdout.strip()


def _print_contents(console: Console, out: Path) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, words in CONTENTS.items():
        table.add_row(escape(name), _size(out / name), words)
    console.print(f"In {escape(str(out))}:")
    console.print(table)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return f"{max(1, round(sum(item.stat().st_size for item in files) / 1024)):,} KiB"


def _print_next(console: Console, out: Path, text: str) -> None:
    program = _program()
    commands = (
        f"{program} generate --prompt {out} --input {shlex.quote(_card(text))}",
        f"{program} show {out}",
        f"{program} methods",
        f"{program} train --train MINE.jsonl --template '{{question}} => {{answer}}' --out runs/mine",
    )
    for command in commands:
        console.print(f"  {escape(command)}", soft_wrap=True)


def _program() -> str:
    """``softprompt`` if the shell finds it, else its path in this environment as seen from here."""
    beside = Path(sys.executable).parent / "softprompt"
    if shutil.which("softprompt") or not beside.exists() or not beside.is_relative_to(Path.cwd()):
        return "softprompt"
    return str(beside.relative_to(Path.cwd()))


if __name__ == "__main__":
    sys.exit(main())
