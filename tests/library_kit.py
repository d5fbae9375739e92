"""A library of prompts before a tiny model, and which files a piece of code opens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from store_kit import CONFIG, write
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.base_model import find_way
from softprompt.checkpoint import load_adapter, save_adapter
from softprompt.serve.base import LentBase
from softprompt.serve.library import PromptLibrary
from softprompt.serve.version import Version

BASE = "base"
FINGERPRINT = "f" * 64


def lent(family: str = "gpt2", dtype: torch.dtype = torch.float32, fingerprint: str = FINGERPRINT) -> LentBase:
    """A tiny model as an engine lends it."""
    return lent_of(tiny.build(family).to(dtype), fingerprint)


def lent_of(model: PreTrainedModel, fingerprint: str = FINGERPRINT) -> LentBase:
    return LentBase(*find_way(model), tiny.tokenizer(), "tiny", BASE, fingerprint)


@pytest.fixture(scope="module")
def base() -> LentBase:
    return lent()


@pytest.fixture
def library(tmp_path: Path, base: LentBase) -> PromptLibrary:
    """Before tiny GPT-2, with the prompts a and b/c in `tmp_path`/prompts and copies in `tmp_path`/objects."""
    write(tmp_path / "prompts" / "a", 1)
    write(tmp_path / "prompts" / "b" / "c", 2)
    library = PromptLibrary(tmp_path / "prompts", base, tmp_path / "objects", sole=True)
    assert set(library.scan().added) == {"a", "b/c"}
    return library


def put(folder: Path, table: Tensor) -> Path:
    """A prompt-tuning adapter for tiny GPT-2 that holds `table` `[4, 32]`."""
    save_adapter(folder, CONFIG, {"prompt_embeddings": table})
    return folder


def table_of(version: Version) -> Tensor:
    return load_adapter(version.folder).tensors["prompt_embeddings"]


def row_of(library: PromptLibrary, name: str) -> dict[str, object]:
    return next(row for row in library.listing() if row["name"] == name)


def copies(objects: Path) -> set[str]:
    """Everything there is in the folder of copies, hidden or not."""
    return set(os.listdir(objects))


_opened: list[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else "")


sys.addaudithook(_hook)


@contextmanager
def opened() -> Iterator[list[str]]:
    """Files and folders that Python opens inside the block, where links lead."""
    global _opened
    _opened = seen = []
    try:
        yield seen
    finally:
        _opened = None
