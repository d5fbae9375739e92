"""Offline, one thread per worker, the same seeds for every test; tiny models and the places of larger things."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network must fail
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import traceback
from collections.abc import Generator
from pathlib import Path

import pairs
import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run what does not run by default, but for most of the grids")
    parser.addoption("--full", action="store_true", help="run all tests, and every cell of the grids")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests, slow ones, or all of them (pairs.py); what is named runs in any case."""
    if config.getoption("--full"):
        return
    wanted = "slow" if config.getoption("--slow") else "fast"
    named = tuple(argument for argument in config.args if "::" in argument)
    left_out = {
        item
        for item, tier in pairs.tiers(items).items()
        if tier != wanted and not item.nodeid.endswith(named)
        if tier == "full" or not item.nodeid.partition("[")[0].endswith(named)
    }
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


PEFT_LAGS = (  # what PEFT 0.21 says, or is told, where transformers calls a cache `cache` (from 5.24 on)
    "Model does not support past key values",
    "Both `past_key_values` and `cache` are set",
    "The version of PEFT you are using is not compatible",  # `add_adapter` wants 0.22, which is not out
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skips a comparison that PEFT itself cannot run on this transformers; the lowest versions run it."""
    try:
        return (yield)
    except (ValueError, FutureWarning) as error:
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        in_peft = any("peft" in (Path(name).parent.name, Path(name).stem) for name in frames)
        if in_peft and str(error).startswith(PEFT_LAGS):
            pytest.skip("peft 0.21 cannot do this on transformers 5.24: it does not know the name of the cache")
        raise


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """Larger models and data beside the checkout (``SOFTPROMPT_ASSETS``, else ``../shared/assets``); skips without."""
    folder = Path(os.environ.get("SOFTPROMPT_ASSETS") or ROOT.parent / "shared" / "assets")
    if not folder.is_dir():
        pytest.skip("no assets: set SOFTPROMPT_ASSETS to the folder that holds models/ and data/")
    return folder


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    return tiny.build("gpt2")


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    return tiny.build("llama")


@pytest.fixture
def tiny_mistral() -> PreTrainedModel:
    return tiny.build("mistral")


@pytest.fixture
def tiny_qwen3() -> PreTrainedModel:
    return tiny.build("qwen3")


@pytest.fixture
def tiny_gemma3() -> PreTrainedModel:
    return tiny.build("gemma3")


@pytest.fixture
def tiny_bert() -> PreTrainedModel:
    return tiny.build("bert")


@pytest.fixture(params=tiny.DECODERS)
def tiny_decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each decoder family in turn."""
    return tiny.build(request.param)
