"""``report.html``: one self-contained page about a run, made from the files in its folder and nothing else.

Everything that came from data or settings is escaped; the page loads nothing and runs no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from softprompt.errors import CheckpointError
from softprompt.recipe import EMBEDDED, Recipe
from softprompt.report.charts import Series, line_chart, smooth
from softprompt.train.run_folder import RECIPE, REPORT, SAMPLES, SUMMARY, RunFolder

TEMPLATE = "report.html.j2"


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run's folder (again, if it is there); returns its path.

    Raises ``ConfigError`` when the folder holds no run, ``CheckpointError`` when one of its files cannot be read.
    """
    run = RunFolder.reopen(folder)
    return run.write_text(REPORT, render(run))


def render(run: RunFolder) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

    recipe = Recipe.from_yaml(run.path / RECIPE)
    summary, samples, rows = run.read_json(SUMMARY), run.read_json(SAMPLES), run.metrics()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    try:
        return environment.get_template(TEMPLATE).render(
            recipe=recipe.to_dict(),
            summary=summary,
            samples=samples,
            tiles=tiles(recipe, summary),
            charts=charts(rows, summary),
            settings=settings(recipe),
            base=base_words(recipe.model),
            visible=visible,
        )
    except (KeyError, TypeError, UndefinedError) as error:
        raise CheckpointError(f"{run.path / SUMMARY} lacks what a report needs ({error}); train again") from None


def base_words(model: str) -> str:
    """How the page calls the base model: a folder by its own name, a hub name in full."""
    if model == EMBEDDED:
        return "the embedded model"
    return f"the model {Path(model).name if Path(model).is_dir() else model}"


def visible(token: str) -> str:
    """A token's text with what cannot be seen made visible: a line break as ⏎, blanks alone as ␣."""
    shown = token.replace("\n", "⏎").strip(" ")
    return shown if shown.strip() else "␣"


def tiles(recipe: Recipe, summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers that are read first: a value, what it is, and a remark."""
    found = []
    best, start, frozen = summary["best"], summary["start"], summary["frozen"]
    if "accuracy" in best:
        found.append(_tile(f"{best['accuracy']:.1%}", "held-out accuracy", f"{start['accuracy']:.1%} before training"))
    if "p_at_1" in best:
        found.append(_tile(f"{best['p_at_1']:.1%}", "held-out P@1", f"{start['p_at_1']:.1%} before training"))
    if best:
        before = f"{frozen['loss']:.3f} by the frozen model" if frozen else f"{start['loss']:.3f} before training"
        found.append(_tile(f"{best['loss']:.3f}", "held-out loss", before))
    if "perplexity" in best:
        remark = f"{_number(frozen['perplexity'])} by the frozen model" if frozen else "per target token"
        found.append(_tile(_number(best["perplexity"]), "held-out perplexity", remark))
    share = summary["saved_parameters"] / max(1, summary["base_parameters"])
    found.append(_tile(f"{summary['saved_parameters']:,}", "parameters saved", f"{share:.2%} of the frozen model's"))
    speed = f"{summary['tokens_per_s']:,.0f} tokens/s"
    found.append(_tile(_duration(summary["seconds"]), "of training", f"{summary['steps']:,} steps, {speed}"))
    return found


def charts(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The curves that the metrics hold: a title, a legend and the drawing."""
    loss = _points(rows, "loss")
    steps = [row["step"] for row in rows]
    lines = [
        Series("training loss", smooth(loss), "train"),
        Series("held-out loss", _points(rows, "eval_loss"), "eval"),
    ]
    if summary["frozen"] and steps:
        level = summary["frozen"]["loss"]
        lines.append(Series("frozen model", [(min(steps), level), (max(steps), level)], "base"))
    wanted = [
        ("Loss", lines),
        ("Held-out accuracy", [Series("accuracy", _points(rows, "eval_accuracy"), "eval")]),
        ("Held-out P@1", [Series("P@1", _points(rows, "eval_p_at_1"), "eval")]),
        ("Learning rate", [Series("learning rate", _points(rows, "lr"), "train")]),
        ("Gradient norm", [Series("gradient norm", smooth(_points(rows, "grad_norm"), 0.02), "train")]),
        ("Tokens per second", [Series("tokens per second", smooth(_points(rows, "tokens_per_s")), "train")]),
    ]
    drawn = []
    for title, series in wanted:
        picture: Markup = line_chart(series, f"{title} by step")
        if picture:
            legend = [{"name": s.name, "kind": s.kind} for s in series if s.points] if len(series) > 1 else []
            drawn.append({"title": title, "picture": picture, "legend": legend})
    return drawn


def settings(recipe: Recipe) -> list[tuple[str, str]]:
    """The recipe as rows of name and value, the method's options among them."""
    rows = []
    for name, value in recipe.to_dict().items():
        if isinstance(value, dict):
            rows += [(f"{name}.{key}", _plain(inner)) for key, inner in value.items()]
        else:
            rows.append((name, _plain(value)))
    return rows


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _tile(value: str, name: str, remark: str) -> dict[str, str]:
    return {"value": value, "name": name, "remark": remark}


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
