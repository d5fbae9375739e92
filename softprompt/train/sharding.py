"""The frozen base model shared out among processes by torch's FSDP2; the prompt is whole in each.

Every process holds an equal part of every weight. A layer is gathered when it runs, in the forward and in the backward
pass, and let go of again: what a process needs is its part, one layer, the word table and the activations. Nothing of
the base trains, so no gradient of it travels.

From then on all processes take part in every call of the model, and must make the same ones.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.elsewhere import offloaded, place_of, sharded
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.fold_cache import FoldCache
from softprompt.loading import pick_device
from softprompt.model import SoftPromptModel
from softprompt.prompt import evaluating
from softprompt.recipe import Recipe
from softprompt.transformers_api import layers_of

# What accelerate's launcher may say about FSDP, what of it holds here, and what to launch with instead.
_OF_LAUNCHER = {
    "FSDP_VERSION": ({"2"}, "--fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ({"", "false"}, "--fsdp_offload_params false"),
    "FSDP_RESHARD_AFTER_FORWARD": ({"", "true", "full_shard"}, "--fsdp_reshard_after_forward true"),
    "FSDP_ACTIVATION_CHECKPOINTING": ({"", "false"}, "--fsdp_activation_checkpointing false"),
}


def shards(recipe: Recipe, processes: int) -> bool:
    """Whether a run shares out its base model: its recipe says so, or ``accelerate launch --use_fsdp``.

    ``ConfigError`` for what the launcher asks for and cannot be had, and for a process that is alone.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1", "yes")
    if not launched and not recipe.shard:
        return False
    for name, (fine, remedy) in _OF_LAUNCHER.items() if launched else ():
        value = os.environ.get(name, "1" if name == "FSDP_VERSION" else "").lower()
        if value not in fine:
            raise ConfigError(f"{name} is {value!r}, which `softprompt train` does not do; launch with {remedy}")
    size = recipe.replace(shard=True).shard_size  # whatever contradicts it
    if size is not None and processes % size:
        raise ConfigError(f"{processes} processes cannot share copies of the base model by {size}; change shard_size")
    if processes == 1:
        raise ConfigError("shard needs several processes; start them with torchrun --nproc-per-node N, or leave it out")
    return True


def shard_base(model: SoftPromptModel, device: str | torch.device = "auto", size: int | None = None) -> None:
    """Share out the frozen base model among groups of ``size`` processes (all of them, by default), and move it there.

    It may wait in CPU memory until then: a GPU gets one layer at a time, and keeps its part. Prompts, heads, LoRA and
    all that trains stay whole, and so do norms and biases outside the layers. Every process must call this.
    ``ConfigError`` where it cannot be done, ``UnsupportedError`` for a model without layers to share out.
    """
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    layers = _layers(base)
    place = pick_device(str(device))
    mesh = _mesh(place.type, size)
    whole = _whole(base, layers)
    for layer in reversed(layers):  # inner ones first
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    sharing: Any = fully_shard(base, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(place)
    model.prompt_encoder.to(place)
    model.heads.to(place)
    model.folds = FoldCache()  # the old one knows the weights as they were
    with torch.no_grad(), evaluating(base):  # FSDP takes the first module that runs for the outermost one
        base(**_any_row(base))
    sharing.reshard()


def _mesh(kind: str, size: int | None) -> Any:
    """All processes in a line, or in groups of neighbours, each of which has a copy of the base."""
    from torch.distributed.device_mesh import init_device_mesh

    processes = dist.get_world_size()
    if size in (None, processes):
        return init_device_mesh(kind, (processes,))
    return init_device_mesh(kind, (processes // size, size), mesh_dim_names=("copies", "parts"))


def _layers(base: PreTrainedModel) -> list[nn.Module]:
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("a base model is shared out among processes, and torch.distributed is not started; start it")
    if sharded(base):
        raise ConfigError(f"this {type(base).__name__} is shared out already; do that once.")
    if offloaded(base):
        raise ConfigError("a base model whose weights are on disk cannot be shared out; load it without device_map.")
    layers = layers_of(base)
    if not layers:
        raise UnsupportedError(
            f"{type(base).__name__} has no layers that transformers knows as such, so they cannot be shared out; run "
            "it without shard."
        )
    return layers


def _whole(base: PreTrainedModel, layers: list[nn.Module]) -> set[nn.Parameter]:
    """What every process keeps: what trains, what is small, and tables in layers that others look things up in."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    tables = {id(part.weight) for layer in layers for part in layer.modules() if isinstance(part, nn.Embedding)}
    return {
        each
        for each in base.parameters()
        if each.requires_grad or id(each) in tables or each.ndim < (1 if id(each) in inside else 2)
    }


def _any_row(base: PreTrainedModel) -> dict[str, Tensor]:
    """One token, for the encoder and for the decoder where there are both."""
    ids = torch.ones(1, 1, dtype=torch.long, device=place_of(base))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if base.config.is_encoder_decoder else {})
