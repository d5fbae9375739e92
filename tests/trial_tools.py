"""What the trials of tests/trial.py are made of: batches, differences, what an exception says."""

from __future__ import annotations

import os
import traceback

import anyfamily
import torch
from torch import Tensor

import softprompt

TOKENS = 4  # virtual ones
TOLERANCE = 1e-3  # of the largest number that is compared
PACKAGE = os.path.dirname(softprompt.__file__)
Pairs = list[tuple[Tensor, Tensor]]


class NotHere(Exception):
    """The bare model does not do what a comparison needs."""


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor, int]:
    """Rows `[1, t]` as one batch `[B, T]`, its mask, and T."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), width), anyfamily.PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[number, where], mask[number, where] = row[0], 1
    return ids, mask, width


def difference(wanted: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite for another shape."""
    if wanted.shape != found.shape:
        return float("inf")
    return float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-9))


def frames(error: BaseException) -> list[str]:
    """The last frame of the library's that an exception went through, and the last of all."""
    found = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    own = [f"softprompt{each.removeprefix(PACKAGE)}" for each in found if each.startswith(PACKAGE)]
    return [*own[-1:], *("/".join(each.split("/")[-2:]) for each in found[-1:])]


def ours(error: BaseException) -> bool:
    """Whether an exception went through the library, and not only through the bare model."""
    return any(frame.filename.startswith(PACKAGE) for frame in traceback.extract_tb(error.__traceback__))


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
