"""Saving and loading prompts. PEFT's format is the format.

A folder with `adapter_config.json` and `adapter_model.safetensors` (`prompt_embeddings`, and task heads as
`base_model.<path>.*`), which PEFT reads and writes too. Beside them there may be `encoder.safetensors`, which PEFT
ignores: the encoder the prompt came from, to go on training with. Reading trusts nothing, see `guard`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from softprompt.checkpoint.config_file import CONFIG_NAME, config_to_json, parse_config, read_config
from softprompt.checkpoint.files import Find, for_hub, locate, need, write_files
from softprompt.checkpoint.guard import (
    check_adapter_name,
    check_finite,
    check_layouts,
    read_any_tensors,
    read_metadata,
    read_tensors,
)
from softprompt.checkpoint.promise import Promise, encoder_shapes, promise_of, read_promise
from softprompt.checkpoint.training_state import STATE_NAME, read_training_state
from softprompt.config import KVConfig, PromptConfig, widest_shape
from softprompt.errors import CheckpointError
from softprompt.facts import Facts

__all__ = [
    "CONFIG_NAME",
    "ENCODER_NAME",
    "WEIGHTS_NAME",
    "SavedAdapter",
    "check_adapter_name",
    "check_fits",
    "for_hub",
    "load_adapter",
    "load_config",
    "read_adapter",
    "read_kv_file",
    "save_adapter",
    "write_config",
    "write_files",
    "write_tensors",
]

WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"
ENCODER_NAME = "encoder.safetensors"
_PROMPT_DIGEST = "prompt_sha256"


@dataclass(frozen=True)
class SavedAdapter:
    """What a checkpoint holds, checked, on the CPU.

    `tensors`: `prompt_embeddings` (`[n·submodules, d]`, or `[n, L·2·h·k]` for a KV method) and heads by their PEFT
    names. `encoder`: the kept encoder's state dict, where there is one. `source`: where it came from, for messages.
    """

    config: PromptConfig
    tensors: dict[str, Tensor]
    encoder: dict[str, Tensor] | None = None
    source: str = "the adapter"


def save_adapter(
    folder: Path, config: PromptConfig, tensors: Mapping[str, Tensor], encoder: Mapping[str, Tensor] | None = None
) -> None:
    """Write an adapter so that PEFT can read it, whole or not at all; `inference_mode` is true on disk.

    `encoder` is the state dict of the encoder, to go on training with; where the prompt is a table of its own there is
    nothing more to keep, and nothing is written. What could not be loaded again (a NaN, a wrong shape) is a
    CheckpointError, as is a folder that cannot be written; an earlier checkpoint there then stays as it was.
    """
    folder = Path(folder)
    text = config_to_json(config).encode()
    config = parse_config(text, folder / CONFIG_NAME)
    shapes = promise_of(config, folder / CONFIG_NAME).shapes
    plain = _plain(tensors)
    check_layouts(folder / WEIGHTS_NAME, _layouts(plain), shapes, config.modules_to_save)
    check_finite(folder / WEIGHTS_NAME, plain)
    kept = None
    if encoder is not None and tuple(encoder) != ("embedding.weight",):
        state = _plain(encoder)
        check_layouts(folder / ENCODER_NAME, _layouts(state), encoder_shapes(config, folder / CONFIG_NAME), None)
        kept = _pack(check_finite(folder / ENCODER_NAME, state), {_PROMPT_DIGEST: _digest(plain, shapes)})
    # an old encoder goes first: should the machine stop half-way, what is left is a prompt without one, never a mixture
    write_files(folder, [(ENCODER_NAME, None), (WEIGHTS_NAME, _pack(plain)), (ENCODER_NAME, kept), (CONFIG_NAME, text)])


def load_adapter(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    *,
    subfolder: str = "",
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> SavedAdapter:
    """Read an adapter from a folder, else from the hub. Raises CheckpointError; nothing in it is ever run.

    A folder may also be the checkpoint of a training loop (transformers' Trainer, Accelerate) with a prompted model's
    state. `subfolder`: where a named adapter lies in the folder of several. The rest is for the hub alone.
    """
    find = locate(path_or_hub_id, subfolder, revision, cache_dir, token, local_files_only)
    saved = _of_a_loop(Path(path_or_hub_id), find) or read_adapter(find, path_or_hub_id)
    return replace(saved, config=deepcopy(saved.config))  # nobody's changes to its lists reach another adapter's


def _of_a_loop(folder: Path, find: Find) -> SavedAdapter | None:
    """The adapter in a training loop's own checkpoint, if `folder` is one: it has the state and no config file."""
    if not folder.is_dir() or find(CONFIG_NAME) is not None:
        return None
    path = find(STATE_NAME)
    found = None if path is None else read_training_state(path)
    if path is None or found is None:
        return None
    return SavedAdapter(*found, source=str(path.parent))


def read_adapter(
    find: Find,
    asked: str | Path,
    check: Callable[[Promise, str], None] = lambda promised, source: None,
    mapped: bool = False,
) -> SavedAdapter:
    """Read an adapter from where `find` finds its files; `asked` is what the user called it. Raises CheckpointError.

    `check` sees what the config promises, and where it stands, before a tensor is read. Adapters with the same
    `adapter_config.json` share the config. `mapped`: as for `tensor_file.read_file`.
    """
    config_path = need(find, CONFIG_NAME, asked)
    promised, source = read_promise(config_path), str(config_path.parent)
    check(promised, source)
    weights = find(WEIGHTS_NAME) or find(OLD_WEIGHTS_NAME)
    if weights is None:
        raise CheckpointError(
            f"{source} has a {CONFIG_NAME} but neither {WEIGHTS_NAME} nor {OLD_WEIGHTS_NAME}; copy the whole adapter."
        )
    tensors = read_tensors(weights, promised.shapes, promised.config.modules_to_save, mapped)
    kept = find(ENCODER_NAME)
    encoder = None if kept is None else _load_encoder(kept, config_path, promised, tensors)
    return SavedAdapter(promised.config, tensors, encoder, source)


def load_config(path_or_hub_id: str | Path, revision: str | None = None, **options: Any) -> PromptConfig:
    """The config of an adapter alone, checked; options as for `load_adapter`."""
    options = {"subfolder": "", "cache_dir": None, "token": None, "local_files_only": False} | options
    find = locate(path_or_hub_id, revision=revision, **options)
    return read_config(need(find, CONFIG_NAME, path_or_hub_id))


def write_config(folder: Path, config: PromptConfig) -> None:
    """Write `adapter_config.json` alone. Raises CheckpointError."""
    write_files(Path(folder), [(CONFIG_NAME, config_to_json(config).encode())])


def check_fits(saved: SavedAdapter, facts: Facts) -> None:
    """Raise CheckpointError if the adapter was made for a base model of other sizes, naming each and both numbers."""
    config, count = saved.config, len(facts.layers) or None
    sizes: list[tuple[str, Any, Any]]
    if isinstance(config, KVConfig):
        _check_paired(saved, config, facts)
        sizes = _sizes_of_pairs(saved, config, facts)
    else:
        sizes = [
            ("layers", config.num_layers, count),
            ("width", config.token_dim, facts.hidden_size),
            ("attention heads", config.num_attention_heads, facts.query_heads or None),
        ]
    wrong = [
        f"{name} {there} in the adapter, {here} here"
        for name, there, here in sizes
        if there not in (None, here) and here is not None
    ]
    if wrong:
        name = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
        raise CheckpointError(
            f"{saved.source} was made for another base model{name}: {'; '.join(wrong)}; load that base model, or train "
            f"a prompt for this one."
        )


def _sizes_of_pairs(saved: SavedAdapter, config: KVConfig, facts: Facts) -> list[tuple[str, Any, Any]]:
    """What has to be equal of keys and values: its name, what it is in the adapter, and here."""
    count = len(facts.layers) or None
    others = (2 * (count or 0) if config.paired else 0, (count or 0) + facts.shared_layers)
    sizes: list[tuple[str, Any, Any]] = [("layers", count if config.num_layers in others else config.num_layers, count)]
    layers = facts.prefix_layers(config)
    shapes = [[layer.heads, layer.key_size, layer.value_size] for layer in layers]
    there, widest = config.prefix_shapes, None if facts.encoder_decoder else widest_shape(shapes)
    uneven = config.layer_shapes is None and any(shape != shapes[0] for shape in shapes)
    if uneven:
        _check_reaches(saved, there[0], shapes)
    if uneven and widest is not None:
        here = [*widest, widest[1]]  # PEFT's form, the first heads and numbers of which each layer has
    else:
        here = shapes[0]
        if not all(shape == given[0] and shape[1] == shape[2] for given in (there, shapes) for shape in given):
            return [*sizes, ("key-value shapes", there, shapes)]
    sizes += [("key-value heads", there[0][0], here[0]), ("head size", there[0][1], here[1])]
    if config.num_layers == count:
        sizes.append(("attention layers with a prefix", len(there), len(shapes)))
    return sizes


def _check_reaches(saved: SavedAdapter, there: list[int], shapes: list[list[int]]) -> None:
    """CheckpointError for a prefix that PEFT gives to some layers only: its pairs are too narrow for the others."""
    beyond = [number for number, (heads, size, _) in enumerate(shapes) if heads > there[0] or size > there[1]]
    if beyond and len(beyond) < len(shapes):
        raise CheckpointError(
            f"{saved.source} was made for another base model, or leaves out layers of this one: {there[0]} key-value "
            f"heads of size {there[1]} are too few for attention layers {', '.join(map(str, beyond))}, which PEFT then "
            "runs without a prefix; here every layer has one, so train it again here."
        )


def _check_paired(saved: SavedAdapter, config: KVConfig, facts: Facts) -> None:
    if facts.encoder_decoder and config.num_transformer_submodules == 1 and config.layer_shapes is None:
        raise CheckpointError(
            f"{saved.source} has num_transformer_submodules=1 for an encoder-decoder: PEFT runs cross-attention over "
            "the decoder's own cache there, which is not repeated here; train the prefix again, here or with "
            "num_transformer_submodules=2."
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, whole or not at all. Raises CheckpointError."""
    plain = check_finite(Path(path), _plain(tensors))
    write_files(Path(path).parent, [(Path(path).name, _pack(plain))])


def read_kv_file(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Key and value `[h, p, k]` of every layer, as `KV.save` writes them. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; fold a prompt and save it there first.")
    tensors = read_any_tensors(path, lambda found: _check_kv(path, {name: shape for name, (shape, _) in found.items()}))
    return [(tensors[f"key.{index}"], tensors[f"value.{index}"]) for index in range(len(tensors) // 2)]


def _check_kv(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    names = {f"{part}.{index}" for part in ("key", "value") for index in range(len(shapes) // 2)}
    if not shapes or set(shapes) != names:
        raise CheckpointError(
            f"{path} is not a key-value prompt file; it holds {', '.join(sorted(shapes)[:4]) or 'nothing'}."
        )
    length = shapes["key.0"][1] if len(shapes["key.0"]) == 3 else -1
    for name, shape in shapes.items():
        if len(shape) != 3 or 0 in shape or shape[1] != length or shape[0] != shapes[name.replace("value", "key")][0]:
            raise CheckpointError(
                f"{path}: {name} has shape {list(shape)}, not [heads, {length} virtual tokens, size]; save it again."
            )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, in their own type, sharing no memory."""
    return {name: each.detach().to("cpu", copy=True).contiguous() for name, each in tensors.items()}


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype | str]]:
    return {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()}


def _pack(tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    return to_safetensors(tensors, metadata={"format": "pt", **(metadata or {})})


def _digest(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """What ties an encoder to the prompt it was saved with."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_encoder(path: Path, config_path: Path, promised: Promise, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    encoder = read_tensors(path, encoder_shapes(promised.config, config_path))
    if read_metadata(path).get(_PROMPT_DIGEST) != _digest(tensors, promised.shapes):
        raise CheckpointError(f"{path} was not saved together with the prompt beside it; delete it to use the prompt.")
    return encoder
