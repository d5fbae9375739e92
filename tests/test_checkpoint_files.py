"""Files are saved whole or not at all: whatever fails, whenever the process dies, an adapter is left that loads."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import CONFIGS, listing, prompt
from torch import Tensor

from softprompt.checkpoint import files as checkpoint_files
from softprompt.checkpoint import read_kv_file, save_adapter, write_tensors
from softprompt.errors import CheckpointError
from softprompt.methods import PromptEncoder
from softprompt.prompt import KV


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path: Path) -> None:
    broken = {"prompt_embeddings": torch.full((3, 8), float("nan"))}
    for tensors, reason in [(broken, "24 of the 24 numbers"), ({}, "has no tensor"), (prompt("prefix"), "has shape")]:
        with pytest.raises(CheckpointError, match=reason):
            save_adapter(tmp_path / "adapter", CONFIGS["prompt_tuning"], tensors)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write", "fsync", "first rename", "last rename"])
def test_a_failing_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: str
) -> None:
    encoder = PromptEncoder(CONFIGS["p_tuning_mlp"])  # pyright: ignore[reportArgumentType]
    save_adapter(tmp_path, CONFIGS["p_tuning_mlp"], prompt(), encoder.state_dict())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _fail_at(monkeypatch, step, error)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_adapter(tmp_path, CONFIGS["p_tuning_mlp"], prompt())
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if isinstance(error, OSError):
        assert str(tmp_path) in str(caught.value)
        assert "No space left on device" in str(caught.value)


def _fail_at(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    write, replace_file = checkpoint_files._write, Path.replace

    def failing_write(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])
        raise error

    def failing_fsync(handle: int) -> None:
        raise error

    def failing_replace(self: Path, target: Path) -> Path:
        wanted = "adapter_model.safetensors" if step == "first rename" else "adapter_config.json"
        if Path(target).name == wanted and self.name.endswith(".new"):
            raise error
        return replace_file(self, target)

    if step == "write":
        monkeypatch.setattr(checkpoint_files, "_write", failing_write)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", failing_fsync)
    else:
        monkeypatch.setattr(Path, "replace", failing_replace)


def test_a_limit_of_the_system(tmp_path: Path) -> None:
    """A real failure in the middle of a write; a full disk looks the same."""
    resource = pytest.importorskip("resource")
    save_adapter(tmp_path, CONFIGS["prompt_tuning"], prompt())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=f"{tmp_path}: saving failed .File too large. and changed nothing"):
            save_adapter(tmp_path, CONFIGS["prompt_tuning"], prompt())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


_DYING = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from test_checkpoint import CONFIGS, PromptEncoder, load_adapter, save_adapter
os.fsync = lambda handle: None  # there is no power to fail here
folder = Path(sys.argv[1])
torch.manual_seed(0)
encoders = [PromptEncoder(CONFIGS["p_tuning_mlp"]) for _ in range(2)]
prompts = [{{"prompt_embeddings": encoder.saved_vectors()}} for encoder in encoders]
steps = 0
for last in range(100):
    save_adapter(folder, CONFIGS["p_tuning_mlp"], prompts[0], encoders[0].state_dict())
    child = os.fork()
    if child == 0:
        def count(event, args):
            global steps
            steps += event in ("os.rename", "os.remove", "os.link") or (event == "open" and args[0] != "r")
            if steps > last:
                os._exit(9)
        sys.addaudithook(count)
        save_adapter(folder, CONFIGS["p_tuning_mlp"], prompts[1], encoders[1].state_dict())
        os._exit(0)
    finished = os.waitpid(child, 0)[1] == 0
    saved = load_adapter(folder)
    which = [torch.equal(saved.tensors["prompt_embeddings"], each["prompt_embeddings"]) for each in prompts]
    assert any(which)
    if saved.encoder is not None:
        kept = encoders[which.index(True)].state_dict()
        assert all(torch.equal(saved.encoder[name], kept[name]) for name in kept)
    if finished:
        print("died", last, "times")
        break
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_dies_anywhere_leaves_an_adapter_that_loads(tmp_path: Path, root: Path) -> None:
    """Killed before each open, link, rename and removal in turn: what is found is the old prompt or the new one."""
    script = _DYING.format(tests=str(root / "tests"), root=str(root))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 8


def test_a_failing_first_save_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_at(monkeypatch, "last rename", OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match="No space left"):
        save_adapter(tmp_path / "adapter", CONFIGS["prompt_tuning"], prompt())
    assert listing(tmp_path) == []


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'file'}: saving failed"):
        save_adapter(tmp_path / "file", CONFIGS["prompt_tuning"], prompt())
    (tmp_path / "a" / "adapter_config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is a folder"):
        save_adapter(tmp_path / "a", CONFIGS["prompt_tuning"], prompt())
    assert listing(tmp_path / "a") == ["adapter_config.json"]


def test_saving_without_links_keeps_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have no hard links."""
    save_adapter(tmp_path, CONFIGS["prompt_tuning"], prompt())
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def no_links(*names: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    _fail_at(monkeypatch, "last rename", OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError):
        save_adapter(tmp_path, CONFIGS["prompt_tuning"], prompt())
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert listing(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]


# Key-value files -----------------------------------------------------------------------------------------------------


def test_a_key_value_file(tmp_path: Path) -> None:
    pairs = tuple((torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)) for _ in range(2))
    KV(pairs).save(tmp_path / "prompt.safetensors")
    loaded = KV.load(tmp_path / "prompt.safetensors")
    assert all(
        torch.equal(a, b) for one, two in zip(pairs, loaded.layers, strict=True) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "not a key-value prompt file"),
        ({"key.0": torch.ones(2, 3, 4)}, "not a key-value prompt file"),
        ({"key.0": torch.ones(2, 3, 4), "value.1": torch.ones(2, 3, 4)}, "not a key-value prompt file"),
        ({"key.0": torch.ones(2, 3, 4), "value.0": torch.ones(2, 2, 4)}, "value.0 has shape"),
        ({"key.0": torch.ones(2, 3, 4), "value.0": torch.ones(1, 3, 4)}, "value.0 has shape"),
        ({"key.0": torch.ones(3, 4), "value.0": torch.ones(3, 4)}, "has shape"),
        ({"key.0": torch.ones(2, 0, 4), "value.0": torch.ones(2, 0, 4)}, "has shape"),
        ({"key.0": torch.ones(2, 3, 4).int(), "value.0": torch.ones(2, 3, 4)}, "has type I32"),
    ],
)
def test_a_file_that_is_no_key_value_file(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    write_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        read_kv_file(tmp_path / "x.safetensors")


def test_a_key_value_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(CheckpointError, match="is not a file"):
            read_kv_file(path)
    (tmp_path / "x.safetensors").write_bytes(b"garbage that is longer than eight bytes")
    with pytest.raises(CheckpointError, match="damaged, cut short or of another format"):
        read_kv_file(tmp_path / "x.safetensors")
