"""What a sweep came to: ``sweep.json``, the table ``sweep.md`` and the page ``sweep.html``, all from the study."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.sweep import NAMES
from softprompt.sweep.plan import Plan
from softprompt.sweep.study import ATTEMPTS, Tried, tried
from softprompt.train.run_folder import RunFolder

if TYPE_CHECKING:
    from optuna import Study

JSON, TABLE, PAGE = "sweep.json", "sweep.md", "sweep.html"
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
MEANS = ("trainable_parameters", "saved_parameters", "seconds", "tokens")

Results = dict[str, Any]


def write_results(plan: Plan, study: Study) -> Results:
    """Write all three; the caller holds the sweep's lock, so that the last one to write knows everything."""
    results = read_results(plan, study)
    folder = RunFolder(plan.folder)
    folder.write_json(JSON, results)
    folder.write_text(TABLE, markdown(results))
    folder.write_text(PAGE, page(results))
    return results


def read_results(plan: Plan, study: Study) -> Results:
    """Every setting once, the best first; those without a value come last."""
    rows = [_row(plan, entry) for entry in tried(study, plan.space).values()]
    sign = 1 if plan.direction == "minimize" else -1
    rows.sort(key=lambda row: (row["mean"] is None, sign * (row["mean"] or 0.0), row["setting"]))
    finished = [row for row in rows if row["state"] == "finished"]
    return {
        "metric": plan.metric,
        "direction": plan.direction,
        "sampler": plan.sampler,
        "trials": plan.trials,
        "varied": plan.space.fields(),
        **plan.definition(),
        "settings": rows,
        "best": _best(plan, finished[0], sign) if finished else None,
    }


def _row(plan: Plan, entry: Tried) -> dict[str, Any]:
    """One setting: the mean of its runs, and their sample deviation where there are several."""
    trial = entry.counts or entry.first
    state = STATES[trial.state.name] if entry.counts else "killed" if entry.kills else "stopped"
    runs = trial.user_attrs.get("runs", []) if state == "finished" else []
    scores = [run["score"] for run in runs]
    why = trial.user_attrs.get("reason")
    if state == "stopped":
        why = "the next command goes on with it"
    if state == "killed":
        again = "it is run again by the next command" if entry.kills < ATTEMPTS else "it may need too much memory"
        why = f"its worker was killed ({entry.kills} of {ATTEMPTS} times); {again}"
    return {
        "setting": trial.user_attrs.get("folder", f"{entry.first.number:04d}"),
        "state": state,
        "values": plan.space.settings(trial.params),
        "mean": statistics.fmean(scores) if scores else None,
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        **{name: statistics.fmean(run[name] for run in runs) if runs else None for name in MEANS},
        "reason": why,
        "runs": runs,
    }


def _best(plan: Plan, row: dict[str, Any], sign: int) -> dict[str, Any]:
    """The best setting, and of its runs the best prompt."""
    run = min(row["runs"], key=lambda each: sign * each["score"])
    folder = str(plan.folder / run["folder"])
    return {"setting": row["setting"], "seed": run["seed"], "folder": folder, "command": run["command"]}


def line_of(results: Results, setting: str) -> str:
    """One setting in one line, as a worker says it when it is done with it."""
    row = next((row for row in results["settings"] if row["setting"] == setting), None)
    if row is None:
        return f"{setting}: given to another worker"
    outcome = f"{results['metric']} {quality(row)}" if row["mean"] is not None else f"{row['state']}: {row['reason']}"
    done = sum(each["state"] != "running" for each in results["settings"])
    return f"{setting} ({done} of {results['trials']})  {values_of(row)}  {outcome}"


def values_of(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_plain(value)}" for name, value in row["values"].items())


def quality(row: dict[str, Any]) -> str:
    """Mean ± deviation."""
    if row["mean"] is None:
        return "–"
    return f"{row['mean']:.4g}" + (f" ± {row['deviation']:.2g}" if row["deviation"] is not None else "")


def header(results: Results) -> list[str]:
    names = [name.removeprefix("method_options.") for name in results["varied"]]
    return ["setting", *names, NAMES[results["metric"]], "trained parameters", "seconds", "tokens"]


def cells(results: Results, row: dict[str, Any]) -> list[str]:
    """A setting's row of the table."""
    values = [_plain(row["values"].get(name)) for name in results["varied"]]
    if row["mean"] is None:
        return [row["setting"], *values, row["state"], "–", "–", "–"]
    counts = [f"{row['trainable_parameters']:,.0f}", f"{row['seconds']:,.1f}", f"{row['tokens']:,.0f}"]
    return [row["setting"], *values, quality(row), *counts]


def footnote(results: Results) -> str:
    """What the table's numbers are."""
    seeds = results["sweep"]["seed"]
    better = "lower" if results["direction"] == "minimize" else "higher"
    repeats = f"mean ± sample deviation over the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    return (
        f"The best setting first: {better} is better. Scores: {repeats}. Seconds and tokens: of training, per run, "
        "without evaluation."
    )


def markdown(results: Results) -> str:
    """The table, what failed and why, and how to use the best prompt."""
    lines = [f"# Sweep: {NAMES[results['metric']]}", "", footnote(results), ""]
    titles = header(results)
    lines += [_md(titles), _md(["---"] * len(titles))]
    lines += [_md(cells(results, row)) for row in results["settings"]]
    reasons = [f"- {row['setting']} {row['state']}: {row['reason']}" for row in results["settings"] if row["reason"]]
    if reasons:
        lines += ["", "## Without a score", "", *reasons]
    if results["best"]:
        best = results["best"]
        lines += ["", "## The best prompt", "", f"In `{best['folder']}`:", "", "```", best["command"], "```"]
    return "\n".join(lines) + "\n"


def page(results: Results) -> str:
    """The page: quality against parameters and against cost, and the table."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    import softprompt.report as report

    folders = [Path(__file__).parent, Path(report.__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("sweep.html.j2").render(
        results=results,
        name=NAMES[results["metric"]],
        charts=charts(results),
        methods=_methods(results),
        titles=header(results),
        rows=[(row, cells(results, row)) for row in results["settings"]],
        footnote=footnote(results),
    )


def charts(results: Results) -> list[dict[str, Any]]:
    """Every finished setting as a dot, over each of the costs in which they differ."""
    from softprompt.report.charts import Dot, scatter_chart

    methods = _methods(results)
    finished = [row for row in results["settings"] if row["state"] == "finished"]
    wanted = {
        "trainable_parameters": "trained parameters",
        "tokens": "tokens trained on",
        "seconds": "training seconds",
    }
    drawn = []
    for field, words in wanted.items():
        dots = [
            Dot(
                row[field],
                row["mean"],
                row["deviation"] or 0.0,
                methods.index(_method(results, row)),
                _tip(results, row),
            )
            for row in finished
        ]
        if len(dots) > 1 and len({dot.x for dot in dots}) == 1:
            continue
        title = f"{NAMES[results['metric']].capitalize()} by {words}"
        drawn.append({"title": title, "picture": scatter_chart(dots, title)})
    return [chart for chart in drawn if chart["picture"]]


def _methods(results: Results) -> list[str]:
    return list(dict.fromkeys(_method(results, row) for row in sorted(results["settings"], key=lambda r: r["setting"])))


def _method(results: Results, row: dict[str, Any]) -> str:
    return row["values"].get("method") or results["recipe"].get("method") or "auto"


def _tip(results: Results, row: dict[str, Any]) -> str:
    return f"{row['setting']}: {results['metric']} {quality(row)} ({values_of(row) or 'as in the recipe'})"


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _md(row: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
