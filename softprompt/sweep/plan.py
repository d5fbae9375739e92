"""The plan of a sweep: the recipe that all runs share, what varies, how much is tried and by what it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.errors import ConfigError
from softprompt.recipe import Recipe
from softprompt.sweep import METRICS, Direction, SweepOptions
from softprompt.sweep.space import OPTION, Settings, Space

TRIALS = 20  # of a space that has no end, unless it is said
EITHER = (("steps", "epochs"), ("epochs", "steps"))


@dataclass(frozen=True)
class Plan:
    """``base`` are the recipe's own values, without ``sweep`` and ``out``; ``trials`` how many settings are tried."""

    folder: Path
    base: Mapping[str, Any]
    space: Space
    metric: str
    sampler: str
    trials: int
    prune: bool

    @classmethod
    def of(cls, values: Mapping[str, Any], options: SweepOptions, given: Mapping[str, Any] | None = None) -> Plan:
        """From the values of a recipe file, and those that the command gives beside it.

        Everything is checked before anything runs, each value of the sweep in a recipe of its own: ``ConfigError``.
        """
        given = given or {}
        base = {name: value for name, value in merged(values, given).items() if name not in ("sweep", "out")}
        recipe = Recipe.from_dict(base)
        space = Space.of(values.get("sweep"), recipe)
        for name in given:
            if name in space.fields() or (name == "seed" and "seed" in values["sweep"]):
                raise ConfigError(f"{name} is given, but the sweep varies it; leave it out, or take it out of `sweep`")
        if not recipe.eval and not recipe.tasks:
            raise ConfigError("a sweep compares by held-out data; give it with `eval: FILE` or --eval FILE")
        out = given.get("out") or values.get("out")
        if not out:
            raise ConfigError("the sweep has no folder; give it with `out: DIR` or --out DIR")
        ranges = space.ranges()
        sampler = options.sampler or ("tpe" if ranges else "grid")
        if sampler == "grid" and ranges:
            raise ConfigError(f"sweep: {ranges[0]} is a range, which has no grid; list its values, or use tpe")
        trials = options.trials or (space.size() if sampler == "grid" else TRIALS)
        trials = trials if ranges else min(trials, space.size())
        plan = cls(Path(out), base, space, options.metric or _metric(recipe), sampler, trials, options.prune)
        plan.check()
        return plan

    @property
    def direction(self) -> Direction:
        return METRICS[self.metric]

    def recipe(self, settings: Settings, seed: int, out: str) -> Recipe:
        """One run of a setting."""
        return Recipe.from_dict({**merged(self.base, settings), "seed": seed, "out": out})

    def check(self) -> None:
        """``ConfigError`` for a value that no recipe takes, whatever the others are."""
        from softprompt.train.build import prompt_config, with_source

        for name, value, settings in self.space.probes():
            try:
                prompt_config(with_source(self.recipe(settings, self.space.seeds[0], "run")).resolved())
            except ConfigError as error:
                which = "" if value is None else f"with {name}: {value}: "
                raise ConfigError(f"sweep: {which}{error}") from None
        for seed in self.space.seeds:
            Recipe(seed=seed)

    def definition(self) -> dict[str, Any]:
        """What all commands that work on one sweep must agree on: whatever a trained number depends on."""
        from softprompt.train import FREE_TO_CHANGE

        base = {name: value for name, value in self.base.items() if name not in FREE_TO_CHANGE}
        return {"metric": self.metric, "sweep": self.space.plain(), "recipe": base}


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe values with others over them; steps put epochs aside and the other way round."""
    options = {name.removeprefix(OPTION): value for name, value in changes.items() if name.startswith(OPTION)}
    plain = {name: value for name, value in changes.items() if not name.startswith(OPTION)}
    aside = {other for one, other in EITHER if plain.get(one) is not None}
    kept = {name: value for name, value in values.items() if name not in aside}
    if options or "method_options" in plain:
        stored = kept.get("method_options") or {}
        if not isinstance(stored, Mapping):
            raise ConfigError(f"method_options is {stored!r}; it must be a mapping of names to values")
        plain["method_options"] = {**stored, **(plain.get("method_options") or {}), **options}
    return {**kept, **plain}


def _metric(recipe: Recipe) -> str:
    """What the best prompt of a run is chosen by, too."""
    if recipe.task == "CLOZE":
        return "accuracy" if recipe.verbalizer else "p_at_1"
    return "accuracy" if recipe.task == "SEQ_CLS" else "loss"
