"""Many processes, one run: what `torchrun` and `accelerate launch` start, joined by torch.distributed.

Every process does the same. A step's rows are shared out, each process weighs what it computed by what it counted
(labels, rows), and the sum over all is what one process would have computed from the whole batch. Only the trained
parameters' gradients travel: for a prompt kilobytes, in one all-reduce a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from softprompt.errors import ConfigError, SoftPromptError, TrainingError
from softprompt.loading import pick_device

T = TypeVar("T")

# What accelerate's launcher may ask for that this loop does not do, with what does it here.
_OF_ACCELERATE = {
    "ACCELERATE_USE_DEEPSPEED": ({"false"}, "launch without DeepSpeed, or train in transformers' Trainer"),
    "ACCELERATE_MIXED_PRECISION": ({"no"}, "launch with --mixed_precision no and give --dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ({"no"}, "launch with --dynamo_backend no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ({"1"}, "launch without it; batch_size is that of all processes"),
    "ACCELERATE_USE_MEGATRON_LM": ({"false"}, "launch without Megatron-LM"),
}


@final
@dataclass(frozen=True)
class Team:
    """The processes of a run: this one's number and how many there are. One alone needs no torch.distributed."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def device(self, asked: str) -> str:
        """This process's own GPU, where a GPU is asked for or there is one."""
        if self.alone or asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
            return asked
        if asked not in ("auto", "cuda"):
            raise ConfigError(f"device is {asked!r} for {self.size} processes; use cuda, auto or cpu")
        return f"cuda:{self.local_rank}"

    def share(self, rows: Sequence[T]) -> list[T]:
        """Every `size`-th row, from this process's number on."""
        return list(rows[self.rank :: self.size])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over all processes, in place, by one all-reduce in float32."""
        if self.alone or not tensors:
            return
        flat = torch.cat([each.detach().reshape(-1).to(tensors[0].device, torch.float32) for each in tensors])
        dist.all_reduce(flat)
        for each, summed in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
            each.detach().copy_(summed.view(each.shape))

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.alone:
            return flag
        found = torch.tensor([float(flag)], device=f"cuda:{self.local_rank}" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(found)
        return bool(found > 0)

    def gather(self, value: T) -> list[T]:
        """The value of every process, in their order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_main(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the tensors of the first one, in place."""
        for each in [] if self.alone else tensors:
            dist.broadcast(each.detach(), src=0)

    def wait(self) -> None:
        """Until every process is here."""
        if not self.alone:
            dist.barrier()

    def on_main(self, do: Callable[[], T]) -> T:
        """What the first process finds out, known to all. Its error is its to tell; the others end with status 2."""
        if self.alone:
            return do()
        told: list[Any] = [None, False]
        if self.main:
            try:
                told = [do(), True]
            except SoftPromptError:
                dist.broadcast_object_list(told, src=0)
                raise
        dist.broadcast_object_list(told, src=0)
        if not told[1]:
            time.sleep(1)  # a launcher that sees this process end would end the first one, before it has spoken
            raise SystemExit(2)
        return told[0]


@contextmanager
def processes(device: str = "auto") -> Iterator[Team]:
    """The team that this process was started in; joins the others, and leaves them if it was the one that joined.

    ConfigError for what accelerate's launcher asks for and this loop cannot do, and for a launch that is incomplete;
    TrainingError when another process has ended, by an error of its own or by force.
    """
    size = _number("WORLD_SIZE", "1")
    _check_launcher()
    if dist.is_available() and dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        return
    if size == 1:
        yield Team()
        return
    team = Team(_number("RANK"), size, _number("LOCAL_RANK", os.environ["RANK"]))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise _incomplete(name, None)
    place = pick_device(team.device(device))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield team
    except RuntimeError as error:  # gloo has no error class of its own
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
            raise
        raise TrainingError(
            "another process of this run has ended, and so does this one; look for what that one said, then --resume"
        ) from error
    finally:
        dist.destroy_process_group()


def _number(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    if value is None or not value.isdecimal():
        raise _incomplete(name, value)
    return int(value)


def _incomplete(name: str, value: str | None) -> ConfigError:
    found = "missing from" if value is None else f"{value!r} in"
    return ConfigError(
        f"{name} is {found} the environment that says which of several processes this is; start them by torchrun or "
        "accelerate launch, or unset WORLD_SIZE"
    )


def _check_launcher() -> None:
    for name, (fine, remedy) in _OF_ACCELERATE.items():
        value = os.environ.get(name, "").lower()
        if value and value not in fine:
            raise ConfigError(f"{name} is {value!r}, which `softprompt train` does not do; {remedy}")
