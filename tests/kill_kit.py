"""For the tests that kill: `softprompt` in real processes that end by a real SIGKILL, at a moment of our choosing.

The processes are forked from one that has imported everything, so that twenty of them take seconds. A moment is a
number of function calls, of Python or of C, after the start of the command or after one of its writes; unlike a time it
is the same whatever else the machine does, and it may fall between any two calls, a write and a rename included.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file

from softprompt.recipe import Recipe
from softprompt.train.run_folder import RunFolder

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["softprompt.train.finish", "tests.kill_warm"])
WRITES = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.link",
    "shutil.rmtree",
)  # audit events, told before they happen


Moment = tuple[int, int]
"""So many calls after the write of this number, the first being 1; after the start of the command for 0."""

NEVER: Moment = (0, 0)


class Calls:
    """Counts function calls, and kills its process at a moment; `marks` are the writes below `out`, by count."""

    def __init__(self, moment: Moment, out: str) -> None:
        (self.after, self.calls), self.out = moment, out
        self.count, self.kill_at = 0, 0 if self.after else self.calls
        self.marks: list[tuple[int, str, str]] = []

    def start(self) -> None:
        sys.addaudithook(self._audit)
        sys.setprofile(self._call)

    def stop(self) -> None:
        sys.setprofile(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES or not str(arguments[0]).startswith(self.out):
            return
        if event == "open" and not set(str(arguments[1])) & set("wax"):
            return
        path = os.path.relpath(str(arguments[0]), self.out)
        if len(self.marks) + 1 == self.after:
            if self.calls == 0:  # before the write itself
                os.kill(os.getpid(), signal.SIGKILL)
            self.kill_at = self.count + self.calls
        self.marks.append((self.count, event, path))


def _command(arguments: list[str], out: str, said: str, moment: Moment | None) -> None:
    """Run the command in this process, its words in the file `said`, what was counted in the one beside it."""
    from softprompt.cli import main

    torch.set_num_threads(1)
    words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    calls = Calls(moment or NEVER, out)
    if moment is not None:
        calls.start()
    status = main(arguments)
    calls.stop()
    Path(f"{said}.json").write_text(json.dumps([calls.count, calls.marks]))
    sys.exit(status)


@dataclass(frozen=True)
class Life:
    """A run that nobody disturbed: how many calls it made, and its writes below its folder as (call, event, path)."""

    folder: Path
    calls: int
    marks: list[tuple[int, str, str]]

    def write(self, path: str, event: str) -> int:
        """The number of the first write of this kind to a file with this in its path."""
        return next(n for n, (_, kind, where) in enumerate(self.marks, 1) if kind == event and path in where)

    def moments(self, seed: int, before: int, during: int, after: int) -> list[Moment]:
        """So many random moments before the folder is begun, while it trains, and while it finishes."""
        begin, finish = (self.marks[self.write(name, "open") - 1][0] for name in ("recipe.yaml", "samples.json"))
        spans = [(1, begin, before), (begin, finish, during), (finish, self.calls - self.calls // 200, after)]
        rng = random.Random(seed)
        return [(0, rng.randrange(start, end)) for start, end, count in spans for _ in range(count)]

    def inside(self, path: str, seed: int) -> Moment:
        """A random moment between the opening and the renaming of one of the files with this in their paths."""
        opened = {where: n for n, (_, event, where) in enumerate(self.marks) if event == "open" and path in where}
        renamed = {where: n for n, (_, event, where) in enumerate(self.marks) if event == "os.rename"}
        rng = random.Random(seed)
        where = rng.choice([where for where in opened if where in renamed])
        length = self.marks[renamed[where]][0] - self.marks[opened[where]][0]
        return opened[where] + 1, rng.randrange(1, length)


def softprompt(
    settings: Recipe, *flags: str, moment: Moment | None = None, seconds: float | None = None
) -> tuple[int, str]:
    """Train by the command line in a process of its own; its exit status (−9 if it was killed) and what it said.

    `moment`: when it kills itself; NEVER only counts. `seconds`: how long it may live.
    """
    place = Path(settings.out).with_suffix(".yaml")
    place.write_text(settings.to_yaml())
    said = Path(settings.out).with_suffix(".log")
    arguments = ["train", str(place), *flags]
    process = FORKS.Process(target=_command, args=(arguments, settings.out, str(said), moment))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, said.read_text() if said.exists() else ""


def _member(rank: int, port: int, *command: Any) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    _command(*command)


def two_processes(settings: Recipe, *flags: str, moment: Moment | None = None, killed: int = 0) -> list[int | None]:
    """Train by two processes of one team, one of which kills itself at a moment; the other goes down with it.

    That is what torchrun and accelerate launch see to. The exit status of both.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = Path(settings.out).with_suffix(".yaml")
    place.write_text(settings.to_yaml())
    team = []
    for rank in range(2):
        said = str(Path(settings.out).with_suffix(".log" if rank == 0 else ".log1"))
        own = moment if rank == killed else None
        command = (["train", str(place), *flags], settings.out, said, own)
        team.append(FORKS.Process(target=_member, args=(rank, port, *command)))
    for process in team:
        process.start()
    for _ in range(5000):
        if not any(process.is_alive() for process in team) or any(process.exitcode for process in team):
            break
        next(process for process in team if process.is_alive()).join(0.05)
    for process in team:
        process.kill()
        process.join()
    return [process.exitcode for process in team]


def whole_life(settings: Recipe) -> Life:
    """Train undisturbed."""
    status, said = softprompt(settings, moment=NEVER)
    assert status == 0, said
    return counted(settings)


def counted(settings: Recipe) -> Life:
    """What the last command with these settings counted."""
    calls, marks = json.loads(Path(settings.out).with_suffix(".log.json").read_text())
    return Life(Path(settings.out), calls, [(count, event, path) for count, event, path in marks])


def facts(folder: Path) -> dict[str, Any]:
    """All of a finished run that does not depend on the clock or on where it lies."""
    state = RunFolder(folder).load_state()
    assert state is not None
    found: dict[str, Any] = {
        "losses": losses(folder),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        "trained": {name: _bits(tensor) for name, tensor in state["trainable"].items()},
        "samples": json.loads((folder / "samples.json").read_text()),
    }
    summary = json.loads((folder / "summary.json").read_text())
    found["summary"] = {k: v for k, v in summary.items() if k not in ("seconds", "tokens_per_s", "command")}
    for path in [*folder.glob("*.safetensors"), *folder.glob("base/*.safetensors"), *folder.glob("teachers/*/*.s*s")]:
        found[str(path.relative_to(folder))] = {name: _bits(tensor) for name, tensor in load_file(path).items()}
    for path in folder.glob("teachers/*"):
        found[path.name] = losses(path)
    return found


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def losses(folder: Path) -> list[dict[str, Any]]:
    """The metrics, every line of them, without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]
