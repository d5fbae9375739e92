"""`softprompt sweep`: its flags, and what it prints at the end."""

import dataclasses
import inspect
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from softprompt.cli.flags import dataclass_parameters, split_given
from softprompt.sweep import NAMES, SweepOptions


def sweep_parameters() -> list[inspect.Parameter]:
    """One optional flag per field of `SweepOptions`."""
    return dataclass_parameters(SweepOptions, "Sweep")


def sweep(path: str, given: dict[str, Any]) -> None:
    """Run the sweep of a recipe file, with the given flags over it, and print the table."""
    from softprompt.recipe import read_yaml
    from softprompt.sweep.plan import Plan
    from softprompt.sweep.run import run_sweep

    own = {field.name for field in dataclasses.fields(SweepOptions)}
    options = SweepOptions(**{name: given[name] for name in own if given.get(name) is not None})
    settings, of_method = split_given({name: value for name, value in given.items() if name not in own})
    settings |= {f"method_options.{name}": value for name, value in of_method.items()}
    plan = Plan.of(read_yaml(path), options, settings)
    results = run_sweep(plan, options.jobs)
    print_sweep(Console(), results, str(plan.folder))


def print_sweep(console: Console, results: dict[str, Any], folder: str) -> None:
    """The table, where everything is, and what to type next."""
    from softprompt.sweep.results import cells, values_of

    values = Column("values", overflow="fold")
    table = Table("setting", NAMES[results["metric"]], "parameters", "seconds", values, title="the best setting first")
    for row in results["settings"]:
        score, parameters, seconds, _ = cells(results, row)[-4:]
        table.add_row(row["setting"], score, parameters, seconds, escape(values_of(row)))
    console.print(table)
    for row in results["settings"]:
        if row["reason"]:
            console.print(escape(f"{row['setting']} {row['state']}: {row['reason']}"), soft_wrap=True, highlight=False)
    running = sum(row["state"] == "running" for row in results["settings"])
    if running:
        console.print(f"{running} of the settings are still run by other workers")
    console.print(f"Table and page: {escape(folder)}/ (sweep.md, sweep.html)", soft_wrap=True)
    if results["best"]:
        best = results["best"]
        console.print(f"Best prompt: {escape(best['folder'])}", soft_wrap=True, highlight=False)
        console.print(f"Next: {escape(best['command'])}", soft_wrap=True, highlight=False)
