"""Several processes train what one process trains: the same losses, the same prompt, one folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import recipe, rows_of, workplace  # noqa: F401  (workplace is a fixture)

from softprompt.errors import ConfigError, TrainingError
from softprompt.recipe import Recipe
from softprompt.train import FREE_TO_CHANGE, train
from softprompt.train.distributed import Team, processes

FORKS = multiprocessing.get_context("forkserver")  # starts once, with everything imported
FORKS.set_forkserver_preload(["softprompt.train", "softprompt.train.finish", "test_train"])
STEPS = 16


class Stop:
    """Asks one process to stop, as a launcher does all."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def __call__(self, row: dict[str, Any]) -> None:
        if os.environ["RANK"] == str(self.rank) and row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def member(rank: int, size: int, port: int, runs: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """One process of several; trains the recipes one after the other."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    torch.set_num_threads(1)
    with processes("cpu"):  # joined once for all the runs
        for settings in runs:
            train(Recipe(**settings), **options)


def together(size: int, runs: list[Recipe], **options: Any) -> list[int | None]:
    """Train by so many processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [run.to_dict() for run in runs]
    members = [FORKS.Process(target=member, args=(rank, size, port, settings, options)) for rank in range(size)]
    for each in members:
        each.start()
    for each in members:
        each.join(200)
        if each.is_alive():
            each.kill()
    return [each.exitcode for each in members]


def cases(place: Path, out: Path, **changes: Any) -> dict[str, Recipe]:
    """Every kind of loss, by name. Batches of 6 leave a last one of 2 that four processes cannot share out."""
    common: dict[str, Any] = {"steps": STEPS, "batch_size": 6, "save_steps": 0, "eval_steps": STEPS // 2, **changes}
    kinds: dict[str, dict[str, Any]] = {
        "prefix": {"method": "prefix_tuning", "learning_rate": 0.02},
        "embeddings": {"method": "p_tuning", "learning_rate": 1e-3},
        "context": {"method": "cpt", "num_virtual_tokens": 24, "learning_rate": 1e-3, "optimizer": "adamw"},
        "labels": {"method": "prompt_tuning", "task": "SEQ_CLS", "learning_rate": 1e-2},
    }
    return {name: recipe(place, out / name, **{**common, **kind}) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def alone(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """The runs by one process."""
    place = tmp_path_factory.mktemp("alone")
    runs = cases(workplace, place)
    for run in runs.values():
        train(run)
    return {name: place / name for name in runs}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_the_same_losses_and_the_same_prompt(
    workplace: Path,  # noqa: F811
    tmp_path: Path,
    alone: dict[str, Path],
    size: int,
) -> None:
    runs = cases(workplace, tmp_path)
    assert together(size, list(runs.values())) == [0] * size
    for name, one in alone.items():
        for expected, row in zip(rows_of(one), rows_of(tmp_path / name), strict=True):
            assert row.keys() == expected.keys(), name
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, row["step"])
            for loss in row.keys() & {"loss", "eval_loss"}:
                assert abs(row[loss] - expected[loss]) <= 1e-5, (name, row["step"])
        prompts = [load_file(place / "adapter_model.safetensors") for place in (one, tmp_path / name)]
        for key, tensor in prompts[0].items():
            torch.testing.assert_close(prompts[1][key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
        summaries = [json.loads((place / "summary.json").read_text()) for place in (one, tmp_path / name)]
        assert summaries[1]["best"] == pytest.approx(summaries[0]["best"], rel=1e-4)
        assert (tmp_path / name / "report.html").is_file()
        assert not list((tmp_path / name).rglob("*.tmp"))


@pytest.mark.slow
def test_a_sharded_base_and_a_stream(workplace: Path, tmp_path: Path, alone: dict[str, Path]) -> None:  # noqa: F811
    """Each process holds a part of every weight and gets only its own rows of the file."""
    runs = {name: run.replace(shard=True) for name, run in cases(workplace, tmp_path).items() if name != "context"}
    order = {"steps": 6, "batch_size": 8, "shuffle_window": 16, "learning_rate": 0.02, "group_by_length": False}
    streamed = [recipe(workplace, tmp_path / name, streaming=True, **order) for name in ("by two", "by one")]
    assert together(2, [*runs.values(), streamed[0]]) == [0, 0]
    for name in runs:
        for expected, row in zip(rows_of(alone[name]), rows_of(tmp_path / name), strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, row["step"])
        one, other = (json.loads((place / "samples.json").read_text()) for place in (alone[name], tmp_path / name))
        assert one == other
    train(streamed[1])
    for expected, row in zip(rows_of(tmp_path / "by one"), rows_of(tmp_path / "by two"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_words_and_teachers_on_a_sharded_base(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    """Processes whose rows are of different tasks call the base alike: a call that one of them leaves out is a hang."""
    words = {"template": "{text} it was [MASK]", "verbalizer": {"0": "dog", "1": "cat"}, "target_column": "label"}
    words |= {"train": str(workplace / "labelled.jsonl"), "eval": str(workplace / "labelled.jsonl"), "samples": 0}
    cloze = recipe(workplace, tmp_path / "cloze", task="CLOZE", steps=2, shard=True, **words)
    files = {"train": str(workplace / "train.jsonl"), "template": "{who} => {said}"}
    several = {"tasks": {"a": files, "b": files}, "train": "", "eval": None, "template": None, "teacher": {"steps": 1}}
    both = recipe(workplace, tmp_path / "both", batch_size=3, steps=6, samples=0, shard=True, **several)
    assert together(2, [cloze, both]) == [0, 0]
    assert [len(rows_of(tmp_path / name)) for name in ("cloze", "both")] == [3, 7]


def bereaved(rank: int, port: int) -> None:
    """The first of two processes, whose second one ends without a word."""
    world = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    with pytest.raises(TrainingError, match="another process of this run has ended"), processes("cpu") as team:
        team.wait() if rank == 0 else os._exit(9)


@pytest.mark.slow
def test_a_process_that_is_left_alone_says_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [FORKS.Process(target=bereaved, args=(rank, port)) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    assert [each.exitcode for each in both] == [0, 9]


@pytest.mark.slow
def test_stopped_and_resumed_to_the_same_bits(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    """With dropout in the base and in the prompt, which every process draws for itself."""
    options = {"method": "p_tuning", "steps": 12, "method_options": {"encoder_reparameterization_type": "LSTM"}}
    whole, parts = (recipe(workplace, tmp_path / name, **options) for name in ("whole", "parts"))
    assert together(2, [whole]) == [0, 0]
    assert together(2, [parts], on_step=Stop(1, 5)) == [1, 1]  # an error that nobody catches: RunInterrupted
    assert len(rows_of(tmp_path / "parts")) == 6
    assert together(2, [parts], resume=True) == [0, 0]
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_more_processes_may_go_on(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = recipe(workplace, tmp_path / "run", steps=8)
    assert together(2, [settings], on_step=Stop(0, 4)) == [1, 1]
    result = train(settings, resume=True)
    assert [row["step"] for row in rows_of(result.folder)] == list(range(9))


def test_where_the_base_is_may_change_when_a_run_goes_on() -> None:
    assert {"device_map", "offload_folder", "max_memory", "shard", "shard_size"} <= set(FREE_TO_CHANGE)


@pytest.mark.slow
def test_one_process_tells_an_error_for_all(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert together(2, [recipe(workplace, tmp_path / "run")]) == [1, 2]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("torch.distributed.run", ["--nproc-per-node", "2", "-m", "softprompt.cli"]),
        ("accelerate.commands.launch", ["--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                                        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "softprompt.cli"]),
    ],
)  # fmt: skip
def test_launchers(workplace: Path, tmp_path: Path, launcher: str, options: list[str]) -> None:  # noqa: F811
    pytest.importorskip(launcher.split(".")[0])
    settings = recipe(workplace, tmp_path / "run", steps=4)
    (tmp_path / "recipe.yaml").write_text(settings.to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flag = "--master-port" if launcher.startswith("torch") else "--main_process_port"
    command = [sys.executable, "-m", launcher, flag, port, *options, "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Prompt and report") == 1  # one process speaks
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["processes"] == 2
    expected = train(settings.replace(out=str(tmp_path / "alone")))
    rows, single = rows_of(tmp_path / "run"), rows_of(expected.folder)
    assert rows[-1]["loss"] == pytest.approx(single[-1]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_MIXED_PRECISION", "bf16")]
)
def test_what_the_loop_does_not_do_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} is '{value}'"), processes():
        pass


@pytest.mark.parametrize(
    ("world", "fragment"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in"),
        ({"WORLD_SIZE": "2"}, "RANK is missing from"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is missing from"),
    ],
)
def test_an_incomplete_launch_is_refused(monkeypatch: pytest.MonkeyPatch, world: dict[str, str], fragment: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{fragment} .*torchrun"), processes():
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_no_process_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="device 'cuda:0' cannot be used"), processes("cuda"):
        pass


def test_a_process_has_its_own_gpu() -> None:
    assert Team(3, 4, 1).device("cuda") == "cuda:1"
    assert Team().device("cuda:2") == "cuda:2"
    with pytest.raises(ConfigError, match="device is 'cuda:0' for 4 processes"):
        Team(3, 4, 1).device("cuda:0")
