"""`kv.safetensors`: a prompt as keys and values, for engines that cannot fold one themselves.

Tensors `k.<n>` and `v.<n>`, each `[h_kv, p, head size]` in the served number format, n counting the attention layers
that have keys of their own, in the order they run; keys as a cache holds them, after rotary embedding at positions
0…p−1. Metadata (text): `digest`, `length` (p), `layers`, `dtype`, `base` (its fingerprint), `format`: "pt".
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from softprompt.checkpoint.files import write_files
from softprompt.checkpoint.guard import damage
from softprompt.checkpoint.tensor_file import Layout, read_file, read_text
from softprompt.errors import CheckpointError, UnsupportedError
from softprompt.prompt import KV

KV_NAME = "kv.safetensors"


def write_folded(folder: Path, kv: KV, digest: str, base: str) -> None:
    """Write one prompt, `[1, h, p, k]` per layer, whole or not at all. CheckpointError where there is no room.

    UnsupportedError for numbers that its format cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    for number, (key, value) in enumerate(kv.layers):
        tensors[f"k.{number}"] = key[0].contiguous().clone()
        tensors[f"v.{number}"] = value[0].contiguous().clone()
    dtype = str(tensors["k.0"].dtype).removeprefix("torch.")
    if not all(bool(torch.isfinite(each).all()) for each in tensors.values()):
        raise UnsupportedError(f"its keys and values are beyond what {dtype} can hold; serve in bfloat16 or float32.")
    told = {"digest": digest, "length": str(kv.length), "layers": str(len(kv.layers)), "dtype": dtype, "base": base}
    write_files(folder, [(KV_NAME, save(tensors, metadata={**told, "format": "pt"}))])


def read_folded(folder: Path, digest: str) -> list[tuple[Tensor, Tensor]]:
    """Key and value `[h_kv, p, head size]` of every layer of the prompt `digest` in its folder. CheckpointError."""
    path = folder / KV_NAME
    _check_told(path, digest)
    with damage(path):
        tensors = read_file(path, lambda found: _check(path, found))
    return [(tensors[f"k.{number}"], tensors[f"v.{number}"]) for number in range(len(tensors) // 2)]


def check_folded(folder: Path, digest: str) -> None:
    """Raise CheckpointError unless the folder has such a file of this prompt, as long as its header says."""
    _check_told(folder / KV_NAME, digest)


def _check_told(path: Path, digest: str) -> None:
    with damage(path):
        told = read_text(path)
    if told.get("digest") != digest:
        raise CheckpointError(f"{path} belongs to another prompt ({told.get('digest')!s:.64}); delete its folder.")


def _check(path: Path, found: dict[str, Layout]) -> None:
    names = {f"{part}.{number}" for part in "kv" for number in range(len(found) // 2)}
    lengths = {shape[1] for shape, _ in found.values() if len(shape) == 3}
    if not found or set(found) != names or len(lengths) != 1 or any(len(shape) != 3 for shape, _ in found.values()):
        raise CheckpointError(f"{path} does not hold the keys and values of one prompt; delete its folder.")
