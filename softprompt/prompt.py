"""What a method makes – a prompt – and the contract every method fulfils.

Shapes: p virtual tokens, d model width, L attention layers, h key-value heads, k head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from softprompt.config import PromptConfig
from softprompt.errors import ConfigError, UnsupportedError

METHODS: "dict[str, type[SoftPrompt]]" = {}
"""Every method by its name; filled by subclassing, see `SoftPrompt`."""


@dataclass(frozen=True)
class LayerShape:
    """Key and value shape of one attention layer, for one token; `window` is its sliding window, if any."""

    heads: int
    key_size: int
    value_size: int
    window: int | None = None


@dataclass(frozen=True)
class Geometry:
    """What a probe forward pass found out about a base model (never read from a list of config key names).

    `hidden_size` is the width of the input embeddings, `context` the number of tokens that have a position.
    """

    layers: tuple[LayerShape, ...]
    hidden_size: int
    query_heads: int
    causal: bool
    context: int | None
    learned_positions: bool
    position_offset: int
    shared_layers: bool = False

    def uniform_layer(self) -> LayerShape:
        """The one shape all layers share. Raises UnsupportedError where layers differ, or are one layer run again."""
        if self.shared_layers:
            raise UnsupportedError(
                "this model runs one attention layer several times, so its layers cannot have a prefix each; use "
                "prompt_tuning or p_tuning."
            )
        shapes = {(layer.heads, layer.key_size, layer.value_size) for layer in self.layers}
        if len(shapes) > 1 or self.layers[0].key_size != self.layers[0].value_size:
            found = ", ".join(f"{h} heads of {k}/{v}" for h, k, v in sorted(shapes))
            raise UnsupportedError(
                f"this model's layers have different key-value shapes ({found}), which a prefix cannot have yet; "
                "use prompt_tuning or p_tuning."
            )
        return self.layers[0]


@dataclass(frozen=True)
class Embeddings:
    """A prompt in input space: `vectors` `[1, p, d]`."""

    vectors: Tensor

    @property
    def length(self) -> int:
        return self.vectors.shape[1]


@dataclass(frozen=True)
class KV:
    """A prompt as keys and values: one `(key, value)` pair per attention layer, each `[1, h, p, k]`.

    Keys are as the cache holds them, that is after rotary position embedding at positions 0…p−1.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    @staticmethod
    def from_flat(flat: Tensor, layers: int, heads: int) -> "KV":
        """Unpack `[p, L·2·h·k]`, ordered K0, V0, K1, V1, … (PEFT's layout of `prompt_embeddings`)."""
        parts = flat.view(flat.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
        return KV(tuple((parts[2 * i], parts[2 * i + 1]) for i in range(layers)))

    def flat(self) -> Tensor:
        """The same prompt as `[p, L·2·h·k]`, the inverse of `from_flat`."""
        rows = [part[0].transpose(0, 1).flatten(1) for pair in self.layers for part in pair]
        return torch.cat(rows, dim=1)

    def truncate(self, length: int) -> "KV":
        """The first `length` virtual tokens."""
        return KV(tuple((key[:, :, :length], value[:, :, :length]) for key, value in self.layers))

    def detach(self) -> "KV":
        return KV(tuple((key.detach(), value.detach()) for key, value in self.layers))

    def to_cache(self, batch_size: int = 1) -> Any:
        """A `DynamicCache` that holds this prefix for `batch_size` rows, for use without this library."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (key, value) in enumerate(self.layers):
            cache.update(key.repeat(batch_size, 1, 1, 1), value.repeat(batch_size, 1, 1, 1), index)
        return cache

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with `key.<layer>` and `value.<layer>`, each `[h, p, k]`."""
        from softprompt.checkpoint import write_tensors

        tensors = {}
        for index, (key, value) in enumerate(self.layers):
            tensors[f"key.{index}"], tensors[f"value.{index}"] = key[0], value[0]
        write_tensors(Path(path), tensors)

    @staticmethod
    def load(path: str | Path) -> "KV":
        """Read what `save` wrote; a file that is not that is a CheckpointError."""
        from softprompt.checkpoint import read_kv_file

        return KV(tuple((key[None], value[None]) for key, value in read_kv_file(Path(path))))


class SoftPrompt(nn.Module, ABC):
    """A method: turns its parameters into a prompt. It never sees the batch, the task head or `generate`.

    A concrete subclass sets `name` and `config_class`, and is registered by being defined. It is made from
    `(config, word_embeddings=None)`, keeps a table `embedding`, and maps indices `[B, n]` to vectors `[B, n, width]` in
    `forward`. With `config.inference_mode` it is built without its encoder: the table alone is the prompt.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[PromptConfig]]
    peft_type: ClassVar[str]
    config: PromptConfig
    embedding: nn.Embedding

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            if cls.name in METHODS:
                raise ConfigError(f"a method named {cls.name!r} is already registered by {METHODS[cls.name]}.")
            METHODS[cls.name] = cls
            cls.peft_type = cls.config_class.PEFT_TYPE

    @classmethod
    @abstractmethod
    def fill(cls, config: PromptConfig, geometry: Geometry) -> PromptConfig:
        """The config with everything that the base model decides filled in; ConfigError if it contradicts the model."""

    @abstractmethod
    def forward(self, indices: Tensor) -> Tensor:
        """Indices of virtual tokens `[B, n]` → vectors `[B, n, width]`."""

    @abstractmethod
    def prompt(self) -> Embeddings | KV:
        """The prompt as it is now, with gradient, computed once whatever the batch."""

    @abstractmethod
    def output_layer(self) -> nn.Linear | None:
        """The last linear layer of the encoder, or None where the table itself is the prompt."""

    def all_vectors(self) -> Tensor:
        """Every virtual token's vector, `[n, width]`, with gradient."""
        rows = self.embedding.num_embeddings
        return self(torch.arange(rows, device=self.embedding.weight.device)[None])[0]

    @torch.no_grad()
    def saved_vectors(self) -> Tensor:
        """What a checkpoint holds: `[n, width]`, without dropout and without gradient."""
        with evaluating(self):
            return self.all_vectors().detach().clone()

    @torch.no_grad()
    def start_from(self, target: Tensor) -> None:
        """Set the parameters so that the prompt is `target` `[n, width]`.

        Where an encoder stands before the prompt, its last linear layer is solved for by least squares, which is exact
        while there are no more virtual tokens than hidden units (that are not switched off by a ReLU), and the best
        that this layer can do beyond (the paper fits the whole FFN with 500 Adam steps, 2101.00190 §7.4; one solve is
        exact and takes no learning rate).
        """
        table, layer = self.embedding.weight, self.output_layer()
        expected = (table.shape[0], table.shape[1] if layer is None else layer.out_features)
        if tuple(target.shape) != expected:
            raise ConfigError(f"initial vectors have shape {tuple(target.shape)}, this prompt needs {expected}.")
        if layer is None:
            table.copy_(target)
            return
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        with evaluating(self):
            self.all_vectors()
        hook.remove()
        solve_linear(layer, seen[0], target)


class EmbeddingPrompt(SoftPrompt):
    """Base of the methods whose prompt lives in input space."""

    @classmethod
    def fill(cls, config: PromptConfig, geometry: Geometry) -> PromptConfig:
        return _filled(config, token_dim=geometry.hidden_size, num_layers=len(geometry.layers),
                       num_attention_heads=geometry.query_heads)  # fmt: skip

    def prompt(self) -> Embeddings:
        return Embeddings(self.all_vectors()[: self.config.num_virtual_tokens][None])


class KVPrompt(SoftPrompt):
    """Base of the methods whose prompt is keys and values; `width` is L·2·h·k."""

    @classmethod
    def fill(cls, config: PromptConfig, geometry: Geometry) -> PromptConfig:
        layer = geometry.uniform_layer()
        # As in PEFT, the model's width and query heads may be given where keys and values are fewer (grouped queries).
        if config.token_dim == geometry.hidden_size:
            config = replace(config, token_dim=None)
        if config.num_attention_heads == geometry.query_heads:
            config = replace(config, num_attention_heads=None)
        return _filled(config, token_dim=layer.heads * layer.key_size, num_layers=len(geometry.layers),
                       num_attention_heads=layer.heads)  # fmt: skip

    def prompt(self) -> KV:
        layers, heads = self.config.num_layers, self.config.num_attention_heads
        assert layers is not None and heads is not None
        return KV.from_flat(self.all_vectors(), layers, heads)


def _filled(config: PromptConfig, **found: int) -> PromptConfig:
    for name, value in found.items():
        given = getattr(config, name)
        if given is not None and given != value:
            raise ConfigError(f"{name}={given} in the config, but this model needs {value}; leave it unset.")
    submodules = config.num_transformer_submodules or 1
    return replace(config, num_transformer_submodules=submodules, **found)


@torch.no_grad()
def solve_linear(layer: nn.Linear, features: Tensor, target: Tensor) -> None:
    """Change `layer` by the least (in norm) that makes it map `features` `[n, m]` to `target` `[n, width]`.

    Starting from a small layer keeps its random rows; the correction is the minimum-norm one, solved in float64.
    """
    inputs = torch.cat([features, torch.ones_like(features[:, :1])], dim=1).double()
    missing = target.double() - layer(features).double()
    update = torch.linalg.lstsq(inputs, missing, driver="gelsd" if inputs.device.type == "cpu" else None).solution
    layer.weight += update[:-1].T.to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias += update[-1].to(layer.bias.dtype)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; every submodule's own mode comes back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def need_count(config: PromptConfig, *names: str) -> None:
    """ConfigError unless each of these config fields is set; used where an encoder is built outside a model."""
    for name in names:
        if getattr(config, name) is None:
            raise ConfigError(f"{type(config).__name__}.{name} is not set; pass it, or let get_peft_model fill it in.")
