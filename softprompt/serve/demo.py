"""The server's demo: ``python -m softprompt.serve.demo`` trains three prompts for the embedded model and serves them.

It needs no network and no GPU. Prompts that an earlier demo trained are used again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from softprompt.checkpoint import WEIGHTS_NAME
from softprompt.demo_data import HELD_OUT, TRAIN
from softprompt.embedded import PATH
from softprompt.errors import SoftPromptError
from softprompt.recipe import Recipe
from softprompt.serve import ServeOptions, serve
from softprompt.train import train

BASE = "base"
Row = dict[str, str]


@dataclass(frozen=True)
class DemoPrompt:
    """A task made of the demo's cards: what a row of theirs becomes."""

    name: str
    method: str
    row: Callable[[str, str], Row]


DEMO_PROMPTS = (
    DemoPrompt("describe", "prefix_tuning", lambda card, text: {"in": card, "out": text}),
    DemoPrompt("card", "prefix_tuning", lambda card, text: {"in": text, "out": card}),
    DemoPrompt("title", "prompt_tuning", lambda card, text: {"in": card, "out": card.split(" | ")[0].split(": ")[1]}),
)
TEMPLATE = "{in} => {out}"


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, print how to ask, and serve; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m softprompt.serve.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/serve-demo"), help="folder (default: runs/serve-demo)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each prompt (default: 60)")
    parser.add_argument("--port", type=int, default=8000, help="port of the server (default: 8000)")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        for prompt in DEMO_PROMPTS:
            train_prompt(prompt, options.out, options.steps, console)
        print_requests(console, options.port)
        serve(ServeOptions(str(PATH), options.out / "prompts", engine="transformers", port=options.port, name=BASE))
    except SoftPromptError as error:
        Console(stderr=True).print(f"demo: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def train_prompt(prompt: DemoPrompt, out: Path, steps: int, console: Console) -> None:
    """A run in `out`/prompts/NAME, unless there is a prompt."""
    run = out / "prompts" / prompt.name
    if (run / WEIGHTS_NAME).is_file():
        return
    files = {name: _write(prompt, path, out / f"{prompt.name}-{name}.jsonl") for name, path in _PARTS.items()}
    console.print(f"\n[bold]Training {escape(prompt.name)}[/bold] ({prompt.method})\n")
    train(
        Recipe(
            train=str(files["train"]), eval=str(files["eval"]), template=TEMPLATE, method=prompt.method,
            out=str(run), steps=steps,
        ),
        resume=run.exists(),
        console=console,
    )  # fmt: skip


_PARTS = {"train": TRAIN, "eval": HELD_OUT}


def _write(prompt: DemoPrompt, source: Path, target: Path) -> Path:
    """The rows of a task; a card with several wordings gives its first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["data"], row["text"] if isinstance(row["text"], str) else row["text"][0]) for row in rows]
    target.write_text("".join(json.dumps(prompt.row(*pair)) + "\n" for pair in pairs), encoding="utf-8")
    return target


def print_requests(console: Console, port: int) -> None:
    """A curl line for each prompt."""
    card = json.loads(HELD_OUT.read_text(encoding="utf-8").splitlines()[0])
    console.print("\n[bold]Ask, from another terminal[/bold] (the page is at the address itself)\n")
    for prompt in DEMO_PROMPTS:
        text = prompt.row(card["data"], card["text"][0])["in"]
        body = json.dumps({"model": prompt.name, "prompt": f"{text} =>", "max_tokens": 40, "temperature": 0})
        console.print(
            f"curl http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json' -d '{body}'\n",
            markup=False,
        )


if __name__ == "__main__":
    raise SystemExit(main())
