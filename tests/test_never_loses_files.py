"""What a run leaves when its disk fails it: torn states, a full disk, a read-only one; and pairs of two saves."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from kill_kit import FORKS, NEVER, Calls, Moment, facts
from safetensors.torch import load_file
from test_train import Trap, recipe, workplace  # noqa: F401  (workplace is a fixture)

from softprompt import PromptEncoderConfig, SoftPromptModel, get_peft_model
from softprompt.checkpoint import load_adapter
from softprompt.errors import CheckpointError, ConfigError
from softprompt.train import train
from softprompt.train.run_folder import RunFolder
from softprompt.train.state_file import TornState, read_state, write_state
from softprompt.train.tuned_base import save_with_base, tune_base, tuned_base

# ---- torn states -----------------------------------------------------------------------------------------------------


def state(step: int) -> dict[str, Any]:
    return {"progress": {"step": step}, "trainable": {"prompt": torch.full((50, 3), float(step))}}


def saved(place: Path, *steps: int) -> RunFolder:
    run = RunFolder(place)
    for step in steps:
        run.save_state(state(step))
    return run


def test_the_last_two_states_are_kept(tmp_path: Path) -> None:
    run = saved(tmp_path, 100, 200, 300, 1_000_000_000)
    names = ["step-00000300.pt", "step-1000000000.pt"]
    assert sorted(os.listdir(tmp_path / "checkpoint")) == names
    found = run.load_state()
    assert found is not None
    assert found["progress"] == {"step": 1_000_000_000}
    assert torch.equal(found["trainable"]["prompt"], state(1_000_000_000)["trainable"]["prompt"])


@pytest.mark.parametrize("left", [0, 1, 4, 0.5, -74, -73, -72, -40, -2, -1])
def test_a_state_cut_anywhere_is_torn(tmp_path: Path, left: float) -> None:
    run, told = saved(tmp_path, 100, 200), []
    whole = run.state_path(200).read_bytes()
    run.state_path(200).write_bytes(whole[: int(left) if left != 0.5 else len(whole) // 2])
    found = run.load_state(told.append)
    assert found is not None
    assert found["progress"] == {"step": 100}
    assert told == [f"the state of step 200, {run.state_path(200)}, is torn (it ends too early) and skipped"]


def test_a_state_with_any_other_bit_is_torn(tmp_path: Path) -> None:
    run = saved(tmp_path, 100)
    whole, path = run.state_path(100).read_bytes(), run.state_path(100)
    for place in [*range(0, len(whole), len(whole) // 97), *range(len(whole) - 74, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(TornState):
            read_state(path)
    for other in (whole + b"\n", whole + whole, whole[:-500] + bytes(500), bytes(len(whole))):
        path.write_bytes(other)
        with pytest.raises(TornState):
            read_state(path)


def test_where_no_state_is_whole_nothing_is_thrown_away(tmp_path: Path) -> None:
    run, told = saved(tmp_path, 100, 200), []
    for step in (100, 200):
        run.state_path(step).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no state in .*checkpoint is whole; delete .* to train again from the"):
        run.load_state(told.append)
    assert len(told) == 2
    shutil.rmtree(tmp_path / "checkpoint")
    assert run.load_state() is None


def test_states_of_other_versions_and_of_strangers(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    torch.save({"version": 1}, tmp_path / "checkpoint" / "state.pt")
    run = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"state.pt was not written by this version"):
        run.load_state()
    for content, message in [({"trap": Trap(tmp_path / "sprung")}, "is damaged"), ({"version": 99}, "by this version")]:
        with open(run.state_path(3), "wb") as file:
            write_state(file, content)
        with pytest.raises(CheckpointError, match=message):
            run.load_state()
    assert not (tmp_path / "sprung").exists()


def test_going_back_drops_what_is_later_and_half_written(tmp_path: Path) -> None:
    run = saved(tmp_path, 2, 4)
    for step in range(5):
        run.log({"step": step})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "lo\x00\xff')  # a line that lost its end, as a machine without power leaves it
    rest = [".samples.json.12.tmp", ".0123456789ab.adapter_config.json.new", "checkpoint/.step-00000004.pt.7.tmp"]
    mine = [".git", "notes.tmp", "checkpoint/mine.pt"]
    for name in (*rest, *mine):
        (tmp_path / name).touch()
    run.rewind(2)
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    assert [step for step, _ in run.states()] == [2]
    assert not [name for name in rest if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in mine)
    run.rewind(0)
    assert run.metrics() == []


# ---- full and read-only disks ----------------------------------------------------------------------------------------


@contextmanager
def disk(place: Path, size: str) -> Iterator[Path]:
    """A small disk of its own, in memory; skips where mounting is not permitted."""
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("no disk to fill: mounting takes root")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no disk to fill: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
def test_a_full_disk_ends_the_run_and_keeps_the_last_state(workplace: Path, tmp_path: Path, tuned: bool) -> None:  # noqa: F811
    options: dict[str, Any] = {"steps": 8, "save_steps": 2, "eval_steps": 2}
    options |= {"base_learning_rate": 1e-3, "method": "p_tuning"} if tuned else {}
    straight = train(recipe(workplace, tmp_path / "straight", **options))
    with disk(tmp_path / "disk", "8m") as small:
        settings = recipe(workplace, small / "run", **options)

        def fill(row: dict[str, Any]) -> None:
            if row["step"] == 5:
                room = shutil.disk_usage(small).free
                (small / "filler").write_bytes(bytes(room))

        with pytest.raises(
            CheckpointError, match=r"(cannot be written:|failed) \(?No space left on device.*; free some"
        ):
            train(settings, on_step=fill)
        run = RunFolder(small / "run")
        assert [step for step, _ in run.states()] == [2, 4]
        assert all(read_state(path) for _, path in run.states())
        assert load_adapter(small / "run").tensors["prompt_embeddings"].isfinite().all()
        assert (tuned_base(small / "run") is not None) == tuned
        with pytest.raises(CheckpointError, match="No space left on device"):
            train(settings, resume=True)  # and again, while the disk is full
        (small / "filler").unlink()
        train(settings, resume=True)
        assert facts(small / "run") == facts(straight.folder)


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_ends_the_run_and_loses_nothing(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    options: dict[str, Any] = {"steps": 6, "save_steps": 2}
    straight = train(recipe(workplace, tmp_path / "straight", **options))
    with disk(tmp_path / "disk", "8m") as small:
        settings = recipe(workplace, small / "run", **options)

        def lock(row: dict[str, Any]) -> None:
            if row["step"] == 3:
                remount(small, "ro")

        with pytest.raises(CheckpointError, match=r"saving failed \(Read-only file system\) and changed nothing"):
            train(settings, on_step=lock)
        with pytest.raises(CheckpointError, match=r"recipe.yaml cannot be written: Read-only file system; free some"):
            train(settings, resume=True)
        with pytest.raises(ConfigError, match=r"the run folder .*other is not writable"):
            train(settings.replace(out=str(small / "other")))
        assert [step for step, _ in RunFolder(small / "run").states()] == [2]
        remount(small, "rw")
        train(settings, resume=True)
        assert facts(small / "run") == facts(straight.folder)


# ---- a base model and its prompt -------------------------------------------------------------------------------------


def pair(number: int, folder: Path) -> SoftPromptModel:
    """A prompt and a base model that both say which of several pairs they are of."""
    torch.manual_seed(0)
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=4)
    model = get_peft_model(tiny.build("llama"), config)
    tune_base(model, folder)
    with torch.no_grad():
        model.encoder().embedding.weight.fill_(float(number))  # type: ignore[union-attr]
        model.get_base_model().get_input_embeddings().weight.fill_(float(number))  # type: ignore[union-attr]
    return model


def save_pair(folder: Path, moment: Moment, writes: Any) -> None:
    """Save the second pair over the first, and tell in how many writes; killed at a moment."""
    torch.set_num_threads(1)
    model, tokenizer, calls = pair(2, folder), tiny.tokenizer(), Calls(moment, str(folder))
    calls.start()
    save_with_base(model, tokenizer, folder)
    calls.stop()
    writes.put(len(calls.marks))


def second_pair(folder: Path, moment: Moment = NEVER) -> tuple[int | None, int]:
    writes = FORKS.SimpleQueue()
    process = FORKS.Process(target=save_pair, args=(folder, moment, writes))
    process.start()
    process.join(100)
    return process.exitcode, writes.get() if process.exitcode == 0 else 0


def pair_in(folder: Path) -> tuple[float, float]:
    """Which prompt the folder holds, and which base model a reader of it gets."""
    base = tuned_base(folder)
    assert base is not None
    numbers = {name: number for number in (1, 2) for name in [_fingerprint(pair(number, folder))]}
    prompt = numbers[load_adapter(folder).tensors["prompt_embeddings"].sum().item()]
    weights = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert (base / "tokenizer.json").is_file()
    return float(prompt), weights[0, 0].item()


def _fingerprint(model: SoftPromptModel) -> float:
    return model.encoder().saved_tensors()["prompt_embeddings"].sum().item()


@pytest.mark.slow
def test_a_prompt_and_its_base_model_are_a_pair_at_every_moment(tmp_path: Path) -> None:
    """Killed before every single write, rename and removal of the second save."""
    first = tmp_path / "first"
    save_with_base(pair(1, first), tiny.tokenizer(), first)
    assert pair_in(first) == (1.0, 1.0)
    shutil.copytree(first, tmp_path / "whole")
    status, writes = second_pair(tmp_path / "whole")
    assert status == 0
    assert pair_in(tmp_path / "whole") == (2.0, 2.0)
    found = []
    for number in range(1, writes + 1):
        folder = tmp_path / f"killed{number}"
        shutil.copytree(first, folder)
        assert second_pair(folder, (number, 0))[0] == -9
        found.append(pair_in(folder))
        save_with_base(pair(2, folder), tiny.tokenizer(), folder)
        assert pair_in(folder) == (2.0, 2.0)
        assert tuned_base(folder) == folder / "base"
        assert not [path for path in folder.iterdir() if path.name.startswith("base.")]
    assert set(found) == {(1.0, 1.0), (2.0, 2.0)}
    assert found == sorted(found)


def test_a_mix_of_two_steps_is_told(tmp_path: Path) -> None:
    save_with_base(pair(1, tmp_path), tiny.tokenizer(), tmp_path)
    pair(2, tmp_path).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"base does not belong to the prompt beside it.*; resume the run, or copy"
    ):
        tuned_base(tmp_path)
    (tmp_path / "base" / "prompt.sha256").unlink()
    assert tuned_base(tmp_path) == tmp_path / "base"
