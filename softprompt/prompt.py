"""What a method makes – a prompt – and the contract every method fulfils.

Shapes: p virtual tokens, d model width, L attention layers, h key-value heads, k head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from softprompt.config import KVConfig, PromptConfig, TaskType, widest_shape
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.pairs import as_checkpoint, from_checkpoint

if TYPE_CHECKING:
    from softprompt.facts import Facts

METHODS: "dict[str, type[SoftPrompt]]" = {}
"""Every method by its name; filled by subclassing, see `SoftPrompt`."""


@dataclass(frozen=True)
class Context:
    """Virtual tokens that stand for a text with answers, which the loss counts too (see `context_loss`).

    `ids` `[p]` are the tokens of the text. `types` `[p]` are multiples of four, ascending, at the answers' tokens. An
    answer's tokens count `decay` times as much as those of the next.
    """

    ids: Tensor
    types: Tensor
    decay: float


@dataclass(frozen=True)
class Embeddings:
    """A prompt in input space: `vectors` `[N, p, d]`.

    `rows` `[B]` says which of the N prompts each row has; without it there is one for all, or for each row its own in
    order. `lengths` are their numbers of virtual tokens where they differ, the shorter ones padded in front. `context`
    is set where the prompt is itself a text with answers. `decoder` `[N, q, d]` are more vectors, for the decoder of an
    encoder-decoder.
    """

    vectors: Tensor
    rows: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    context: Context | None = None
    decoder: Tensor | None = None

    @property
    def length(self) -> int:
        return self.vectors.shape[1]

    def per_row(self, batch: int) -> Tensor:
        """The prompt of every row, `[B, p, d]`; a batch that generation has widened repeats each row's."""
        return spread(self.vectors, self.rows, batch)


Pairs = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class KV:
    """A prompt as keys and values: one `(key, value)` pair per attention layer, each `[N, h, p, k]`.

    `layers` are for self-attention (an encoder-decoder's decoder), `cross` and `encoder` for an encoder-decoder's
    other attentions. Keys are as the cache holds them, that is after rotary position embedding at positions 0…p−1.
    `rows` and `lengths` as in `Embeddings`. `always_visible`: also to queries further away than a sliding window.
    """

    layers: Pairs
    cross: Pairs = ()
    encoder: Pairs = ()
    rows: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    always_visible: bool = False

    @property
    def pairs(self) -> Pairs:
        return (*self.layers, *self.cross, *self.encoder)

    @property
    def length(self) -> int:
        return self.pairs[0][0].shape[2]

    @staticmethod
    def from_flat(flat: Tensor, config: KVConfig) -> "KV":
        """Unpack `[p, Σ h·(k+v)]`, ordered K0, V0, K1, V1, … (PEFT's layout of `prompt_embeddings`).

        The decoder's layers come first, then cross-attention's, then the encoder's, as far as the config has them.
        """
        shapes = config.prefix_shapes
        heads, size, other = shapes[0]
        if size == other and all(each == shapes[0] for each in shapes):  # as a rule; in one step
            parts = flat.unflatten(1, (2 * len(shapes), 1, heads, size)).permute(1, 2, 3, 0, 4).unbind()
        else:
            widths = [heads * size for heads, *sizes in shapes for size in sizes]
            counts = [each[0] for each in shapes for _ in range(2)]
            parts = [
                part.unflatten(1, (count, -1)).transpose(0, 1)[None]
                for part, count in zip(flat.split(widths, dim=1), counts, strict=True)
            ]
        pairs = tuple(zip(parts[::2], parts[1::2], strict=True))
        assert config.num_layers is not None
        own = config.num_layers if config.decoder_prefix else 0
        cross = own + (config.num_layers if config.cross_prefix else 0)
        visible = config.prefix_always_visible
        return KV(pairs[:own], pairs[own:cross], pairs[cross:], always_visible=visible)

    def flat(self) -> Tensor:
        """The same prompt as `[p, Σ h·(k+v)]`, the inverse of `from_flat`."""
        rows = [part[0].transpose(0, 1).flatten(1) for pair in self.pairs for part in pair]
        return torch.cat([row.to(rows[0].device) for row in rows], dim=1)  # layers may be on different devices

    def map(self, change: Callable[[Tensor], Tensor]) -> "KV":
        """The same prompt with every key and value tensor changed."""
        parts = ((tuple((change(k), change(v)) for k, v in part)) for part in (self.layers, self.cross, self.encoder))
        layers, cross, encoder = parts
        return replace(self, layers=layers, cross=cross, encoder=encoder)

    def truncate(self, length: int) -> "KV":
        """The first `length` virtual tokens."""
        return self.map(lambda part: part[:, :, :length])

    def detach(self) -> "KV":
        return self.map(Tensor.detach)

    def to_cache(self, batch_size: int = 1) -> Any:
        """A `DynamicCache` that holds this prefix for `batch_size` rows, for use without this library."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (key, value) in enumerate(self.layers):
            cache.update(key.repeat(batch_size, 1, 1, 1), value.repeat(batch_size, 1, 1, 1), index)
        return cache

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with `key.<layer>` and `value.<layer>`, each `[h, p, k]`.

        ConfigError for what such a file cannot say.
        """
        from softprompt.checkpoint import write_tensors

        more = "prefixes of an encoder-decoder" if self.cross or self.encoder else "prefix_always_visible"
        if self.cross or self.encoder or self.always_visible:
            raise ConfigError(f"{path}: a key-value file has no {more}; keep the folder of the adapter instead.")
        if self.layers[0][0].shape[0] > 1:
            raise ConfigError(f"{path}: a key-value file holds one prompt, these are several; save each by itself.")
        tensors = {}
        for index, (key, value) in enumerate(self.layers):
            tensors[f"key.{index}"], tensors[f"value.{index}"] = key[0], value[0]
        write_tensors(Path(path), tensors)

    @staticmethod
    def load(path: str | Path) -> "KV":
        """Read what `save` wrote; a file that is not that is a CheckpointError."""
        from softprompt.checkpoint import read_kv_file

        return KV(tuple((key[None], value[None]) for key, value in read_kv_file(Path(path))))


def spread(values: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """`[N, …]` as `[B, …]`: each row's own, repeated where a batch is a multiple of the rows (beams)."""
    if rows is None and len(values) > 1:
        return values if len(values) == batch else values.repeat_interleave(batch // len(values), dim=0)
    if rows is None:
        return values.expand(batch, *values.shape[1:])
    if batch % len(rows):
        raise ConfigError(f"{len(rows)} rows have a prompt, but the model is called with {batch}; give one per row.")
    return values[rows.repeat_interleave(batch // len(rows))]


class SoftPrompt(nn.Module, ABC):
    """A method: turns its parameters into a prompt. It never sees the batch, the task head or `generate`.

    A concrete subclass sets `name` and `config_class`, and is registered by being defined. It is made from
    `(config, word_embeddings=None)`, keeps a table `embedding`, and maps indices `[B, n]` to vectors `[B, n, width]` in
    `forward`. With `config.inference_mode` it is built without its encoder: the table alone is the prompt.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[PromptConfig]]
    peft_type: ClassVar[str]
    saved_names: ClassVar[Mapping[str, str]] = {"prompt_embeddings": "embedding.weight"}
    """The tensors of a checkpoint by their names there, and what they are in the state of `inference_mode`."""
    token_dims: ClassVar[Mapping[str, int]] = {"prompt_embeddings": 0}
    """Which dimension of a saved tensor counts virtual tokens, for those that have one."""
    task_parameters: ClassVar[tuple[str, ...]] = ()
    """The parameters that belong to one of several tasks each; they may have a learning rate of their own."""
    table_is_prompt: ClassVar[bool] = False
    """Whether a checkpoint's `prompt_embeddings` are the prompt, with nothing more to compute or to know."""
    task_types: ClassVar[tuple[TaskType, ...]] = tuple(TaskType)
    """The heads the method can be trained for."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Config fields to try the method with, four virtual tokens long, where the defaults show too little of it."""

    config: PromptConfig
    embedding: nn.Embedding
    num_tasks: int = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            if cls.name in METHODS:
                raise ConfigError(f"a method named {cls.name!r} is already registered by {METHODS[cls.name]}.")
            METHODS[cls.name] = cls
            cls.peft_type = cls.config_class.PEFT_TYPE

    @classmethod
    @abstractmethod
    def fill(cls, config: PromptConfig, facts: "Facts") -> PromptConfig:
        """The config with everything that the base model decides filled in; ConfigError if it contradicts the model."""

    @abstractmethod
    def forward(self, indices: Tensor) -> Tensor:
        """Indices of virtual tokens `[B, n]` → vectors `[B, n, width]`."""

    @abstractmethod
    def prompt(self, task_ids: Tensor | None = None) -> Embeddings | KV:
        """The prompt as it is now, with gradient, computed once whatever the batch.

        `task_ids` `[B]` chooses among several tasks' prompts; ConfigError where the method has no tasks.
        """

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

    def saved_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by the names it has there, detached."""
        state, copies = self.state_dict(), self.config.saved_copies
        saved = {name: state[own].clone() for name, own in self.saved_names.items() if name != "prompt_embeddings"}
        saved = {"prompt_embeddings": self.saved_vectors(), **saved}
        return saved | {name: torch.cat([saved[name]] * copies, dim) for name, dim in self.token_dims.items()}

    @torch.no_grad()
    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved_tensors` gave."""
        first = {
            name: tensors[name].narrow(dim, 0, self.embedding.num_embeddings) for name, dim in self.token_dims.items()
        }
        tensors = {**tensors, **first}
        self.start_from(tensors["prompt_embeddings"])
        state = self.state_dict()
        for name, own in self.saved_names.items():
            if name != "prompt_embeddings":
                state[own].copy_(tensors[name])

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
    """Base of the methods whose prompt lives in input space; their configs are `EmbeddingConfig`s."""

    @classmethod
    def fill(cls, config: PromptConfig, facts: "Facts") -> PromptConfig:
        if facts.no_vectors:
            remedy = "another model" if facts.no_prefix else "prefix_tuning"
            raise UnsupportedError(f"{facts.no_vectors}; use {remedy}.")
        return _filled(config, token_dim=facts.hidden_size, num_layers=len(facts.layers) or None,
                       num_attention_heads=facts.query_heads or None)  # fmt: skip

    def prompt(self, task_ids: Tensor | None = None) -> Embeddings:
        refuse_tasks(self, task_ids)
        return Embeddings(self.all_vectors()[None])


class KVPrompt(SoftPrompt):
    """Base of the methods whose prompt is keys and values; `width` is Σ h·(k+v), and configs are `KVConfig`s."""

    @classmethod
    def fill(cls, config: PromptConfig, facts: "Facts") -> PromptConfig:
        assert isinstance(config, KVConfig)
        layers = facts.prefix_layers(config)
        shapes = [[layer.heads, layer.key_size, layer.value_size] for layer in layers]
        heads, width = _heads_and_width(config, shapes, facts.encoder_decoder)
        plain = all(shape == shapes[0] for shape in shapes) and shapes[0][1] == shapes[0][2]
        if plain and layers is facts.layers:
            shapes = None  # PEFT's form
        if config.layer_shapes not in (None, shapes):
            raise ConfigError(f"layer_shapes={config.layer_shapes} in the config, but this model needs {shapes}.")
        # As in PEFT, the model's width and query heads may be given where keys and values are fewer (grouped queries).
        if config.token_dim == facts.hidden_size:
            config = replace(config, token_dim=None)
        if config.num_attention_heads == facts.query_heads:
            config = replace(config, num_attention_heads=None)
        count = len(facts.layers)
        if config.paired and config.num_layers == 2 * count:  # as a checkpoint counts them
            config = replace(config, num_layers=None)
        if config.num_layers == count + facts.shared_layers:  # as PEFT counts them
            config = replace(config, num_layers=None)
        config = replace(config, layer_shapes=shapes, num_transformer_submodules=2 if facts.encoder_decoder else 1)
        return _filled(config, token_dim=width, num_layers=count, num_attention_heads=heads)

    def prompt(self, task_ids: Tensor | None = None) -> KV:
        refuse_tasks(self, task_ids)
        assert isinstance(self.config, KVConfig)
        return KV.from_flat(self.all_vectors(), self.config)

    def saved_tensors(self) -> dict[str, Tensor]:
        """As every method's, but for the pairs of keys and values, which a checkpoint may have in another form."""
        assert isinstance(self.config, KVConfig)
        saved = super().saved_tensors()
        return saved | {"prompt_embeddings": as_checkpoint(saved["prompt_embeddings"], self.config)}

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(self.config, KVConfig)
        flat = from_checkpoint(tensors["prompt_embeddings"], self.config)
        super().load_saved({**tensors, "prompt_embeddings": flat})


def _heads_and_width(config: KVConfig, shapes: list[list[int]], encoder_decoder: bool) -> tuple[int, int]:
    """`num_attention_heads` and `token_dim` for layers of these shapes: the widest's, as in PEFT, or the first's."""
    heads, size, _ = shapes[0]
    widest = None if encoder_decoder else widest_shape(shapes)
    if widest is None or (config.layer_shapes is not None and not config.padded):  # saved before they were the widest's
        return heads, heads * size
    return widest[0], widest[0] * widest[1]


def refuse_tasks(encoder: SoftPrompt, task_ids: Tensor | None) -> None:
    """ConfigError if a method without tasks is given some."""
    if task_ids is not None:
        raise ConfigError(
            f"task_ids were given, but a {encoder.name} prompt has no tasks; leave them out, or train "
            "multitask_prompt_tuning."
        )


def _filled(config: PromptConfig, **found: int | None) -> PromptConfig:
    for name, value in found.items():
        given = getattr(config, name)
        if given is not None and given != value:
            raise ConfigError(f"{name}={given} in the config, but this model needs {value}; leave it unset.")
    submodules = 2 if config.task_type is TaskType.SEQ_2_SEQ_LM else 1  # as PEFT counts them
    return replace(config, num_transformer_submodules=config.num_transformer_submodules or submodules, **found)


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


_MODES_LOCK = Lock()
_MODES: dict[int, list[Any]] = {}
"""Modules that are being evaluated: `[by how many blocks, the mode to come back]`."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; every submodule's own mode comes back when the last thread leaves one."""
    parts = list(module.modules())
    with _MODES_LOCK:
        if not _MODES and not any(part.training for part in parts):
            parts = []  # nothing to change, nor to come back
        for part in parts:
            _MODES.setdefault(id(part), [0, part.training])[0] += 1
        if parts:
            module.eval()
    try:
        yield
    finally:
        with _MODES_LOCK:
            for part in parts:
                known = _MODES[id(part)]
                known[0] -= 1
                if known[0] == 0:
                    part.training = known[1]
                    del _MODES[id(part)]


def need_count(config: PromptConfig, *names: str) -> None:
    """ConfigError unless each of these config fields is set; used where an encoder is built outside a model."""
    for name in names:
        if getattr(config, name) is None:
            raise ConfigError(f"{type(config).__name__}.{name} is not set; pass it, or let get_peft_model fill it in.")
