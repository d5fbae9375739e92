"""What a sweep may vary, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_kit import values

from softprompt.errors import ConfigError
from softprompt.recipe import Recipe
from softprompt.sweep import SweepOptions
from softprompt.sweep.plan import Plan
from softprompt.sweep.space import Space

pytest.importorskip("optuna")

BASE = Recipe(method="prompt_tuning", train="t.jsonl", eval="e.jsonl")


def plan_of(block: Any, options: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return Plan.of(values(Path("w"), Path("o"), sweep=block, **changes), SweepOptions(**(options or {})))


REFUSED: list[tuple[Any, str]] = [
    (None, "no `sweep` block"),
    ([1], "no `sweep` block"),
    ({"learning_rat": [0.1]}, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
    ({"learning_rate": []}, "learning_rate is an empty list"),
    ({"learning_rate": 0.1}, "learning_rate is 0.1; give a list"),
    ({"learning_rate": ["fast"]}, "learning_rate is 'fast'; it must be a number"),
    ({"learning_rate": [[0.1]]}, "a single number, word"),
    ({"learning_rate": [0.1, 0.1]}, "lists 0.1 twice"),
    ({"learning_rate": ["1e-1", 0.1]}, "lists 0.1 twice"),
    ({"learning_rate": [-1.0]}, "learning_rate is -1.0; it must be greater than 0"),
    ({"num_virtual_tokens": [2.5]}, "num_virtual_tokens is 2.5; it must be a whole number"),
    ({"num_virtual_tokens": {"low": 2, "high": 8.5}}, "num_virtual_tokens: high is 8.5; it must be a whole number"),
    ({"learning_rate": {"low": 0.1}}, "needs both low and high"),
    ({"learning_rate": {"low": 0.2, "high": 0.1}}, "low must be the smaller"),
    ({"learning_rate": {"low": 0, "high": 0.1, "log": True}}, "low above 0"),
    ({"learning_rate": {"low": 0.1, "high": 1, "logs": True}}, "unknown part 'logs'; did you mean 'log'"),
    ({"optimizer": {"low": 0, "high": 1}}, "it is no number"),
    ({"optimizer": ["adamw", "sgd"]}, "optimizer is 'sgd'; it must be one of adamw, muon"),
    ({"out": ["a", "b"]}, "out cannot be varied"),
    ({"eval": ["a", "b"]}, "eval cannot be varied"),
    ({"method_options": [{}]}, "no single value"),
    ({"seed": {"low": 0, "high": 3}}, "seed is a range"),
    ({"seed": []}, "seed is an empty list"),
    ({"seed": [-1]}, "seed is -1"),
    ({"method": "prompt_tuning"}, "list the methods"),
    ({"method": []}, "method is an empty list"),
    ({"method": ["prompt_tunin"]}, "no method 'prompt_tunin'; did you mean 'prompt_tuning'"),
    ({"method": ["auto", "p_tuning"]}, "auto chooses a method"),
    ({"method": {"p_tuning": 3}}, "p_tuning is 3"),
    ({"method_options.prefix_dropout": [0.0, 0.1]}, "prompt_tuning has no option 'prefix_dropout'"),
    ({"method": ["prefix_tuning"], "method_options.prefix_dropout": ["much"]}, "prefix_dropout"),
    ({"method": ["prefix_tuning"], "method_options.prefix_dropout": [2.0]}, "prefix_dropout=2.0"),
    ({"init": ["vocab", "prompt"]}, "init_from is empty"),
    ({"steps": [1, 2], "epochs": [1, 2]}, "sweep: both steps (1) and epochs (1) are set"),
]


@pytest.mark.parametrize(("block", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_what_means_nothing_is_refused_in_one_sentence(block: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(block)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_rest_of_the_recipe_must_have() -> None:
    block = {"learning_rate": [0.1, 0.2]}
    with pytest.raises(ConfigError, match="held-out data"):
        plan_of(block, eval=None)
    with pytest.raises(ConfigError, match="no folder"):
        Plan.of({**values(Path("w"), Path("o"), sweep=block), "out": ""}, SweepOptions())
    with pytest.raises(ConfigError, match="learning_rate is given, but the sweep varies it"):
        Plan.of(values(Path("w"), Path("o"), sweep=block), SweepOptions(), {"learning_rate": 0.3})
    with pytest.raises(ConfigError, match="is a range, which has no grid"):
        plan_of({"learning_rate": {"low": 0.1, "high": 1}}, {"sampler": "grid"})
    with pytest.raises(ConfigError, match="jobs is 0"):
        SweepOptions(jobs=0)
    with pytest.raises(ConfigError, match="sampler is 'bayes'; it must be one of grid, tpe, random"):
        SweepOptions(sampler="bayes")
    with pytest.raises(ConfigError, match="start it by `softprompt sweep`"):
        Recipe.from_dict(values(Path("w"), Path("o"), sweep=block))


def test_a_grid_is_every_combination_once_and_methods_have_their_own() -> None:
    block = {
        "method": {"prefix_tuning": {"learning_rate": ["4e-1"], "method_options.prefix_projection": [True, False]},
                   "prompt_tuning": None},
        "learning_rate": [0.1, 0.2],
        "num_virtual_tokens": [2],
    }  # fmt: skip
    plan = plan_of(block)
    assert plan.sampler == "grid" and plan.trials == 4 and plan.space.seeds == (0,)
    settings = [plan.space.settings(cell) for cell in plan.space.grid()]
    prefix = {"method": "prefix_tuning", "num_virtual_tokens": 2, "learning_rate": 0.4}
    assert settings == [
        {**prefix, "method_options.prefix_projection": True},
        {**prefix, "method_options.prefix_projection": False},
        {"method": "prompt_tuning", "learning_rate": 0.1, "num_virtual_tokens": 2},
        {"method": "prompt_tuning", "learning_rate": 0.2, "num_virtual_tokens": 2},
    ]  # fmt: skip
    assert plan.recipe(settings[0], 7, "x").method_options == {"prefix_projection": True}
    assert plan.recipe(settings[0], 7, "x").seed == 7
    assert plan.recipe(settings[2], 0, "x").resolved().learning_rate == 0.1


def test_steps_put_epochs_aside_and_ranges_make_it_tpe() -> None:
    plan = plan_of({"epochs": [1, 2.5], "learning_rate": {"low": "1e-3", "high": 1, "log": True}})
    assert (plan.sampler, plan.trials) == ("tpe", 20)
    made = plan.recipe({"epochs": 2.5, "learning_rate": 0.1}, 0, "x")
    assert made.epochs == 2.5 and made.steps is None


def test_the_metric_is_what_the_task_is_judged_by() -> None:
    block = {"learning_rate": [0.1]}
    assert plan_of(block).metric == "loss"
    labels = {"task": "SEQ_CLS", "template": None}
    assert plan_of(block, **labels).metric == "accuracy"
    assert plan_of(block, {"metric": "loss"}, **labels).direction == "minimize"


def test_suggestions_stay_inside_and_are_found_again() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    block = yaml.safe_load("""
        method:
          p_tuning: { learning_rate: { low: 1e-3, high: 1e-1, log: true } }
          prompt_tuning: { learning_rate: { low: 0.1, high: 0.5 } }
        num_virtual_tokens: { low: 4, high: 12, step: 4 }
        optimizer: [adamw, muon]
    """)
    space = Space.of(block, BASE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        trial = study.ask()
        assert not space.complete(trial.params)
        space.suggest(trial)
        assert space.complete(trial.params)
        found = space.settings(trial.params)
        low, high = {"p_tuning": (1e-3, 1e-1), "prompt_tuning": (0.1, 0.5)}[found["method"]]
        assert low <= found["learning_rate"] <= high
        assert found["num_virtual_tokens"] in (4, 8, 12) and isinstance(found["num_virtual_tokens"], int)
        seen.add((found["method"], found["num_virtual_tokens"], found["optimizer"]))
        study.tell(trial, 1.0)
    assert len(seen) == 12
