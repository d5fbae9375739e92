"""`softprompt.serve.storage`: adapters in shared storage reach a folder whole or not at all, and nothing else does."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save
from tiny import build

from softprompt import (
    CheckpointError,
    ConfigError,
    PromptTuningConfig,
    SoftPromptError,
    SoftPromptModel,
    get_peft_model,
)
from softprompt.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from softprompt.serve import adapters as adapters_module
from softprompt.serve import storage
from softprompt.serve.storage import STATE, Mirrored, main, mirror


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where adapters can be put, in each of two storages."""
    if request.param == "file":
        (tmp_path / "remote").mkdir()
        yield f"file://{tmp_path}/remote"
        return
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield "memory://bucket/prompts"
    memory.store.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of three prompts that differ in their numbers alone."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        place = tmp_path_factory.mktemp("adapter")
        get_peft_model(build("llama"), PromptTuningConfig(num_virtual_tokens=4)).save_pretrained(place)
        found.append({name: (place / name).read_bytes() for name in (WEIGHTS_NAME, CONFIG_NAME)})
    return found


def put(url: str, name: str, files: dict[str, bytes]) -> None:
    for file, data in files.items():
        with fsspec.open(f"{url}/{name}/{file}", "wb", auto_mkdir=True) as stream:
            stream.write(data)


def drop(url: str, name: str, *files: str) -> None:
    fs, root = fsspec.url_to_fs(url)
    for file in files or (WEIGHTS_NAME, CONFIG_NAME):
        fs.rm(f"{root}/{name}/{file}")


def local(folder: Path) -> dict[str, bytes]:
    """Every file of the folder but the mirror's own, by its relative path."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != STATE]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def expected(**names: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name.replace('__', '/')}/{file}": data for name, files in names.items() for file, data in files.items()}


def test_adapters_come_change_and_go(url: str, folder: Path, adapters: list[dict[str, bytes]]) -> None:
    put(url, "a", adapters[0])
    put(url, "team/b", adapters[1])
    assert mirror(url, folder) == Mirrored(added=["a", "team/b"])
    assert local(folder) == expected(a=adapters[0], team__b=adapters[1])
    loaded = SoftPromptModel.from_pretrained(build("llama"), folder / "team" / "b")
    assert loaded.active_peft_config.num_virtual_tokens == 4

    assert mirror(url, folder) == Mirrored()
    put(url, "a", adapters[2])
    assert mirror(url, folder) == Mirrored(replaced=["a"])
    assert local(folder) == expected(a=adapters[2], team__b=adapters[1])

    drop(url, "team/b")
    assert mirror(url, folder) == Mirrored(removed=["team/b"])
    assert local(folder) == expected(a=adapters[2])
    assert not (folder / "team").exists()


def test_an_adapter_inside_another_ones_folder_stays_when_that_goes(
    url: str, folder: Path, adapters: list[dict[str, bytes]]
) -> None:
    put(url, "a", adapters[0])
    put(url, "a/b", adapters[1])
    mirror(url, folder)
    drop(url, "a")
    assert mirror(url, folder) == Mirrored(removed=["a"])
    assert local(folder) == expected(a__b=adapters[1])


def test_what_is_lost_here_is_fetched_again(url: str, folder: Path, adapters: list[dict[str, bytes]]) -> None:
    put(url, "a", adapters[0])
    mirror(url, folder)
    (folder / "a" / WEIGHTS_NAME).unlink()
    mirror(url, folder)
    assert local(folder) == expected(a=adapters[0])


def test_the_same_with_s3(folder: Path, adapters: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, against moto's server: `pip install s3fs 'moto[server]'`."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(
        port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    try:
        url = "s3://bucket/prompts"
        put_state(folder, url)
        with pytest.raises(CheckpointError, match=r"cannot be listed|holds no adapter"):  # there is no such bucket
            mirror(url, folder)
        (folder / STATE).unlink()
        fsspec.filesystem("s3").mkdir("bucket")
        put(url, "a", adapters[0])
        put(url, "team/b", adapters[1])
        put(url, "a/../../out", adapters[1])
        done = mirror(url, folder)
        assert done.added == ["a", "team/b"] and list(done.refused) == ["a/../../out"]
        assert mirror(url, folder).added == mirror(url, folder).replaced == []
        put(url, "a", adapters[2])
        drop(url, "team/b")
        done = mirror(url, folder)
        assert (done.replaced, done.removed) == (["a"], ["team/b"])
        assert local(folder) == expected(a=adapters[2])
    finally:
        server.stop()


def put_state(folder: Path, url: str) -> None:
    """As if an adapter had come from there before."""
    folder.mkdir()
    (folder / STATE).write_text(json.dumps({"url": url, "adapters": {"old": {CONFIG_NAME: "0"}}}))


GARBAGE: dict[str, dict[str, bytes]] = {
    "cut short": {WEIGHTS_NAME: b"\x08\x00\x00\x00\x00\x00\x00\x00{}"},
    "another prompt's size": {WEIGHTS_NAME: save({"prompt_embeddings": torch.zeros(3, 5)})},
    "no number": {WEIGHTS_NAME: save({"prompt_embeddings": torch.full((4, 32), float("nan"))})},
    "no config": {CONFIG_NAME: b"[]"},
    "an unknown method": {CONFIG_NAME: b'{"peft_type": "LORA", "r": 4}'},
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_refused_and_the_old_version_stays(
    what: str, folder: Path, tmp_path: Path, adapters: list[dict[str, bytes]]
) -> None:
    url = f"file://{tmp_path}/remote"
    put(url, "a", adapters[0])
    put(url, "b", adapters[1])
    mirror(url, folder)
    put(url, "a", GARBAGE[what])
    put(url, "b", adapters[2])
    done = mirror(url, folder)
    assert list(done.refused) == ["a"] and done.replaced == ["b"] and not done.removed
    assert f"{url}/a" in done.refused["a"] and str(tmp_path / "remote") in done.refused["a"]
    assert local(folder) == expected(a=adapters[0], b=adapters[2])
    put(url, "a", adapters[0])
    assert mirror(url, folder) == Mirrored(replaced=["a"])  # its stamps are new, its content is the old one


def test_names_are_those_that_the_library_serves() -> None:
    assert (storage._NAME.pattern, storage._MAX_NAME) == (adapters_module._NAME.pattern, adapters_module.MAX_NAME)


@pytest.mark.parametrize("missing", [WEIGHTS_NAME, CONFIG_NAME])
def test_half_an_adapter_is_none(url: str, folder: Path, missing: str, adapters: list[dict[str, bytes]]) -> None:
    put(url, "a", adapters[0])
    mirror(url, folder)
    drop(url, "a", missing)
    put(url, "b", {name: data for name, data in adapters[1].items() if name != missing})
    done = mirror(url, folder)
    assert set(done.refused) == {"a", "b"} and all(missing in why for why in done.refused.values())
    assert local(folder) == expected(a=adapters[0])


HOSTILE = ["../out", "a/../../out", ".hidden", "a b", "a\nb", "-rf", "ü", "a\\b", "x" * 129, "a/./b", "~root"]


def test_hostile_keys_touch_nothing(folder: Path, tmp_path: Path, adapters: list[dict[str, bytes]]) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    put("memory://bucket/prompts", "good", adapters[0])
    for name in HOSTILE:
        path = f"/bucket/prompts/{name}"
        for file, data in adapters[1].items():
            memory.store[f"{path}/{file}"] = type(memory.store[f"/bucket/prompts/good/{CONFIG_NAME}"])(
                memory, f"{path}/{file}", data
            )
    before = set(tmp_path.rglob("*"))
    done = mirror("memory://bucket/prompts", folder)
    assert done.added == ["good"] and set(done.refused) == set(HOSTILE)
    assert all("cannot name a prompt" in why for why in done.refused.values())
    assert local(folder) == expected(good=adapters[0])
    new = set(tmp_path.rglob("*")) - before
    assert new == {folder, folder / STATE, folder / "good", *(folder / "good" / file for file in adapters[0])}
    assert all("\n" not in line for line in done.lines())
    memory.store.clear()


def test_a_link_below_the_folder_is_not_followed(url: str, folder: Path, adapters: list[dict[str, bytes]]) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    folder.mkdir()
    (folder / "team").symlink_to(outside)
    put(url, "team/a", adapters[0])
    assert "is a link" in mirror(url, folder).refused["team/a"]
    assert not any(outside.iterdir())


def test_an_empty_storage_removes_nothing(url: str, folder: Path, adapters: list[dict[str, bytes]]) -> None:
    put(url, "a", adapters[0])
    mirror(url, folder)
    drop(url, "a")
    with pytest.raises(CheckpointError, match="holds no adapter any more, so nothing was removed"):
        mirror(url, folder)
    assert local(folder) == expected(a=adapters[0])


def test_a_listing_that_leaves_an_adapter_out_removes_nothing(
    folder: Path, tmp_path: Path, adapters: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fsspec's walk does with a folder that cannot be read."""
    url = f"file://{tmp_path}/remote"
    put(url, "a", adapters[0])
    put(url, "b", adapters[1])
    mirror(url, folder)
    whole = storage._Source._below

    def partly(self: Any, name: str = "") -> Any:
        return {path: info for path, info in whole(self, name).items() if not path.startswith("b/")}

    monkeypatch.setattr(storage._Source, "_below", partly)
    assert mirror(url, folder) == Mirrored()
    assert local(folder) == expected(a=adapters[0], b=adapters[1])


def test_an_adapter_that_changes_while_it_is_read_waits(
    folder: Path, adapters: list[dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer has replaced the weights and not yet the config."""
    url = f"file://{tmp_path}/remote"
    put(url, "a", adapters[0])
    local_files = type(fsspec.filesystem("file"))
    read = local_files.cat_file

    def interrupted(self: Any, path: str, *rest: Any, **more: Any) -> bytes:
        data = read(self, path, *rest, **more)
        if path.endswith(WEIGHTS_NAME):
            put(url, "a", {WEIGHTS_NAME: adapters[1][WEIGHTS_NAME]})
        return data

    with monkeypatch.context() as patch:
        patch.setattr(local_files, "cat_file", interrupted)
        assert "changed while it was read" in mirror(url, folder).refused["a"]
        assert local(folder) == {}
    assert mirror(url, folder) == Mirrored(added=["a"])
    assert local(folder)[f"a/{WEIGHTS_NAME}"] == adapters[1][WEIGHTS_NAME]


def test_adapters_of_others_are_left_alone(url: str, folder: Path, adapters: list[dict[str, bytes]]) -> None:
    put(url, "same", adapters[0])
    put(url, "other", adapters[0])
    for name, files in {"same": adapters[0], "other": adapters[1], "mine": adapters[2]}.items():
        put(f"file://{folder}", name, files)
    done = mirror(url, folder)
    assert done.added == ["same"] and "did not come from" in done.refused["other"]
    drop(url, "other")
    assert mirror(url, folder) == Mirrored()
    assert local(folder) == expected(same=adapters[0], other=adapters[1], mine=adapters[2])


def test_a_disk_that_is_full_changes_nothing(
    url: str, folder: Path, adapters: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(url, "a", adapters[0])
    mirror(url, folder)
    put(url, "a", adapters[1])

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("softprompt.checkpoint.files._write", full)
        assert "No space left" in mirror(url, folder).refused["a"]
    assert local(folder) == expected(a=adapters[0])
    assert mirror(url, folder) == Mirrored(replaced=["a"])


def test_wrong_addresses_say_so(tmp_path: Path, folder: Path, adapters: list[dict[str, bytes]]) -> None:
    with pytest.raises(ConfigError, match="not an address of fsspec's"):
        mirror("nowhere://bucket", folder)
    put(f"file://{tmp_path}/one", "a", adapters[0])
    mirror(f"file://{tmp_path}/one", folder)
    with pytest.raises(ConfigError, match=r"mirrors .*one, not .*two"):
        mirror(f"file://{tmp_path}/two", folder)
    for damaged in ("{", "[]", '{"url": "x", "adapters": {"../x": {}}}'):
        (folder / STATE).write_text(damaged)
        with pytest.raises(SoftPromptError, match="is damaged; delete it"):
            mirror(f"file://{tmp_path}/one", folder)


def test_the_program(
    tmp_path: Path, folder: Path, adapters: list[dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/remote"
    put(url, "a", adapters[0])
    put(url, "b", {CONFIG_NAME: b"{}"})
    assert main([url, str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == "added a\n" and err.startswith("refused 'b': it has no adapter_model.safetensors")
    assert main(["nowhere://x", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere://x")
