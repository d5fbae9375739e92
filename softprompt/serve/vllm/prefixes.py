"""Folded prompts on the side of the engine: `OBJECTS/<digest>/kv.safetensors`, read once and kept within a limit."""

from collections import OrderedDict
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softprompt.errors import CheckpointError
from softprompt.serve.folded import KV_NAME

Pairs = list[tuple[Tensor, Tensor]]
"""Key and value `[p, h, k]` of every layer."""


def read_header(path: Path) -> dict[str, str]:
    """A folded prompt's metadata. CheckpointError."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a folded prompt ({error}).") from error


@final
class Prefixes:
    """The keys and values of one tensor-parallel rank, those of the prompts used last, at most `max_bytes` of them.

    `layers`: number of attention layers. `rank` of `ranks` has the heads that vLLM gives it: an equal share, or, where
    there are fewer heads than ranks, a copy.
    """

    def __init__(self, objects: Path, layers: int, rank: int, ranks: int, max_bytes: int) -> None:
        self.objects, self.layers, self.rank, self.ranks, self.max_bytes = objects, layers, rank, ranks, max_bytes
        self._held: OrderedDict[str, Pairs] = OrderedDict()
        self._nbytes = 0

    def get(self, digest: str) -> Pairs:
        """CheckpointError."""
        pairs = self._held.get(digest)
        if pairs is None:
            pairs = self._read(digest)
            self._keep(digest, pairs)  # which may be not at all
        else:
            self._held.move_to_end(digest)
        return pairs

    def _read(self, digest: str) -> Pairs:
        path = self.objects / digest / KV_NAME
        found = read_header(path)
        if (found.get("digest"), found.get("layers")) != (digest, str(self.layers)):
            raise CheckpointError(
                f"{path} is of prompt {found.get('digest')} for {found.get('layers')} layers, not for {self.layers}."
            )
        try:
            with safe_open(path, "pt") as file:
                return [
                    (self._own(file.get_tensor(f"k.{n}")), self._own(file.get_tensor(f"v.{n}")))
                    for n in range(self.layers)
                ]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as a folded prompt ({error}).") from error

    def _own(self, part: Tensor) -> Tensor:
        """`[h_kv, p, k]` → this rank's heads, `[p, h, k]`, in memory of their own."""
        heads = part.shape[0]
        share = max(1, heads // self.ranks)
        first = self.rank * heads // self.ranks
        return part[first : first + share].transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def _keep(self, digest: str, pairs: Pairs) -> None:
        self._held[digest] = pairs
        self._nbytes += _nbytes(pairs)
        while self._nbytes > self.max_bytes:
            self._nbytes -= _nbytes(self._held.popitem(last=False)[1])


def _nbytes(pairs: Pairs) -> int:
    return sum(part.nbytes for pair in pairs for part in pair)
