"""What the commands print: tables and short reports. Nothing here decides or computes."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from softprompt.cli.flags import method_flags
from softprompt.inspect_prompt import PromptFacts, summary
from softprompt.methods import METHODS

if TYPE_CHECKING:
    from softprompt.together.compare import Comparison
    from softprompt.train import RunResult

FORMATS = {
    "loss": ".3f",
    "perplexity": ".1f",
    "accuracy": ".2%",
    "p_at_1": ".2%",
    "majority": ".2%",
    "bleu": ".1f",
    "chrf": ".1f",
}
NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "tokens": "target tokens",
    "p_at_1": "P@1",
    "majority": "commonest answer",
    "outside": "rows whose answer is no candidate",
    "cut": "rows that were cut to fit",
}


def print_result(console: Console, result: "RunResult") -> None:
    """Scores before and after, where everything is, and what to type next."""
    from softprompt.train.finish import generate_command

    columns = {"frozen": result.frozen, "before training": result.start, "prompt": result.best}
    print_scores(console, {name: scores for name, scores in columns.items() if scores})
    console.print(f"{result.steps} steps in {result.seconds:.0f} s; kept: the prompt of step {result.best_step}")
    console.print(f"Prompt and report: {escape(str(result.folder))}/ (report.html)", soft_wrap=True)
    console.print(f"Next: {escape(generate_command(result.recipe))}", soft_wrap=True, highlight=False)


def print_scores(console: Console, scores: Mapping[str, Mapping[str, float]]) -> None:
    """One row per metric, one column per model."""
    if not scores:
        return
    titles = {"frozen": "frozen model", "prompt": "with the prompt"}
    table = Table("metric", *[titles.get(name, name) for name in scores])
    metrics = dict.fromkeys(metric for column in scores.values() for metric in column)
    names = {
        **NAMES,
        "loss": "loss (nats per row)" if {"accuracy", "p_at_1"} & set(metrics) else "loss (nats per token)",
    }
    for metric in metrics:
        cells = [_cell(metric, column.get(metric)) for column in scores.values()]
        table.add_row(names.get(metric, metric), *cells)
    console.print(table)


def _cell(metric: str, value: float | None) -> str:
    kind = "loss" if metric.startswith("loss_") else metric  # the loss of one task of several
    return "–" if value is None else format(value, FORMATS.get(kind, ",.0f"))


def print_facts(console: Console, prompt: Path, facts: PromptFacts, note: str = "") -> None:
    """The page of `softprompt show`."""
    table = Table("what", Column("value", overflow="fold"), show_header=False, title=escape(str(prompt)))
    rows = {
        "method": facts.method,
        "task": facts.task or "–",
        "tasks": ", ".join(facts.several),
        "base model": facts.base_model or "–",
        "virtual tokens": str(facts.virtual_tokens),
        "template": facts.template or "",
        "shape": " × ".join(map(str, facts.shape)),
        "parameters": f"{facts.parameters:,}",
        "of a task head": f"{facts.head_parameters:,}" if facts.head_parameters else "",
        "on disk": f"{facts.bytes:,} bytes",
        "norm of a virtual token": summary(facts.token_norms),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    console.print(table)
    if facts.layers:
        _print_layers(console, facts)
    if facts.nearest:
        _print_nearest(console, facts)
    if note:
        console.print(note, soft_wrap=True)


def _print_layers(console: Console, facts: PromptFacts) -> None:
    table = Table("layer", "mean key norm", "mean value norm")
    for number, layer in enumerate(facts.layers):
        table.add_row(str(number), f"{layer.key:.3f}", f"{layer.value:.3f}")
    console.print(table)


def _print_nearest(console: Console, facts: PromptFacts) -> None:
    table = Table("virtual token", "norm", "nearest tokens (cosine)")
    for number, (norm, tokens) in enumerate(zip(facts.token_norms, facts.nearest, strict=True)):
        table.add_row(str(number), f"{norm:.3f}", escape("  ".join(f"{token!r} {cos:.2f}" for token, cos in tokens)))
    console.print(table)


def print_comparison(console: Console, comparison: "Comparison") -> None:
    """The matrix of `softprompt compare`, with a remark where the prompts may not belong to one base model."""
    names = _short(comparison.names)
    table = Table("", *(escape(name) for name in names))
    for name, row in zip(names, comparison.similarity, strict=True):
        table.add_row(escape(name), *(f"{value:.3f}" for value in row))
    console.print(table)
    bases = sorted({base for base in comparison.base_models if base})
    if len(bases) > 1:
        console.print(f"Note: these prompts name different base models: {escape(', '.join(bases))}", soft_wrap=True)


def _short(names: list[str]) -> list[str]:
    """The last part of each path, where those are all different."""
    last = [Path(name).name for name in names]
    return last if len(set(last)) == len(names) else names


def print_methods(console: Console) -> None:
    """The registry as a list: wide enough for whole addresses and flags on any terminal."""
    for name, method in sorted(METHODS.items()):
        document = (sys.modules[method.__module__].__doc__ or "").strip().splitlines() or [""]
        console.print(f"[bold]{name}[/bold]  {escape(document[0])}", soft_wrap=True)
        console.print(f"    flags: --num-virtual-tokens {' '.join(method_flags(name))}", soft_wrap=True)
