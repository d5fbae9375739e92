"""Base models whose weights are not all here: on disk or in CPU memory until a layer runs, or in other processes.

The first is what accelerate's hooks do for a `device_map`: between calls such a weight is a tensor without numbers, on
the `meta` device. The second is torch's FSDP2 (`train.sharding`): each process holds a part of every weight. The rest
of this package asks here for what it would otherwise read off a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from softprompt import transformers_api as api
from softprompt.errors import UnsupportedError
from softprompt.transformers_api import loader_of
from softprompt.vocabulary import check_ids


def sharded(base: nn.Module) -> bool:
    """Whether other processes hold parts of this model."""
    return api.is_sharded(base)


def dispatched(base: nn.Module) -> bool:
    """Whether accelerate places this model's layers."""
    return api.is_dispatched(base)


def offloaded(base: nn.Module) -> bool:
    """Whether some of its weights are away until their layer runs."""
    return dispatched(base) and any(parameter.is_meta for parameter in base.parameters())


def at_hand(base: nn.Module) -> AbstractContextManager[None]:
    """What a call of a base model needs around it, for its backward pass too; nothing for one that is all here."""
    if sharded(base):
        return _gathered(base)
    return _read_again(base) if dispatched(base) else nullcontext()


# ---- weights and places --------------------------------------------------------------------------------------------


def place_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first parameter is, or where accelerate brings that for a call.

    UnsupportedError for weights that are nowhere.
    """
    nothing = True
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
            nothing, hook = False, loader_of(part)
            if hook is not None:
                return torch.device(hook.execution_device)
    if nothing:
        return torch.device("cpu")
    raise UnsupportedError(
        f"the weights of {type(module).__name__} are on the meta device, and nothing loads them from there; load the "
        "model with from_pretrained."
    )


def words_of(base: Any) -> Any:
    """The input embeddings that a prompt's vectors stand among: of two stacks the encoder's, which may be its own."""
    words = base.get_input_embeddings()
    if not base.config.is_encoder_decoder or not hasattr(base, "get_encoder"):
        return words
    inner: Any = base.get_encoder()
    asks = inner is not base and hasattr(inner, "get_input_embeddings")  # FSMT's encoder has none to ask for
    own = inner.get_input_embeddings() if asks else words
    same = isinstance(own, nn.Embedding) and tuple(own.weight.shape) == tuple(words.weight.shape)
    return own if same else words


def batch_on(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch, made on the CPU, where a model computes. ConfigError for ids that it has no word embedding for.

    On a GPU such an id would end the process, not the call.
    """
    base = getattr(model, "base_model", model)
    for name in ("input_ids", "decoder_input_ids") if hasattr(base, "get_input_embeddings") else ():
        if name in batch:
            check_ids(base.get_input_embeddings(), batch[name])
    device = place_of(model)
    return {name: value.to(device) for name, value in batch.items()}


def word_table(base: Any) -> Tensor:
    """The weight of the input embeddings `[V, d]`; its device and type are those a prompt enters in.

    Where it is elsewhere it has shape, device and type alone, and NaN for numbers; `embed_words` gives those.
    """
    words: Any = words_of(base)
    weight = words.weight
    assert isinstance(weight, Tensor)
    if not weight.is_meta and not (sharded(base) and api.is_shard(weight)):
        return weight
    stand_in = torch.full((1, 1), torch.nan, dtype=weight.dtype, device=place_of(words))
    return stand_in.expand(weight.shape)


@torch.no_grad()
def embed_words(words: nn.Module, ids: Sequence[int] | Tensor) -> Tensor:
    """What the input embeddings `words` give for ids `[…]`: `[…, d]`. All processes must ask where they are sharded.

    ConfigError for ids beyond the table.
    """
    check_ids(words, ids)
    weight = next(words.parameters())
    index = torch.as_tensor(ids, device=place_of(words))
    if not api.is_shard(weight):
        return words(index)
    whole: Any = weight
    return torch.func.functional_call(words, {"weight": whole.full_tensor()}, (index,))


def all_words(base: Any) -> Tensor:
    """What the input embeddings give for every token, `[V, d]`, a copy on the CPU. As for `embed_words`."""
    words: Any = words_of(base)
    return embed_words(words, torch.arange(words.weight.shape[0])).to("cpu", copy=True)


def watched(module: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
    """Those of a module's tensors whose changes can be seen: what is brought along for a call is new each time."""
    if sharded(module):
        return []
    return [each for each in tensors if not each.is_meta] if dispatched(module) else tensors


def copied(module: nn.Module) -> nn.Module:
    """A copy to be trained: its weights are in memory and nothing else loads them."""
    hooks = {part: hook for part in module.modules() if (hook := loader_of(part)) is not None}
    if not any(parameter.is_meta for parameter in module.parameters()):
        return copy.deepcopy(module)
    kept: dict[int, Any] = {id(api.hook_of(part)): api.hook_of(part) for part in hooks}  # these are not copied
    other = api.without_hooks(copy.deepcopy(module, kept), recurse=True)
    for part, new in zip(module.modules(), other.modules(), strict=True):
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                hook = hooks[part]
                value = hook.weights_map[name].to(device=hook.execution_device, dtype=parameter.dtype, copy=True)
                new._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return other


def own_class(base: nn.Module) -> type:
    """The class of a model: FSDP2 puts one of its own before it."""
    return api.unsharded_class(base)


# ---- weights on disk -----------------------------------------------------------------------------------------------


@final
class _Here(local):
    """The base model whose weights autograd does not keep, in this thread."""

    base: nn.Module | None = None


_HERE = _Here()


@final
@dataclass(frozen=True)
class _Away:
    """A weight, or a part of it, that autograd reads again instead of keeping it."""

    weights: Mapping[str, Tensor]
    name: str
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        whole = self.weights[self.name].to(device=self.device, dtype=self.dtype)
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


@contextmanager
def _read_again(base: nn.Module) -> Iterator[None]:
    """Inside the block autograd does not keep weights that are offloaded, which would be the whole model by the end.

    Their place is kept, and the backward pass reads them again, one at a time. (Copies that autocast makes of them are
    kept; gradient checkpointing does without those.) Recomputed layers run to their end, where accelerate lets go of
    their weights.
    """
    if _HERE.base is base or not torch.is_grad_enabled() or not offloaded(base):
        yield
        return
    running: list[tuple[nn.Module, Any]] = []
    with ExitStack() as stack:
        for module in base.modules():
            hook = loader_of(module)
            if hook is not None:
                stack.callback(module.register_forward_pre_hook(partial(_enter, running, hook)).remove)
                stack.callback(module.register_forward_hook(partial(_leave, running), always_call=True).remove)
        stack.enter_context(set_checkpoint_early_stop(False))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(partial(_pack, running), _unpack))
        stack.callback(setattr, _HERE, "base", _HERE.base)
        _HERE.base = base
        yield


def _enter(running: list[tuple[nn.Module, Any]], hook: Any, module: nn.Module, _: Any) -> None:
    running.append((module, hook))


def _leave(running: list[tuple[nn.Module, Any]], *_: Any) -> None:
    running.pop()


def _pack(running: list[tuple[nn.Module, Any]], tensor: Tensor) -> Tensor | _Away:
    """A tensor as autograd keeps it; offloaded weights are those of the modules that run now."""
    for module, hook in reversed(running):
        for name, weight in module.named_parameters(recurse=hook.place_submodules):
            if weight.is_meta or weight.dtype is not tensor.dtype or weight.device != tensor.device:
                continue
            behind = tensor.data_ptr() - weight.data_ptr()
            if 0 <= behind < weight.nbytes:
                offset = behind // weight.element_size()
                place = (hook.weights_map, name, tensor.device, tensor.dtype)
                return _Away(*place, tensor.shape, tensor.stride(), offset)
    return tensor


def _unpack(kept: Tensor | _Away) -> Tensor:
    return kept.read() if isinstance(kept, _Away) else kept


# ---- weights in other processes ------------------------------------------------------------------------------------


@contextmanager
def _gathered(base: Any) -> Iterator[None]:
    """Inside the block the parameters that no layer has, the word table among them, are whole in every process.

    FSDP gathers them for a call of the whole model only, and we also call parts of it.
    """
    words = base.get_input_embeddings().weight
    if base not in api.sharded_parts(base)[:1] or not api.is_shard(words):
        yield  # sharded in another way, or whole already
        return
    base.unshard()
    try:
        yield
    finally:
        base.reshard()


def gather_for(base: nn.Module, modules: Sequence[nn.Module], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Have layers whole when gradients reach the keys and values that attention modules used in them.

    FSDP gathers a layer when a gradient reaches what it returned, which nothing does in the last one of a fold.
    """
    if not sharded(base) or not torch.is_grad_enabled():
        return
    layers: dict[nn.Module, Any] = {}
    for layer in api.sharded_parts(base):
        if layer is not base:
            layers |= dict.fromkeys(layer.modules(), layer)
    for module, pair in zip(modules, pairs, strict=True):
        for part in pair:
            if part.requires_grad and module in layers:
                part.register_hook(partial(_unshard, layers[module]))


def _unshard(layer: Any, _: Tensor) -> None:
    layer.unshard()
