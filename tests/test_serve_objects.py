"""The copies of prompts that are served: whole or not there, whatever happens to the disk and the process."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from library_kit import base, copies, lent, lent_of, table_of
from safetensors.torch import load as to_tensors
from safetensors.torch import load_file
from store_kit import CONFIG, WEIGHTS, table, write

from softprompt import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.checkpoint import load_adapter, save_adapter
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.serve.base import LentBase
from softprompt.serve.library import PromptLibrary, StorageError

__all__ = ["base"]  # a fixture


@contextmanager
def _tmpfs(objects: Path) -> Iterator[Callable[[], None]]:
    """A file system with no room for a prompt of 20 kB; what is given makes some."""
    objects.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", objects], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        (objects / "filler").write_bytes(bytes(40_000))
        yield (objects / "filler").unlink
    finally:
        subprocess.run(["umount", "-l", objects], check=True)


@contextmanager
def _limit(objects: Path) -> Iterator[Callable[[], None]]:
    """No file may grow beyond 8 kB, as with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full", [_tmpfs, _limit])
def test_a_full_disk_changes_nothing_and_heals(tmp_path: Path, base: LentBase, full: Any) -> None:
    long = replace(CONFIG, num_virtual_tokens=150)
    save_adapter(tmp_path / "big", long, {"prompt_embeddings": torch.ones(150, 32)})
    write(tmp_path / "prompts" / "a", 1)
    with full(tmp_path / "objects") as make_room:
        library = PromptLibrary(tmp_path / "prompts", base, tmp_path / "objects", sole=True)
        library.scan()
        before = library.get("a")
        there = copies(tmp_path / "objects")
        shutil.rmtree(tmp_path / "prompts" / "a")
        (tmp_path / "big").rename(tmp_path / "prompts" / "a")  # as a whole: a limit is for this process too
        why = library.scan().refused["a"]
        assert "No space left" in why or "File too large" in why
        with pytest.raises(StorageError):
            library.load("a")
        assert library.get("a") is before
        assert torch.equal(table_of(before), table(1))
        assert copies(tmp_path / "objects") == there
        make_room()
        assert set(library.scan().replaced) == {"a"}
        assert library.get("a").length == 150
        assert library.get("a").digest in copies(tmp_path / "objects")
        assert not [name for name in copies(tmp_path / "objects") if name.startswith(".")]
        library.close()


def test_what_cannot_be_folded_leaves_nothing_behind(tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = get_peft_model(families.build("mamba", "CAUSAL_LM"), config).eval()
    model.save_pretrained(tmp_path / "prompts" / "a")
    mamba = lent_of(families.build("mamba", "CAUSAL_LM"))
    library = PromptLibrary(tmp_path / "prompts", mamba, tmp_path / "objects", folded=True)
    assert "cannot be folded" in library.scan().refused["a"]
    assert copies(tmp_path / "objects") == set()
    with pytest.raises(UnsupportedError):
        library.load("a")


def test_copies_of_an_earlier_process_are_used_again_if_they_are_whole(tmp_path: Path) -> None:
    base, objects = lent("llama"), tmp_path / "objects"
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("llama"), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "prompts" / "a")

    def again() -> tuple[PromptLibrary, dict[str, int]]:
        library = PromptLibrary(tmp_path / "prompts", base, objects, folded=True)
        library.scan()
        return library, {path.name: path.stat().st_ino for path in library.get("a").folder.iterdir()}

    first, made = again()
    kv = (first.get("a").folder / "kv.safetensors").read_bytes()
    assert again()[1] == made
    for file, bad in (("kv.safetensors", kv[:-1]), (WEIGHTS, b""), ("adapter_config.json", b"{}")):
        (first.get("a").folder / file).write_bytes(bad)
        library, _ = again()
        assert library.get("a").folder == first.get("a").folder
        found, wanted = load_file(library.get("a").folder / "kv.safetensors"), to_tensors(kv)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        load_adapter(library.get("a").folder)
    assert copies(objects) == {first.get("a").digest}


def test_what_a_killed_process_left_is_taken_away(tmp_path: Path, base: LentBase) -> None:
    objects = tmp_path / "objects"
    for name in (".new-young", ".new-left", ".old-left"):
        write(objects / name, 1)
    for name in (".new-left", ".old-left"):
        os.utime(objects / name, (0, 0))
    (tmp_path / "prompts").mkdir()
    PromptLibrary(tmp_path / "prompts", base, objects)
    assert copies(objects) == {".new-young"}  # which another process may be writing
    PromptLibrary(tmp_path / "prompts", base, objects, sole=True)
    assert copies(objects) == set()


def test_folders_that_cannot_be(tmp_path: Path, base: LentBase) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        PromptLibrary(tmp_path / "nothing", base, tmp_path / "objects")
    (tmp_path / "file").write_text("")
    write(tmp_path / "prompts" / "a", 1)
    with pytest.raises(ConfigError, match="cannot hold copies"):
        PromptLibrary(tmp_path / "prompts", base, tmp_path / "file" / "objects")
    for objects in ("prompts", "prompts/objects", ""):  # copies would be served, or what is served deleted
        with pytest.raises(ConfigError, match="must not be in one another"):
            PromptLibrary(tmp_path / "prompts", base, tmp_path / objects)
