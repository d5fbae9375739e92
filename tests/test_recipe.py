"""Recipes: YAML both ways, and every wrong setting refused in one sentence that says what to write instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from softprompt.errors import ConfigError, SoftPromptError
from softprompt.recipe import Recipe, options_for, read_yaml, require_paths


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(
        train="train.jsonl",
        out="run",
        template="{mr} => {ref}",
        init="text",
        init_text="naïve: “quoted”\nsecond line",
        learning_rate=0.005,
        method_options={"prefix_projection": True, "encoder_hidden_size": 64},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(path) == recipe
    assert Recipe.from_yaml(path).resolved() == recipe.resolved()


def test_resolved_recipe_round_trips_and_is_stable(tmp_path: Path) -> None:
    resolved = Recipe(train="a", out="b").resolved()
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(path) == resolved == resolved.resolved()


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "a_method_added_yesterday"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_resolved_leaves_nothing_that_training_needs_open(method: str, task: str) -> None:
    recipe = Recipe(train="a", out="b", method=method, task=task).resolved()
    needed = (
        "num_virtual_tokens",
        "init",
        "learning_rate",
        "steps",
        "batch_size",
        "warmup",
        "schedule",
        "clip",
        "optimizer",
        "beta1",
        "beta2",
    )
    assert all(getattr(recipe, name) is not None for name in needed)


def test_the_recipe_wins_over_the_table() -> None:
    options = {"encoder_hidden_size": 7}
    recipe = Recipe(method="p_tuning", learning_rate=0.5, epochs=2, method_options=options).resolved()
    assert recipe.learning_rate == 0.5
    assert recipe.steps is None
    assert recipe.epochs == 2
    assert recipe.method_options["encoder_hidden_size"] == 7
    assert recipe.method_options["encoder_reparameterization_type"] == "MLP"


def test_a_text_or_an_option_of_the_method_decides_the_init() -> None:
    assert Recipe(init_text="some words").resolved().init == "text"
    assert Recipe(method_options={"prompt_tuning_init": "SAMPLE_VOCAB"}).resolved().init == "random"


def test_yaml_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 5e-3\nepochs: 2\n")
    recipe = Recipe.from_yaml(path)
    assert recipe.learning_rate == 0.005
    assert recipe.epochs == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 0.1}, r"unknown setting 'learning_rat'; did you mean 'learning_rate'\?"),
        ({"zzz": 1}, "unknown setting 'zzz'; known are answer_loss, base_dropout"),
        ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"learning_rate": -1}, "learning_rate is -1.0; it must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be greater than 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"warmup": 1.0}, "warmup is 1.0; it must be from 0 up to"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of adamw, muon"),
        ({"beta2": 1}, "beta2 is 1.0; it must be from 0 up to"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"init": "magic"}, "init is 'magic'; it must be one of random, vocab, text, examples"),
        ({"task": "TOKEN_CLS"}, "task is 'TOKEN_CLS'; it must be one of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS"),
        ({"group_by_length": "yes"}, "group_by_length is 'yes'; it must be true or false"),
        ({"train": None}, "train is None; it must be text"),
        ({"method_options": [1]}, "method_options is .*; it must be a mapping"),
        ({"method_options": {1: 2}}, "method_options is .*; it must be a mapping"),
        ({"steps": 1, "epochs": 1}, "both steps .* and epochs"),
        ({"init": "text"}, "init is 'text' but init_text is empty"),
        ({"init": "random", "init_text": "words"}, "init_text is set but init is 'random'"),
        ({"template": "{a} {b}", "input_column": "a"}, "both a template and input_column"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [unclosed", "is not valid YAML"),
        ("- a\n- b\n", "holds a list"),
        ("just words", "holds a str"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("model_: x", r"recipe.yaml has an unknown setting 'model_'; did you mean 'model'\?"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_yaml(path)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "binary.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_a_run_needs_data_and_a_folder() -> None:
    with pytest.raises(ConfigError, match="names no training data"):
        require_paths(Recipe(out="x"))
    with pytest.raises(ConfigError, match="names no run folder"):
        require_paths(Recipe(train="x"))
    require_paths(Recipe(train="x", out="y"))


def test_method_options_are_fields_of_the_config() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        num_virtual_tokens: int = 1
        encoder_dropout: float = 0.0
        filled: int = dataclasses.field(default=0, init=False)

    assert options_for(Config, {"encoder_dropout": 0.1}) == {"encoder_dropout": 0.1}
    with pytest.raises(ConfigError, match=r"unknown field 'encoder_drop'; did you mean 'encoder_dropout'\?"):
        options_for(Config, {"encoder_drop": 0.1})
    with pytest.raises(ConfigError, match="unknown field 'filled'"):
        options_for(Config, {"filled": 1})
    with pytest.raises(ConfigError, match="set it in the recipe itself"):
        options_for(Config, {"num_virtual_tokens": 3}, reserved=("num_virtual_tokens",))


def test_every_field_has_a_help_text() -> None:
    assert all(f.metadata.get("help") for f in dataclasses.fields(Recipe))
    assert issubclass(ConfigError, SoftPromptError)
