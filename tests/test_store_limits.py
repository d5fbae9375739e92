"""The store sees that files change, keeps to its limit, and is shared by threads."""

from __future__ import annotations

import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from store_kit import BYTES, CONFIG, GEOMETRY, TOKENS, WEIGHTS, error_of, folder, table, vectors, write
from torch import Tensor

from softprompt import KV, CheckpointError, Embeddings, PromptStore
from softprompt.store.loaded import size_of

__all__ = ["folder"]  # a fixture


# ---- files that change -------------------------------------------------------------------------------------------


def test_files_that_change_are_read_again(folder: Path) -> None:
    store = PromptStore(folder)
    first = store.load(["p0", "p1"], GEOMETRY)[0]
    assert store.load(["p0"], GEOMETRY)[0]["p0"] is first["p0"]
    write(folder / "p0", 50)
    assert torch.equal(vectors(store, "p0")[0], table(50))
    assert store.load(["p1"], GEOMETRY)[0]["p1"] is first["p1"]
    with (folder / "p0" / WEIGHTS).open("r+b") as file:  # in its place, to the same size
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert vectors(store, "p0")[0, -1, -1] == 0
    shutil.rmtree(folder / "p0")
    assert isinstance(error_of(store, "p0"), CheckpointError)
    assert store.held == ["p1"]
    old = first["p0"].prompt()
    assert isinstance(old, Embeddings)
    assert torch.equal(old.vectors[0], table(0))


def test_a_file_that_is_shortened_while_it_is_used(folder: Path) -> None:
    store = PromptStore(folder)
    found = vectors(store, "p0")
    with (folder / "p0" / WEIGHTS).open("r+b") as file:
        file.truncate(0)
    assert torch.equal(found[0], table(0))
    assert isinstance(error_of(store, "p0"), CheckpointError)


def test_a_mapped_file_that_is_replaced_or_deleted_while_it_is_used(folder: Path) -> None:
    store = PromptStore(folder, mapped=True)
    found = [vectors(store, f"p{number}") for number in range(2)]
    write(folder / "p0", 50)
    shutil.rmtree(folder / "p1")
    assert torch.equal(vectors(store, "p0")[0], table(50))
    assert isinstance(error_of(store, "p1"), CheckpointError)
    assert torch.equal(found[0][0], table(0))
    assert torch.equal(found[1][0], table(1))
    assert store.nbytes == BYTES


def test_a_folder_that_is_switched(folder: Path) -> None:
    (folder / "current").symlink_to("p0")
    store = PromptStore({"a": folder / "current"})
    assert torch.equal(vectors(store, "a")[0], table(0))
    (folder / "next").symlink_to("p1")
    (folder / "next").replace(folder / "current")
    assert torch.equal(vectors(store, "a")[0], table(1))


# ---- the limit ---------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_and_its_memory_with_it(folder: Path) -> None:
    store = PromptStore(folder, max_bytes=3 * BYTES)
    for number in range(3):
        vectors(store, f"p{number}")
    vectors(store, "p0")
    kept = vectors(store, "p2")
    gone = weakref.ref(store.load(["p1"], GEOMETRY)[0]["p1"])
    vectors(store, "p0")
    vectors(store, "p2")
    vectors(store, "p3")
    assert store.held == ["p0", "p2", "p3"]
    assert store.nbytes == 3 * BYTES
    assert gone() is None
    vectors(store, "p4")
    vectors(store, "p5")
    vectors(store, "p6")
    assert store.held == ["p4", "p5", "p6"]
    assert torch.equal(kept[0], table(2))


def test_more_names_than_the_limit_holds_are_all_there(folder: Path) -> None:
    store = PromptStore(folder, max_bytes=BYTES)
    good, bad = store.load(store, GEOMETRY)
    assert not bad
    assert len(good) == 8
    assert store.held == ["p7"]
    for number in range(8):
        prompt = good[f"p{number}"].prompt()
        assert isinstance(prompt, Embeddings)
        assert torch.equal(prompt.vectors[0], table(number))


def test_a_prompt_larger_than_the_limit_is_not_even_read(folder: Path) -> None:
    store = PromptStore(folder, max_bytes=BYTES - 1)
    (folder / "p0" / WEIGHTS).unlink()  # what would be found missing
    message = str(error_of(store, "p0"))
    assert message == "the prompt 'p0' needs 512 bytes, but the store may hold 511; raise max_bytes."


def test_what_is_derived_counts_and_goes_with_its_prompt(folder: Path) -> None:
    store = PromptStore(folder, max_bytes=4 * BYTES)
    loaded = store.load(["p0"], GEOMETRY)[0]["p0"]
    calls: list[int] = []

    def compute() -> KV:
        calls.append(1)
        part = torch.zeros(1, 4, TOKENS, 8)
        return KV(((part, part.clone()),))

    size = 2 * BYTES
    found = store.derived(loaded, ("kv", "cpu"), compute)
    assert store.derived(loaded, ("kv", "cpu"), compute) is found
    assert (len(calls), store.nbytes) == (1, BYTES + size)
    other = store.derived(loaded, ("kv", "other"), compute)  # does not fit beside them
    assert other is not found
    assert (len(calls), store.nbytes) == (2, BYTES + size)
    gone = weakref.ref(found.layers[0][0])
    del found
    vectors(store, "p1")
    assert gone() is not None
    vectors(store, "p2")
    assert gone() is None
    assert store.held == ["p1", "p2"]
    assert store.nbytes == 2 * BYTES
    store.derived(loaded, ("kv", "cpu"), compute)  # of a prompt that is no longer held: not kept
    assert store.nbytes == 2 * BYTES
    again = store.load(["p0"], GEOMETRY)[0]["p0"]
    store.derived(again, ("kv", "cpu"), compute)
    assert len(calls) == 4
    assert store.held == ["p2", "p0"]


def test_what_could_not_be_derived_is_tried_again(folder: Path) -> None:
    store = PromptStore(folder)
    loaded = store.load(["p0"], GEOMETRY)[0]["p0"]
    with pytest.raises(ZeroDivisionError):
        store.derived(loaded, "kv", lambda: 1 / 0)
    assert torch.equal(store.derived(loaded, "kv", lambda: torch.ones(1)), torch.ones(1))


def test_shared_memory_counts_once() -> None:
    whole = torch.zeros(8, 4)
    assert size_of(Embeddings(whole[None, :2], decoder=whole[None, 2:])) == 8 * 4 * 4
    assert size_of({"a": [whole, whole.T], "b": (torch.zeros(2), None, 3)}) == 8 * 4 * 4 + 2 * 4


# ---- threads -----------------------------------------------------------------------------------------------------


def run_threads(count: int, work: Callable[[int], None]) -> None:
    """All at once; what one of them raises is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def body(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_with_a_tiny_limit_get_the_right_values(folder: Path) -> None:
    store = PromptStore(folder, max_bytes=5 * BYTES)

    def work(number: int) -> None:
        random = torch.Generator().manual_seed(number)
        for _ in range(60):
            chosen = torch.randint(0, 9, (3,), generator=random).tolist()
            good, bad = store.load([f"p{each}" for each in chosen], GEOMETRY)
            assert set(bad) == {f"p{each}" for each in chosen if each == 8}
            for each in set(chosen) - {8}:
                loaded = good[f"p{each}"]
                prompt = loaded.prompt()
                assert isinstance(prompt, Embeddings)
                assert torch.equal(prompt.vectors[0], table(each))
                twice = store.derived(loaded, "twice", lambda prompt=prompt: prompt.vectors * 2)
                assert torch.equal(twice[0], 2 * table(each))
            assert store.nbytes <= 5 * BYTES

    run_threads(8, work)
    held = [store.load([name], GEOMETRY)[0][name].nbytes for name in list(store.held)]
    assert sum(held) <= store.nbytes <= 5 * BYTES


def test_while_files_are_replaced_every_answer_is_whole(folder: Path) -> None:
    """Prompt and config of the same write: the table is i, and so is what the config says it came from."""
    store = PromptStore({"a": folder / "p0"}, max_bytes=BYTES)
    write(folder / "p0", 0, replace(CONFIG, revision="0"))
    done = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            for turn in range(1, 40):
                write(folder / "p0", turn, replace(CONFIG, revision=str(turn)))
            done.set()
        while not done.is_set():
            good, bad = store.load(["a"], GEOMETRY)
            for error in bad.values():
                assert "change while they are read" in str(error)
            for loaded in good.values():
                prompt = loaded.prompt()
                assert isinstance(prompt, Embeddings)
                assert torch.equal(prompt.vectors[0], table(float(loaded.config.revision or -1)))

    run_threads(4, work)
    assert torch.equal(vectors(store, "a")[0], table(39))


def test_many_threads_that_ask_at_once_make_one_prompt_and_derive_once(folder: Path) -> None:
    for _ in range(5):
        store = PromptStore(folder)
        found, derived, calls = [], [], []

        def compute(calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return torch.ones(3)

        def work(number: int, store: Any = store, found: Any = found, derived: Any = derived) -> None:
            loaded = store.load(["p3"], GEOMETRY)[0]["p3"]
            found.append(loaded)
            derived.append(store.derived(loaded, "ones", compute))

        run_threads(8, work)
        assert len({id(each) for each in found}) == len({id(each) for each in derived}) == len(calls) == 1


def test_nobody_waits_for_what_another_prompt_derives(folder: Path) -> None:
    store = PromptStore(folder)
    good, _ = store.load(["p0", "p1"], GEOMETRY)

    def slow() -> Tensor:
        """Needs, from another thread, all that a store can do."""
        thread = threading.Thread(target=others)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive()
        return torch.zeros(1)

    def others() -> None:
        assert torch.equal(vectors(store, "p0")[0], table(0))
        assert torch.equal(vectors(store, "p5")[0], table(5))
        store.derived(good["p1"], "ones", lambda: torch.ones(1))
        store.register("new", folder / "p6")
        store.remove("new")

    store.derived(good["p0"], "zeros", slow)
    assert store.derived(good["p0"], "nested", lambda: store.derived(good["p0"], "inner", lambda: torch.ones(1))) == 1
