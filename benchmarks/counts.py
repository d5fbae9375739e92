"""What can be counted instead of timed: FLOPs, bytes kept for the backward pass, keys and values held, peak memory.

A multiplication and an addition are two FLOPs. Attention counts as the whole rectangle of queries times keys for every
kernel, causal or masked, as torch's own counter has it, so that the bare model, PEFT and softprompt are counted alike.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]
STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and their product with the values: `[B, h, q, k]` queries (grouped keys count once per query head)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def attention_backward_flops(_: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    """Five products: the scores once more, and the gradients of weights, values, queries and keys."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])


def rnn_flops(rows: Shape, into: Shape, again: Shape, *_: Any, **__: Any) -> int:
    """One direction of one recurrent layer: rows `[T, B, i]`, weights `[g·d, i]` and `[g·d, d]`."""
    return 2 * rows[0] * rows[1] * (math.prod(into) + math.prod(again))


def rnn_backward_flops(*shapes: Any, **_: Any) -> int:
    """Gradients of the inputs and of the weights: twice the forward pass."""
    return 2 * rnn_flops(*shapes)


ATEN = torch.ops.aten
# What torch's counter leaves out on a CPU; without these attention and an LSTM would be free there.
FORMULAS: dict[Any, Callable[..., int]] = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    ATEN.mkldnn_rnn_layer: rnn_flops,
    ATEN.mkldnn_rnn_layer_backward: rnn_backward_flops,
}


def flops(run: Callable[[], Any]) -> int:
    """The FLOPs of everything `run` does, backward passes included."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return counter.get_total_flops()


@contextmanager
def saving(model: nn.Module) -> Iterator[dict[int, int]]:
    """The bytes of each distinct storage that autograd keeps in the block; not of parameters, which are there anyway.

    The storages are held until the end, so that none is counted twice under an address that was used again.
    """
    held = {storage(parameter).data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = storage(tensor).data_ptr()
        if place not in held and place not in kept:
            kept[place] = storage(tensor)
            sizes[place] = kept[place].nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    kept.clear()


def storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def step_counts(run: Callable[[], Any], model: nn.Module) -> dict[str, int]:
    """FLOPs and saved bytes of one training step."""
    with saving(model) as sizes:
        count = flops(run)
    return {"flops": count, "saved": sum(sizes.values())}


def kv_bytes(head_width: int) -> int:
    """Bytes of every distinct storage alive that a `[.., h, t, head_width]` tensor uses: caches, prefixes, copies.

    Looks at all tensors that Python knows, so nothing has to be known about who holds them.
    """
    sizes = {}
    for each in gc.get_objects():
        if type(each) is not Tensor or each.is_meta:  # parameters, and stand-ins that have no memory
            continue
        if each.ndim >= 4 and each.shape[-1] == head_width and each.is_floating_point():
            sizes[storage(each).data_ptr()] = storage(each).nbytes()
    return sum(sizes.values())


class Peak:
    """Memory beyond what was in use when it was made: of the GPU, or the resident pages of this process.

    `bytes()` is None where the machine does not tell.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before: int | None = torch.cuda.memory_allocated()
        else:
            self.before = _reset_resident()

    def bytes(self) -> int | None:
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - (self.before or 0)
        highest = status("VmHWM")
        return None if highest is None or self.before is None else max(0, highest - self.before)


def _reset_resident() -> int | None:
    """Give freed pages back, forget the peak so far, and say how much is resident."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        RESET_PEAK.write_text("5")
    except OSError:
        return None
    return status("VmRSS")


def status(name: str) -> int | None:
    """A number of /proc/self/status, in bytes; None where there is no such file."""
    if not STATUS.exists():
        return None
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith(name + ":")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def limit_memory(share: float = 0.85) -> None:
    """Make an allocation beyond this share of the free memory fail with an error, which is a row of a table.

    Without a limit the system would end the whole benchmark.
    """
    import resource

    memory, used = Path("/proc/meminfo"), status("VmData")
    if used is None or not memory.exists():
        return
    free = next(int(line.split()[1]) * 1024 for line in memory.read_text().splitlines() if "MemAvailable" in line)
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(share * free), resource.RLIM_INFINITY))
