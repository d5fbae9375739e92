"""The seam: everything this library knows of other libraries beyond their public API, one small function each.

Names of arguments that change between releases, private attributes, signatures that are inspected, facts that a family
shows only by how it is written: of transformers first, then of accelerate, torch's FSDP, PEFT, TRL and torch's kernels.
Nothing else in the package names them. What is wrong here shows when a model is wrapped (`canary`), not in its answers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import PushToHubMixin

from softprompt.errors import ConfigError, UnsupportedError

__all__ = ["CacheLayerMixin", "ModelOutput", "PushToHubMixin", "TorchDispatchMode"]

# ---- signatures ----------------------------------------------------------------------------------------------------


def parameters(call: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a function takes, in order; those behind decorators are the decorated one's.

    Those of functions and methods are kept: a signature takes longer to read than a small layer to run.
    """
    function = getattr(call, "__func__", call)
    if torch.compiler.is_compiling() or not inspect.isfunction(function):
        return tuple(inspect.signature(call).parameters)
    known = _PARAMETERS.get(function)
    if known is None:
        names = tuple(inspect.signature(function).parameters)
        known = _PARAMETERS[function] = names[1:] if function is not call else names
    return known


_PARAMETERS: dict[Any, tuple[str, ...]] = {}
"""By function; a method's are without its first."""


def takes(call: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in parameters(call)


def takes_option(call: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any by name."""
    found = inspect.signature(call).parameters
    return name in found or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found.values())


# ---- the cache -----------------------------------------------------------------------------------------------------

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What models call their cache: `cache` since 5.24, before that the others, recurrent models the last."""

LAYER_CACHE_NAMES = ("layer_past", *CACHE_NAMES)
"""What layers call it."""


CACHE_NAME = next(name for name in CACHE_NAMES if takes(create_causal_mask, name))
"""What the installed transformers calls it."""


def cache_name(forward: Callable[..., Any]) -> str | None:
    """By which name a `forward` takes a cache; None where it takes none."""
    names = parameters(forward)
    return next((name for name in CACHE_NAMES if name in names), None)


def layer_cache_name(keywords: Mapping[str, Any]) -> str | None:
    """By which name a layer was given its cache."""
    return next((name for name in LAYER_CACHE_NAMES if name in keywords), None)


def pop_cache(given: dict[str, Any]) -> Any:
    """Take the cache out of keyword arguments, by whatever name it is there. ConfigError for two of them."""
    found = {name: given.pop(name) for name in CACHE_NAMES if name in given}
    found = {name: value for name, value in found.items() if value is not None}
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(found)} are one argument by two names; give one of them.")
    return next(iter(found.values()), None)


def generate_cache_name(base: PreTrainedModel) -> str:
    """By which name a model's `generate` takes the cache it goes on from."""
    return cache_name(type(base).forward) or CACHE_NAME


def cache_in(output: Any) -> tuple[str, Any] | None:
    """The cache among a model's outputs and what it is called there, known by what it is."""
    return next(((name, value) for name, value in output.items() if isinstance(value, Cache)), None)


def with_cache(output: Any, cache: Any) -> dict[str, Any]:
    """The fields of an output, with `cache` where there was one."""
    fields = dict(output)
    return fields | {name: cache for name in CACHE_NAMES if name in fields}


def seen_tokens(cache: Any) -> Any:
    """How many tokens a cache has seen, 0 without one; a static cache's count is a tensor on its device.

    A cache of nothing but states of recurrent layers counts no tokens: 1 where it has seen any.
    """
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except ValueError:  # no attention layer in it
        return int(cache.has_previous_state())


def cache_columns(cache: Any, tokens: int, layer: int = 0) -> int:
    """How many columns a layer attends to when `tokens` more come: a static cache's unused ones are among them."""
    return tokens if cache is None else cache.get_mask_sizes(tokens, layer)[0]


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache, as a model makes one by itself."""
    return DynamicCache(config=config)


def cached_layer(layer: Any) -> tuple[Any, Any]:
    """Keys and values of a cache's layer, or None twice: before its first use, or where it has a state instead."""
    return getattr(layer, "keys", None), getattr(layer, "values", None)


def tokens_of_layer(layer: Any) -> Any:
    """How many tokens a cache's layer has seen."""
    return layer.get_seq_length()


def rounds_keys(layer: Any) -> bool:
    """Whether a cache's layer keeps its keys in fewer bits."""
    return getattr(layer, "_quantized_keys", None) is not None


def layer_keeps_state(layer: Any) -> bool:
    """Whether a cache's layer keeps the state of a recurrent layer."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


# ---- attention -----------------------------------------------------------------------------------------------------


def backend_of(config: PreTrainedConfig) -> str:
    """The name of the attention function that layers with this config ask for."""
    return config._attn_implementation or "eager"


def set_backend(config: PreTrainedConfig, name: str | None) -> None:
    """Have layers with this config, and none with another, ask for the attention function `name`."""
    config._attn_implementation_internal = name


def is_registered(name: str) -> bool:
    """Whether an attention function of this name is registered."""
    return name in AttentionInterface._global_mapping


def registered_attention(name: str) -> Callable[..., Any]:
    """The attention function of a name."""
    return AttentionInterface._global_mapping[name]


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention function and what makes the masks it is given."""
    AttentionMaskInterface.register(name, mask)
    AttentionInterface.register(name, attention)


def attention_of(name: str, module: nn.Module) -> Callable[..., Any]:
    """The function that attention modules call where their config names this backend."""
    return _eager_of(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The family's own eager attention, which transformers hands over only for the name 'eager'."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedError(f"{type(module).__name__} has no eager attention; load with attn_implementation='sdpa'.")


def mask_maker(name: str) -> Callable[..., Any]:
    """The function that makes masks for a backend."""
    return ALL_MASK_ATTENTION_FUNCTIONS[name]


def whole_mask(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a mask maker that must make a mask, also where a backend could do without."""
    return {**options, "allow_is_causal_skip": False}


def mask_device(options: Mapping[str, Any]) -> torch.device | str:
    """The device a mask maker is asked to make a mask on."""
    return options.get("device", "cpu")


def redirected() -> bool:
    """Whether layers' look-ups of attention functions are answered by `redirect` now."""
    return "get_interface" in vars(ALL_ATTENTION_FUNCTIONS)


def redirect(answer: Callable[[str | None, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Answer layers' look-ups of attention functions by `answer(name, default)`."""
    functions: Any = ALL_ATTENTION_FUNCTIONS
    functions.get_interface = answer


def end_redirect() -> None:
    """Undo `redirect`."""
    functions: Any = ALL_ATTENTION_FUNCTIONS
    del functions.get_interface


class Asked:
    """What an attention module asks of the attention function besides queries, keys, values and a mask."""

    def __init__(self, module: nn.Module, keywords: Mapping[str, Any]) -> None:
        self.window: int | None = keywords.get("sliding_window")
        self.softcap: float | None = keywords.get("softcap")
        self.sinks: Tensor | None = keywords.get("s_aux")
        self.relative: Tensor | None = keywords.get("position_bias")
        self.scale: float | None = keywords.get("scaling")
        self.dropout: float = keywords.get("dropout", 0.0)
        self.kernel: Any = keywords.get("kernel_options")
        causal = keywords.get("is_causal")
        self.causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        self.batches = continuous_batching(keywords)


def continuous_batching(keywords: Mapping[str, Any]) -> bool:
    """Whether a layer attends for `generate_batch`, whose cache it hands to the attention function."""
    return keywords.get("cache") is not None and not isinstance(keywords["cache"], Cache)


def with_relative(keywords: Mapping[str, Any], bias: Tensor) -> dict[str, Any]:
    """The keywords of an attention function with another relative position bias."""
    return {**keywords, "position_bias": bias}


def has_relative_table(module: nn.Module) -> bool:
    """Whether an attention module has the table of relative positions that its whole stack uses (T5)."""
    return bool(getattr(module, "has_relative_attention_bias", False))


def relative_bias(table: Any, queries: int, keys: int, seen: Any, device: torch.device) -> Tensor:
    """The bias `[1, h, q, k]` of a table of relative positions; `seen` tokens stand before the first query."""
    return table.compute_bias(queries, keys, device=device, past_seen_tokens=seen)


def in_decoder(module: nn.Module) -> bool:
    """Whether an attention module of an encoder-decoder belongs to its decoder."""
    return bool(getattr(module, "is_decoder", False))


def chunk_of(module: nn.Module) -> int | None:
    """Of how many positions the chunks are that an attention module cannot look out of (Llama 4); None: any."""
    config, number = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or number is None or number >= len(kinds) or kinds[number] != "chunked_attention":
        return None
    return getattr(config, "attention_chunk_size", None)


def chunk_in(options: Mapping[str, Any]) -> int | None:
    """Of how many positions the chunks are in the mask that a mask maker is asked for; None where it has none."""
    chunk = getattr(options.get("config"), "attention_chunk_size", None)
    return chunk if chunk is not None and options.get("local_size") == chunk else None


def local_window(body: PreTrainedModel) -> int | None:
    """How far layers see that attend locally in code of their own (GPT-Neo)."""
    locally = "local" in getattr(body.config, "attention_layers", ())
    return getattr(body.config, "window_size", None) if locally else None


def shifted_mask(options: Mapping[str, Any], by: int | Tensor) -> dict[str, Any]:
    """The options of a mask maker for rows whose tokens stand `by` (`[B]`: each row's own) positions further on."""
    inner = options["mask_function"]

    def mask_function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shift = by[batch] if isinstance(by, Tensor) else by
        return inner(batch, head, query + shift, key + shift)

    return {**options, "mask_function": mask_function}


def tempers(module: nn.Module) -> bool:
    """Whether an attention module scales its queries by how far on they stand, which it counts by columns (Llama 4)."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not getattr(module, "use_rope", True)


def tempered(module: Any, query: Tensor, positions: Tensor, seen: int | Tensor) -> Tensor:
    """Queries `[B, h, T, k]` scaled by their `positions` `[B|1, T]`, and no more by columns, the first of which is the
    one behind `seen`."""

    def scale(at: Tensor) -> Tensor:
        return torch.log1p(torch.floor((at.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    columns = torch.arange(query.shape[2], device=query.device) + seen
    return (query * (scale(positions) / scale(columns))[:, None, :, None]).to(query.dtype)


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


def layers_of(base: nn.Module) -> list[nn.Module]:
    """The layers that transformers knows as such. (Their class is imported for seconds on older versions.)"""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def can_checkpoint(module: nn.Module) -> bool:
    """Whether a module may be told to recompute in the backward pass."""
    return "gradient_checkpointing" in module.__dict__ or hasattr(type(module), "gradient_checkpointing")


def checkpoints(module: nn.Module) -> bool:
    """Whether a module has been told to."""
    return bool(getattr(module, "gradient_checkpointing", False))


def checkpointing_function(module: nn.Module) -> Callable[..., Any] | None:
    """What a module recomputes its parts with."""
    return module.__dict__.get("_gradient_checkpointing_func")


def set_checkpointing_function(module: nn.Module, function: Callable[..., Any]) -> None:
    module.__dict__["_gradient_checkpointing_func"] = function


# ---- what a model is -----------------------------------------------------------------------------------------------


def configs_of(base: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every distinct config object that a part of the model reads its attention backend from."""
    found: dict[int, PreTrainedConfig] = {}
    for module in base.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


def text_config(base: PreTrainedModel) -> PreTrainedConfig:
    """The config of the part of a model that reads text."""
    return base.config.get_text_config()


def padding_id(base: PreTrainedModel) -> int | None:
    """The id that a model takes for padding, if its config names one."""
    return getattr(text_config(base), "pad_token_id", None)


def special_ids(base: PreTrainedModel) -> set[int]:
    """The tokens that a model's config gives a meaning of their own: padding, begin and end, places of images."""
    found: set[int] = set()

    def collect(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                collect(value)
            elif str(name).endswith(("token_id", "token_index", "token_ids")):
                each = value if isinstance(value, list | tuple) else [value]
                found.update(token for token in each if isinstance(token, int))

    collect(base.config.to_dict())
    return found


def number_of_layers(base: PreTrainedModel) -> int:
    """How many layers a model's config says that it has; 0 where it does not say."""
    return getattr(text_config(base), "num_hidden_layers", None) or 0


def possible_reaches(base: PreTrainedModel) -> set[int]:
    """The numbers in a model's config that may be how far its layers see, by what they are called."""
    return {
        value
        for name, value in text_config(base).to_dict().items()
        if type(value) is int and value > 0 and any(each in name for each in ("window", "chunk", "local"))
        if not any(each in name for each in ("layer", "pattern", "expert"))
    }


def query_heads(base: PreTrainedModel) -> int:
    """How many query heads a model's config says that it has; 0 where it does not say."""
    heads = getattr(text_config(base), "num_attention_heads", None)
    return heads if isinstance(heads, int) else 0


def context_length(base: PreTrainedModel) -> int | None:
    """How many positions a model's config says that there are; None where it names no such number."""
    found = getattr(text_config(base), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None  # XLNet's is −1: any


def keeps_state(base: PreTrainedModel) -> bool:
    """Whether something of the tokens before is kept besides keys and values, as recurrent layers do."""
    return bool(base._is_stateful)


def uses_cache_by_default(body: PreTrainedModel) -> bool:
    """Whether a model makes a cache where a call does not say."""
    return bool(getattr(body.config, "use_cache", False))


def without_losses(base: PreTrainedModel) -> dict[str, Any]:
    """What keeps a model from adding the experts' loss to a call that has no labels."""
    return {"output_router_logits": False} if getattr(text_config(base), "output_router_logits", False) else {}


def picked_keys(base: PreTrainedModel) -> int | None:
    """How many keys a token sees, where a layer picks them by an index of its own beside keys and values; None: all."""
    return getattr(text_config(base), "index_topk", None)


def pads_inside(base: PreTrainedModel) -> bool:
    """Whether a model fills its rows up to a multiple of a chunk, ids but not what is given in their place."""
    return getattr(base.config, "lsh_attn_chunk_length", None) is not None


def classifies_rows(base: PreTrainedModel) -> bool:
    """Whether a model has one output per row, read off its last token."""
    return type(base).__name__.endswith("ForSequenceClassification")


def reads_media(name: str) -> bool:
    """Whether an argument holds images, videos or sounds, whose places a model finds by the ids."""
    return name.startswith(("pixel_values", "image_", "video_", "input_features"))


def position_table(base: PreTrainedModel) -> nn.Embedding | None:
    """The table of learned absolute positions, if the model has one."""
    if context_length(base) is None:
        return None
    words = base.get_input_embeddings()
    for name, module in base.base_model.named_modules():
        named = "position" in name or name.endswith("wpe")
        if isinstance(module, nn.Embedding) and module is not words and named:
            return module
    return None


def fixed_positions(body: PreTrainedModel) -> int | None:
    """For how many positions a model has a fixed table or bias, where that is no learned one; None: for any."""
    for name, table in body.named_buffers():
        if name.endswith("embed_positions"):
            return table.shape[0]
    return getattr(body.config, "max_seq_len", None)


def decoder_tables(base: PreTrainedModel) -> list[nn.Module]:
    """The position tables of a BART-like decoder."""
    return [each for name, each in base.get_decoder().named_modules() if name == "embed_positions"]


def rotary_frequencies(base: nn.Module) -> Iterator[Tensor]:
    """By how much rotary embeddings turn keys per position."""
    for name, each in base.named_buffers():
        if name.endswith("inv_freq") and "original" not in name.rpartition(".")[2]:
            yield each


def fixed_tables(base: nn.Module) -> Iterator[Any]:
    """The modules' fixed tables of positions."""
    for module in base.modules():
        table = getattr(module, "embed_positions", None)
        if table is not None:
            yield table


def initialize(model: PreTrainedModel, part: nn.Module) -> None:
    """Draw the weights of a module as its model does."""
    model._init_weights(part)


def generates_from_vectors(base: PreTrainedModel) -> bool:
    """Whether a model's `generate` begins with vectors in place of ids: transformers looks for the name."""
    return takes(preparation(base), "inputs_embeds")


def preparation(base: PreTrainedModel) -> Callable[..., Any]:
    """What makes a call's arguments of what `generate` has."""
    return cast(Callable[..., Any], base.prepare_inputs_for_generation)


OF_AN_ASSISTANT = frozenset({
    "_maybe_prepare_encoder_kwargs_for_generation", "_prepare_encoder_decoder_kwargs_for_generation",
    "_prepare_model_inputs", "_supports_logits_to_keep", "base_model_prefix",
})  # fmt: skip
"""What transformers asks of a model that drafts for another's `generate`, besides what is public."""


def set_preparation(base: PreTrainedModel, prepare: Callable[..., Any]) -> None:
    """Put another in its place."""
    base.__dict__["prepare_inputs_for_generation"] = prepare


def is_masked_config(config: PreTrainedConfig) -> bool:
    """Whether there is a masked language model for a config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def predicts_masks(name: str) -> bool:
    """Whether a class of this name is a masked language model. (By name: the classes are imported for seconds.)"""
    from transformers.models.auto import modeling_auto

    return name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def predicts_next(name: str) -> bool:
    """Whether a class of this name is a causal language model."""
    from transformers.models.auto import modeling_auto

    return name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def hub_file(path: str, name: str) -> str | None:
    """Where a file of a model on the hub is on this machine."""
    from transformers.utils.hub import cached_file

    return cached_file(path, name)


# ---- what training loops ask ---------------------------------------------------------------------------------------


def loss_kind(base: PreTrainedModel) -> str | None:
    """What transformers calls the loss of a model."""
    return getattr(base, "loss_type", None)


def pop_fused_scores(model: nn.Module, keywords: dict[str, Any]) -> dict[str, Any] | None:
    """What TRL asks a model for instead of logits, taken out of a call's arguments: which scores per token (`wanted`),
    at which `temperature`, as far as it says; None where it asks for none.

    Where a call names none, TRL has noted them down in the model: `add_fused_lm_head` puts a `forward` into it that
    knows nothing of prompts, and has names and temperature in its closure. Mixed precision may have wrapped that.
    """
    asked = keywords.pop("fused_lm_head", None)
    if not asked:
        return None
    function, told = getattr(model.__dict__.get("forward"), "__func__", None), {}
    while function is not None and "temperature" not in told:
        code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
        if code is not None and cells is not None:
            told = dict(zip(code.co_freevars, cells, strict=True))
        function = getattr(function, "__wrapped__", None)
    known = {"outputs": "wanted", "temperature": "temperature"} if "temperature" in told else {}
    options = {name: told[other].cell_contents for other, name in known.items() if other in told}
    return options if asked is True else {**options, "wanted": tuple(asked)}


def tracker(name: str) -> Callable[..., Any]:
    """The class of Trainer's callback for a tracker: wandb, mlflow or tensorboard."""
    from transformers.integrations import integration_utils

    kinds = {"wandb": "WandbCallback", "mlflow": "MLflowCallback", "tensorboard": "TensorBoardCallback"}
    return getattr(integration_utils, kinds[name])


# ---- accelerate ----------------------------------------------------------------------------------------------------

HOOK = "_hf_hook"
"""Where accelerate keeps what it does before and after a module's forward."""


def is_dispatched(base: nn.Module) -> bool:
    """Whether accelerate places this model's layers."""
    return HOOK in base.__dict__ or "hf_device_map" in base.__dict__


def hook_of(module: nn.Module) -> Any:
    return module.__dict__.get(HOOK)


def loader_of(module: nn.Module) -> Any:
    """What of accelerate's hooks brings a module's weights along, if anything does."""
    hook = hook_of(module)
    if hook is None:
        return None
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    parts = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    loads = [part for part in parts if isinstance(part, AlignDevicesHook) and part.offload]
    return loads[0] if loads else None


def without_hooks(module: nn.Module, recurse: bool = False) -> nn.Module:
    """A module as it is without accelerate's hooks, which are taken away; with `recurse` those of its parts, too."""
    from accelerate.hooks import remove_hook_from_module

    return remove_hook_from_module(module, recurse=recurse)


# ---- torch: sharding, kernels --------------------------------------------------------------------------------------


def is_sharded(base: nn.Module) -> bool:
    """Whether other processes hold parts of this model: torch's own mark."""
    return base.__dict__.get("_is_fsdp_managed_module", False)


def is_shard(weight: Tensor) -> bool:
    """Whether a weight is this process's part of one that several processes hold."""
    if type(weight) is nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def sharded_parts(base: nn.Module) -> list[Any]:
    """The modules of a model whose weights FSDP2 gathers together, the model itself first where it is one."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in base.modules() if isinstance(module, FSDPModule)]


Kernel = tuple[Any, Any]
"""A kernel that also gives its log-sum-exp, and its backward pass."""


def cpu_flash() -> Kernel:
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return _kernel(name), _kernel(f"{name}_backward")


def cuda_flash() -> Kernel:
    return _kernel("_scaled_dot_product_flash_attention"), _kernel("_scaled_dot_product_flash_attention_backward")


def cuda_efficient() -> Kernel:
    name = "_scaled_dot_product_efficient_attention"
    return _kernel(name), _kernel(f"{name}_backward")


def _kernel(name: str) -> Any:
    return getattr(torch.ops.aten, name).default


def compiled_flex() -> tuple[Any, Any]:
    """Flex attention as transformers compiles it for its own calls, and what asks it for its log-sum-exp."""
    from torch.nn.attention.flex_attention import AuxRequest
    from transformers.integrations import flex_attention

    return flex_attention.compile_friendly_flex_attention, AuxRequest(lse=True)


def itself(module: nn.Module) -> nn.Module:
    """The module, for which `torch.export` hands over stand-ins."""
    if not torch.compiler.is_exporting():
        return module
    found: Any = module
    return found.get_base() if "AttrProxy" in (kind.__name__ for kind in type(module).__mro__) else module


def unsharded_class(base: nn.Module) -> type:
    """The class of a model: FSDP2 puts one of its own before it."""
    kinds = type(base).__mro__
    return kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def peft_module(name: str = "") -> ModuleType | None:
    """A module of PEFT, if whoever made the model has imported it; this library never does."""
    return sys.modules.get(f"peft.{name}" if name else "peft")


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is in PEFT's wrapper."""
    peft = peft_module()
    return peft is not None and isinstance(model, peft.PeftModel)


def peft_layers(modules: Iterable[nn.Module]) -> bool:
    """Whether PEFT has put layers of its own among modules."""
    layers = peft_module("tuners.tuners_utils")
    return layers is not None and any(isinstance(module, layers.BaseTunerLayer) for module in modules)


def saved_by_peft(module: nn.Module) -> bool:
    """Whether this is a head that PEFT trains and saves beside its adapters."""
    other = peft_module("utils.other")
    return other is not None and isinstance(module, other.ModulesToSaveWrapper)


def trained_kinds() -> tuple[type, ...]:
    """The classes of modules that PEFT trains parameters in."""
    layers, other = peft_module("tuners.tuners_utils"), peft_module("utils.other")
    return () if layers is None or other is None else (layers.BaseTunerLayer, other.AuxiliaryTrainingWrapper)


def own(base: PreTrainedModel) -> PreTrainedModel:
    """A model's body, which every head calls."""
    body = base.base_model
    return cast(PreTrainedModel, body)
