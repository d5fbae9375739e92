"""The library of prompts: what it serves while somebody else changes the folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import families
import pytest
import tiny
import torch
from library_kit import BASE, copies, lent, lent_of, opened, put, row_of, table_of
from safetensors.torch import save_file
from store_kit import CONFIG, WEIGHTS, table, write

from softprompt import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptStore,
    PromptTuningConfig,
    SoftPromptError,
    get_peft_model,
)
from softprompt.checkpoint import load_adapter, save_adapter
from softprompt.errors import CheckpointError, ConfigError, UnsupportedError
from softprompt.serve.base import LentBase
from softprompt.serve.library import Changes, NameTakenError, PromptLibrary, StorageError, UnknownPromptError
from softprompt.serve.watch import watching

HOSTILE = ("../../etc/passwd", "/etc/passwd", "a/../a", "a\0b", "x" * 1_000_000, "", ".", "..", "a/", "\ud800", "A",
           "a\n", "%2e%2e/a", "~root", "C:\\a", "a/adapter_config.json", "__base__", BASE)  # fmt: skip


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


def test_a_folder_of_adapters_is_served(library: PromptLibrary, tmp_path: Path) -> None:
    assert library.names() == ["a", "b/c"]
    version = library.get("b/c")
    assert torch.equal(table_of(version), table(2))
    assert (version.method, version.length, version.slots, version.task) == ("prompt_tuning", 4, False, None)
    assert version.folder == tmp_path / "objects" / version.digest
    assert version.source == tmp_path / "prompts" / "b" / "c"
    assert sorted(os.listdir(version.folder)) == ["adapter_config.json", WEIGHTS]
    assert copies(tmp_path / "objects") == {library.get(name).digest for name in library.names()}
    assert row_of(library, "a") == {
        "name": "a", "state": "served", "digest": library.get("a").digest, "length": 4, "method": "prompt_tuning",
        "slots": False, "error": None,
    }  # fmt: skip
    assert not library.scan()


def test_the_folder_itself_may_be_an_adapter(tmp_path: Path, base: LentBase) -> None:
    write(tmp_path / "prompts", 1)
    library = PromptLibrary(tmp_path / "prompts", base, tmp_path / "objects")
    assert list(library.scan().added) == ["default"]
    write(tmp_path / "prompts" / "default", 2)
    changes = library.scan()
    assert torch.equal(table_of(library.get("default")), table(2))
    assert "would both be called 'default'" in changes.refused["."]


# ---- contents ----------------------------------------------------------------------------------------------------


def test_a_digest_is_of_what_a_prompt_holds_and_stands_before(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    one, other, minus = table(1), table(1), table(1)
    other[3, 31] = torch.nextafter(other[3, 31], torch.tensor(9.0))
    one[0, 0], minus[0, 0] = 0.0, -0.0
    other[0, 0] = 0.0
    for name, values in (("one", one), ("other", other), ("minus", minus), ("half", one.half()), ("again", one)):
        put(prompts / name, values)
    save_adapter(prompts / "placed", replace(CONFIG, placement="after_bos"), {"prompt_embeddings": one})
    (prompts / "old").mkdir()
    shutil.copy(prompts / "one" / "adapter_config.json", prompts / "old")
    torch.save({"prompt_embeddings": one}, prompts / "old" / "adapter_model.bin")
    assert torch.equal(one.half().float(), one)  # half differs in its type alone

    bases = [lent(), lent(fingerprint="e" * 64), lent(dtype=torch.bfloat16)]
    found = []
    for base in bases:
        library = PromptLibrary(prompts, base, tmp_path / "objects")
        assert not library.scan().refused
        digests = {name: library.get(name).digest for name in library.names()}
        assert digests.pop("again") == digests.pop("old") == digests["one"]
        found += digests.values()
    folded = PromptLibrary(prompts, bases[0], tmp_path / "objects", folded=True)
    folded.scan()
    found.append(folded.get("one").digest)
    assert len(set(found)) == len(found) == 3 * 5 + 1
    assert all(len(each) == 64 and set(each) <= set("0123456789abcdef") for each in found)


def test_files_that_change_and_say_the_same_change_nothing(library: PromptLibrary, tmp_path: Path) -> None:
    before = library.get("a")
    write(tmp_path / "prompts" / "a", 1)
    os.utime(tmp_path / "prompts" / "b" / "c" / WEIGHTS)
    assert not library.scan()
    assert library.get("a") == before
    assert before.folder.is_dir()


def test_every_change_is_seen_however_fast(library: PromptLibrary, tmp_path: Path) -> None:
    """Also those that leave size and, within the steps of the file system's clock, time as they were."""
    path = tmp_path / "prompts" / "a" / WEIGHTS
    for number in range(20):
        with path.open("r+b") as file:  # the same file, not a new one
            file.seek(-4, os.SEEK_END)
            file.write(torch.tensor(float(number)).numpy().tobytes())
        library.scan()
        assert table_of(library.get("a"))[-1, -1] == number


# ---- replaced, refused, removed ----------------------------------------------------------------------------------


def test_a_request_keeps_the_version_it_began_with(library: PromptLibrary, tmp_path: Path) -> None:
    with library.use("a") as old:
        with library.lease(old):
            write(tmp_path / "prompts" / "a", 7)
            assert library.scan().replaced == {"a": library.get("a")}
            new = library.get("a")
            assert new.digest != old.digest
            assert torch.equal(table_of(new), table(7))
        assert torch.equal(table_of(old), table(1))
    assert not old.folder.exists()
    with pytest.raises(UnknownPromptError, match="has been replaced or unloaded"), library.lease(old):
        pass
    with library.use("a") as version:
        assert version is new
    assert copies(tmp_path / "objects") == {library.get(name).digest for name in library.names()}


def test_copies_in_a_folder_that_others_use_stay(tmp_path: Path, base: LentBase) -> None:
    write(tmp_path / "prompts" / "a", 1)
    library = PromptLibrary(tmp_path / "prompts", base, tmp_path / "objects")
    library.scan()
    old = library.get("a")
    write(tmp_path / "prompts" / "a", 2)
    library.scan()
    with library.lease(old):
        assert torch.equal(table_of(old), table(1))
    library.close()
    assert len(copies(tmp_path / "objects")) == 2


def test_two_names_of_one_content_share_a_copy(library: PromptLibrary, tmp_path: Path) -> None:
    write(tmp_path / "prompts" / "twin", 1)
    library.scan()
    twin = library.get("twin")
    assert twin.digest == library.get("a").digest
    shutil.rmtree(tmp_path / "prompts" / "a")
    assert set(library.scan().removed) == {"a"}
    assert torch.equal(table_of(twin), table(1))
    shutil.rmtree(tmp_path / "prompts" / "twin")
    library.scan()
    assert not twin.folder.exists()


def test_an_adapter_that_goes_is_served_no_more(library: PromptLibrary, tmp_path: Path) -> None:
    with library.use("a") as version:
        shutil.rmtree(tmp_path / "prompts" / "a")
        assert library.scan().removed == {"a": version}
        assert library.names() == ["b/c"]
        assert torch.equal(table_of(version), table(1))
    assert copies(tmp_path / "objects") == {library.get("b/c").digest}
    assert [row["name"] for row in library.listing()] == ["b/c"]


def test_a_folder_that_is_away_takes_nothing_with_it(library: PromptLibrary, tmp_path: Path) -> None:
    before = library.get("a")
    (tmp_path / "prompts").rename(tmp_path / "away")
    assert not library.scan()
    assert library.get("a") is before
    with pytest.raises(ConfigError, match="cannot be listed"):
        library.load("a")
    (tmp_path / "away").rename(tmp_path / "prompts")
    assert not library.scan()


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


# ---- loading and unloading ---------------------------------------------------------------------------------------


def test_unload_holds_until_load_or_a_change(library: PromptLibrary, tmp_path: Path) -> None:
    version = library.get("a")
    library.unload("a")
    for _ in range(2):
        assert not library.scan()
        assert library.names() == ["b/c"]
    assert row_of(library, "a")["state"] == "unloaded"
    assert not version.folder.exists()
    with pytest.raises(UnknownPromptError, match="no adapter 'a' is served"):
        library.unload("a")
    assert library.load("a") == (library.get("a"),)
    assert torch.equal(table_of(library.get("a")), table(1))
    library.unload("a")
    write(tmp_path / "prompts" / "a", 2)
    assert set(library.scan().added) == {"a"}
    assert torch.equal(table_of(library.get("a")), table(2))


def test_load_takes_what_is_there_now(library: PromptLibrary, tmp_path: Path) -> None:
    write(tmp_path / "prompts" / "a", 4)
    write(tmp_path / "prompts" / "new", 5)
    assert [torch.equal(table_of(version), table(4)) for version in library.load("a")] == [True]
    assert library.names() == ["a", "b/c"]
    library.load("new")
    assert library.names() == ["a", "b/c", "new"]
    with pytest.raises(UnknownPromptError, match="there is no adapter 'nothing'"):
        library.load("nothing")


def test_subscribers_hear_of_everything_in_order(library: PromptLibrary, tmp_path: Path) -> None:
    heard: list[Changes] = []

    def fails(changes: Changes) -> None:
        raise RuntimeError("a bug of the subscriber's")

    library.subscribe(fails)
    library.subscribe(heard.append)
    first = library.get("a")
    write(tmp_path / "prompts" / "a", 2)
    library.scan()
    second = library.get("a")
    library.scan()
    library.unload("a")
    library.load("a")
    (tmp_path / "prompts" / "a" / WEIGHTS).write_bytes(b"")
    library.scan()
    shutil.rmtree(tmp_path / "prompts" / "a")
    library.scan()
    assert second != first
    assert [(each.added, each.replaced, each.removed) for each in heard] == [
        ({}, {"a": second}, {}), ({}, {}, {"a": second}), ({"a": second}, {}, {}), ({}, {}, {}), ({}, {}, {"a": second})
    ]  # fmt: skip
    assert [set(each.refused) for each in heard] == [set(), set(), set(), {"a"}, set()]


def test_the_folder_is_watched(library: PromptLibrary, tmp_path: Path) -> None:
    heard: list[Changes] = []
    again = Event()

    def told(changes: Changes) -> None:
        heard.append(changes)
        again.set()

    def wait() -> Changes:
        assert again.wait(60)
        again.clear()
        return heard[-1]

    library.subscribe(told)
    with watching(library, 0.01):
        write(tmp_path / "prompts" / "late", 9)
        while "late" not in library.names():
            wait()
        shutil.rmtree(tmp_path / "prompts" / "late")
        while "late" in library.names():
            wait()
    count = len(heard)
    write(tmp_path / "prompts" / "later", 9)
    assert len(heard) == count
    with watching(library, 0):
        pass
    assert "later" not in library.names()


def test_requests_and_replacements_at_the_same_time(library: PromptLibrary, tmp_path: Path) -> None:
    done, wrong = Event(), []

    def ask() -> None:
        try:
            while not done.is_set():
                with library.use("a") as version:
                    seen = table_of(version)
                    if not torch.equal(seen, table(float(seen[0, 0]))):
                        wrong.append(version)
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        write(tmp_path / "prompts" / "a", number)
        library.scan()
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(table_of(library.get("a")), table(29))
    assert copies(tmp_path / "objects") == {library.get(name).digest for name in library.names()}


# ---- the disk ----------------------------------------------------------------------------------------------------


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
        assert (library.get("a").folder / "kv.safetensors").read_bytes() == kv
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


# ---- several tasks -----------------------------------------------------------------------------------------------


def _several(folder: Path, tasks: int) -> None:
    torch.manual_seed(tasks)
    config = MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=tasks, num_ranks=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.build("gpt2"), config).eval()
    encoder = model.encoder()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    model.save_pretrained(folder)


def test_each_task_is_a_prompt_of_its_own(library: PromptLibrary, tmp_path: Path, base: LentBase) -> None:
    _several(tmp_path / "prompts" / "many", 3)
    _several(tmp_path / "prompts" / "single", 1)
    assert set(library.scan().added) == {"many:0", "many:1", "many:2", "single"}
    with pytest.raises(UnknownPromptError):
        library.get("many")
    store = PromptStore({name: library.get(name).folder for name in library.names()})
    store.register("whole", tmp_path / "prompts" / "many")
    good, bad = store.load(["whole", "many:0", "many:1", "many:2", "single"], base.geometry)
    assert not bad
    for number in range(3):
        own, whole = good[f"many:{number}"].prompt(), good["whole"].prompt(number)
        assert torch.equal(own.vectors, whole.vectors)
    assert {library.get(name).method for name in ("many:0", "single")} == {"multitask_prompt_tuning"}
    assert len({library.get(f"many:{number}").digest for number in range(3)}) == 3
    _several(tmp_path / "prompts" / "many", 2)
    changes = library.scan()
    assert (set(changes.replaced), set(changes.removed)) == ({"many:0", "many:1"}, {"many:2"})
    library.unload("many")
    assert library.names() == ["a", "b/c", "single"]
    assert row_of(library, "many")["state"] == "unloaded"
    assert [version.name for version in library.load("many")] == ["many:0", "many:1"]


# ---- words -------------------------------------------------------------------------------------------------------


def test_nearest_words(tmp_path: Path, base: LentBase) -> None:
    tokens = base.tokenizer("the red house by", add_special_tokens=False)["input_ids"]
    tokens = (tokens * 4)[:4]
    put(tmp_path / "prompts" / "words", 3 * base.words()[tokens])
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("gpt2"), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "prompts" / "kv")
    library = PromptLibrary(tmp_path / "prompts", base, tmp_path / "objects")
    library.scan()
    found = library.nearest("words", 2)
    assert [each[0] for each in found] == [(base.tokenizer.decode([token]), 1.0) for token in tokens]
    assert all(len(each) == 2 and each[1][1] < 1 for each in found)
    with pytest.raises(UnsupportedError, match="which no words are near to"):
        library.nearest("kv")
