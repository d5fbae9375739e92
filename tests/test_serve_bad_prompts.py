"""What a library of prompts does not serve: garbage, and names and links that lead out of its folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from library_kit import BASE, base, copies, library, opened, row_of, table_of
from safetensors.torch import save_file
from store_kit import CONFIG, WEIGHTS, table, write

from softprompt import SoftPromptError
from softprompt.checkpoint import save_adapter
from softprompt.errors import CheckpointError, ConfigError
from softprompt.serve.base import LentBase
from softprompt.serve.library import NameTakenError, PromptLibrary, UnknownPromptError

__all__ = ["base", "library"]  # fixtures

HOSTILE = ("../../etc/passwd", "/etc/passwd", "a/../a", "a\0b", "x" * 1_000_000, "", ".", "..", "a/", "\ud800", "A",
           "a\n", "%2e%2e/a", "~root", "C:\\a", "a/adapter_config.json", "__base__", BASE)  # fmt: skip


def _config(change: dict[str, object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"prompt_embeddings": Path("/")}, folder / "adapter_model.bin")


def _poisoned(folder: Path) -> None:
    values = table(0)
    values[1, 1] = float("nan")
    save_file({"prompt_embeddings": values}, folder / WEIGHTS)


def _narrow(folder: Path) -> None:
    save_adapter(folder, replace(CONFIG, token_dim=16), {"prompt_embeddings": table(0)[:, :16].clone()})


def _linked(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent.parent / "elsewhere")


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _tuned(folder: Path) -> None:
    write(folder, 0)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")


GARBAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bytes": (lambda folder: (folder / WEIGHTS).write_bytes(os.urandom(700)), "damaged, cut short"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "damaged, cut short"),
    "cut": (lambda folder: os.truncate(folder / WEIGHTS, 200), "damaged, cut short"),
    "config": (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff{"), "adapter_config.json"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "but neither"),
    "field": (_config({"brand_new": 1}), "the field 'brand_new' is unknown"),
    "lora": (_config({"peft_type": "LORA"}), "is no soft prompt known here"),
    "another base": (_narrow, "made for another base model: width 16 in the adapter, 32 here"),
    "head": (_config({"task_type": "SEQ_CLS"}), "head of its own"),
    "long": (_config({"num_virtual_tokens": tiny.CONTEXT}), "leaves no room"),
    "huge": (_config({"num_virtual_tokens": 999_999, "token_dim": 999_999}), "served"),
    "pickled": (_pickled, "could run code"),
    "poisoned": (_poisoned, "NaN or infinite"),
    "link": (_linked, "is a link out of its folder"),
    "pipe": (_pipe, "is not a regular file"),
    "tuned base": (_tuned, "trained along with its base model"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_leaves_the_old_version_serving(library: PromptLibrary, tmp_path: Path, kind: str) -> None:
    damage, message = GARBAGE[kind]
    folder, before = tmp_path / "prompts" / "a", library.get("a")
    damage(folder)
    changes = library.scan()
    assert set(changes.refused) == {"a"}
    assert message in changes.refused["a"]
    assert str(tmp_path / "prompts") not in changes.refused["a"]
    assert str(tmp_path / "objects") not in changes.refused["a"]
    assert not library.scan()  # said once
    assert library.get("a") is before
    assert torch.equal(table_of(before), table(1))
    assert row_of(library, "a") == {**row_of(library, "a"), "state": "served", "error": changes.refused["a"]}
    with pytest.raises(SoftPromptError):
        library.load("a")
    assert library.get("a") is before
    shutil.rmtree(folder)
    write(folder, 5)
    assert set(library.scan().replaced) == {"a"}
    assert row_of(library, "a")["error"] is None
    assert copies(tmp_path / "objects") == {library.get(name).digest for name in library.names()}


def test_what_is_bad_from_the_start_fails_alone(tmp_path: Path, base: LentBase) -> None:
    for kind, (damage, _) in GARBAGE.items():
        name = kind.replace(" ", "-")
        write(tmp_path / "prompts" / name / "x", 1)
        damage(tmp_path / "prompts" / name / "x")
    write(tmp_path / "prompts" / "fine", 1)
    library = PromptLibrary(tmp_path / "prompts", base, tmp_path / "objects")
    changes = library.scan()
    assert list(changes.added) == ["fine"]
    assert set(changes.refused) == {f"{kind.replace(' ', '-')}/x" for kind in GARBAGE}
    assert {row["state"] for row in library.listing()} == {"served", "refused"}
    json.dumps(library.listing())


def test_unexpected_errors_end_nothing(library: PromptLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    write(tmp_path / "prompts" / "a", 3)
    monkeypatch.setattr("softprompt.serve.library.read_whole", fails)
    assert "a cannot be read (RuntimeError: a bug)" in library.scan().refused["a"]
    assert torch.equal(table_of(library.get("a")), table(1))
    with pytest.raises(CheckpointError, match="a bug"):
        library.load("a")


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:12]))
def test_names_of_requests_lead_nowhere(library: PromptLibrary, tmp_path: Path, name: str) -> None:
    library.nearest("a")  # which imports what it needs
    with opened() as seen:
        for ask in (library.get, library.load, library.unload, library.nearest):
            with pytest.raises(UnknownPromptError) as caught:
                ask(name)
            assert len(str(caught.value)) < 1200
        with pytest.raises(UnknownPromptError), library.use(name):
            pass
    assert str(tmp_path / "prompts") in seen  # `load` has listed it
    assert all(path.startswith(f"{tmp_path}/") for path in seen)
    assert library.names() == ["a", "b/c"]


def test_folders_that_cannot_be_names(tmp_path: Path, base: LentBase) -> None:
    prompts = tmp_path / "prompts"
    names = [".hidden", "sp ace", "task:0", "ünï", "x" * 129, "new\nline", "-dash", "a/.b", os.fsdecode(b"by\xfftes")]
    for name in names:
        write(prompts / name, 1)
    write(prompts / ("y" * 128), 2)
    library = PromptLibrary(prompts, base, tmp_path / "objects")
    changes = library.scan()
    assert list(changes.added) == ["y" * 128]
    assert len(changes.refused) == len(names)
    assert all("its path cannot name a prompt" in why for why in changes.refused.values())
    listed = json.dumps(library.listing(), ensure_ascii=False).encode("utf-8")
    assert b"by\\\\udcfftes" in listed
    with pytest.raises(ConfigError, match="cannot name a prompt"):
        library.load("sp ace")


def test_the_base_models_own_name_is_taken(tmp_path: Path, base: LentBase) -> None:
    write(tmp_path / "prompts" / BASE, 1)
    library = PromptLibrary(tmp_path / "prompts", base, tmp_path / "objects")
    assert "what requests call the base model" in library.scan().refused[BASE]
    with pytest.raises(NameTakenError):
        library.load(BASE)
    assert library.names() == []


def test_links_are_not_followed(library: PromptLibrary, tmp_path: Path) -> None:
    write(tmp_path / "secret" / "deep", 3)
    (tmp_path / "prompts" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "prompts" / "circle").symlink_to(tmp_path / "prompts")
    (tmp_path / "prompts" / "loop").symlink_to("loop")
    linked = write(tmp_path / "prompts" / "inside", 4)
    (linked / WEIGHTS).rename(linked / "v1")
    (linked / WEIGHTS).symlink_to("v1")  # that stays in its folder
    with opened() as seen:
        changes = library.scan()
    assert set(changes.added) == {"inside"}
    assert set(changes.refused) == {"out", "circle"}
    assert all("is a link to a folder" in why for why in changes.refused.values())
    assert not [path for path in seen if path.startswith(str(tmp_path / "secret"))]
