"""The library of prompts: what it serves while somebody else changes the folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
import tiny
import torch
from library_kit import base, copies, lent, library, put, row_of, table_of
from store_kit import CONFIG, WEIGHTS, table, write

from softprompt import MultitaskPromptTuningConfig, PrefixTuningConfig, PromptStore, get_peft_model
from softprompt.checkpoint import save_adapter
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.serve.adapters import settled
from softprompt.serve.base import LentBase
from softprompt.serve.library import Changes, PromptLibrary, UnknownPromptError
from softprompt.serve.watch import watching
from softprompt.store.stamps import stamps_of

__all__ = ["base", "library"]  # fixtures


def test_a_folder_of_adapters_is_served(library: PromptLibrary, tmp_path: Path) -> None:
    assert library.names() == ["a", "b/c"]
    version = library.get("b/c")
    assert torch.equal(table_of(version), table(2))
    assert (version.method, version.length, version.slots, version.warning) == ("prompt_tuning", 4, False, None)
    assert version.folder == tmp_path / "objects" / version.digest
    assert version.source == tmp_path / "prompts" / "b" / "c"
    assert sorted(os.listdir(version.folder)) == ["adapter_config.json", WEIGHTS]
    assert copies(tmp_path / "objects") == {library.get(name).digest for name in library.names()}
    assert row_of(library, "a") == {
        "name": "a", "state": "served", "digest": library.get("a").digest, "length": 4, "method": "prompt_tuning",
        "slots": False, "error": None, "warning": None,
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
    half = one.half()
    typed = {"half": half, "brain": half.view(torch.bfloat16)}  # of the same bytes
    for name, values in {"one": one, "other": other, "minus": minus, "again": one, **typed}.items():
        put(prompts / name, values)
    save_adapter(prompts / "placed", replace(CONFIG, placement="after_bos"), {"prompt_embeddings": one})
    (prompts / "old").mkdir()
    shutil.copy(prompts / "one" / "adapter_config.json", prompts / "old")
    torch.save({"prompt_embeddings": one}, prompts / "old" / "adapter_model.bin")
    assert torch.equal(half.float(), one)  # half differs in its type alone

    bases = [lent(), lent(fingerprint="e" * 64), lent(dtype=torch.bfloat16)]
    found = []
    for each in bases:
        library = PromptLibrary(prompts, each, tmp_path / "objects")
        assert not library.scan().refused
        digests = {name: library.get(name).digest for name in library.names()}
        assert digests.pop("again") == digests.pop("old") == digests["one"]
        found += digests.values()
    folded = PromptLibrary(prompts, bases[0], tmp_path / "objects", folded=True)
    folded.scan()
    found.append(folded.get("one").digest)
    assert len(set(found)) == len(found) == 3 * 6 + 1
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


def test_stamps_of_a_moment_ago_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system's clock has steps: a second change within one would not show."""
    stamps = stamps_of(str(write(tmp_path / "a", 1)))
    latest = max(stamp[4] for stamp in stamps if stamp is not None)
    for after, expected in ((0, False), (4_000_000, False), (1_000_000_000, True)):
        monkeypatch.setattr("time.time_ns", lambda after=after: latest + after)
        assert settled(stamps) is expected


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


@pytest.mark.parametrize(
    ("trained", "doubted"),
    [
        (None, False),
        ("tiny", False),
        ("someone/tiny", False),
        ("/elsewhere/tiny/", False),
        ("/cache/models--someone--tiny/snapshots/0f3e", False),
        ("gpt2", True),
        ("/tiny/checkpoint-40", True),
    ],
)
def test_a_prompt_of_a_model_of_another_name_is_served_with_a_warning(
    library: PromptLibrary, tmp_path: Path, caplog: pytest.LogCaptureFixture, trained: str | None, doubted: bool
) -> None:
    """Its shape fits, and the folder of the same model may have been renamed."""
    config = replace(CONFIG, base_model_name_or_path=trained)
    save_adapter(tmp_path / "prompts" / "of", config, {"prompt_embeddings": table(7)})
    library.scan()
    warning = row_of(library, "of")["warning"]
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if doubted:
        assert f"trained before {str(trained).rsplit('/', 1)[-1]!r}" in str(warning) and "'tiny'" in str(warning)
        assert [str(warning) in message for message in warned] == [True]
    else:
        assert warning is None and not warned


def test_what_is_below_a_folder_that_cannot_be_listed_for_a_moment_stays(
    library: PromptLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a network disk is away."""
    before, real, away = library.get("b/c"), os.scandir, str(tmp_path / "prompts" / "b")

    def scandir(path: str) -> object:
        if str(path) == away:
            raise PermissionError(13, "Permission denied")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr("softprompt.serve.adapters.os.scandir", scandir)
        changes = library.scan()
        assert not changes.removed and "cannot be read" in changes.refused["b"]
        assert library.get("b/c") == before
    assert not library.scan() and library.names() == ["a", "b/c"]
    assert [row["name"] for row in library.listing()] == ["a", "b/c"]
    shutil.rmtree(away)
    assert set(library.scan().removed) == {"b/c"}


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
    good, bad = store.load(["whole", "many:0", "many:1", "many:2", "single"], base.facts)
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
