"""What a user decides about a prompt, as frozen dataclasses with PEFT's field names.

Fields that the base model decides (`token_dim`, `num_layers`, …) may be left at None: `get_peft_model` fills them from
one probe of the model. A config is never changed in place; `dataclasses.replace` makes another one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from softprompt.errors import ConfigError

E = TypeVar("E", bound=Enum)


class TaskType(str, Enum):
    """The head a prompt is trained for; the names are PEFT's."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


def parse_enum(enum: type[E], value: "E | str", name: str) -> E:
    """`value` as a member of `enum`; strings of any case are accepted. Raises ConfigError naming the choices."""
    if isinstance(value, enum):
        return value
    value = getattr(value, "value", value)  # PEFT's own enums are taken too
    for member in enum:
        if str(value).upper() == str(member.value).upper():
            return member
    choices = ", ".join(str(member.value) for member in enum)
    raise ConfigError(f"{name}={value!r} is not known; choose one of {choices}.")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Base of all method configs.

    Sizes: `num_virtual_tokens` = p; `token_dim` = width of one virtual token (the model's hidden size for embedding
    methods, key-value heads × head size for KV methods); `num_attention_heads` = key-value heads for KV methods.
    """

    PEFT_TYPE: ClassVar[str] = ""
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ()
    """Fields that decide what the prompt does and that PEFT does not have: at their default it does the same."""

    task_type: TaskType | str | None = None
    peft_type: str | None = None
    num_virtual_tokens: int = field(default=20, metadata={"help": "number of virtual tokens"})
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None:
            self._set("task_type", parse_enum(TaskType, self.task_type, "task_type"))
        given = getattr(self.peft_type, "value", self.peft_type)
        if given is not None and given != self.PEFT_TYPE:
            raise ConfigError(f"peft_type={given!r} does not belong to {type(self).__name__}; use {self.PEFT_TYPE!r}.")
        self._set("peft_type", self.PEFT_TYPE)
        for name in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"):
            self._check_count(name)
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ConfigError(f"num_transformer_submodules={self.num_transformer_submodules!r}: it is 1 or 2.")

    def _set(self, name: str, value: Any) -> None:
        """Normalise a field during construction (the dataclass is frozen for everyone else)."""
        object.__setattr__(self, name, value)

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and self.__dataclass_fields__[name].default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")

    def _check_dropout(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(f"{name}={value!r} must be a number from 0 up to, not including, 1.")

    @property
    def is_prompt_learning(self) -> bool:
        """Always true here; PEFT's users ask for it."""
        return True

    @property
    def total_virtual_tokens(self) -> int:
        """Rows of a saved prompt in input space, as PEFT counts them: p × `num_transformer_submodules`.

        PEFT trains and uses the first p of them only; here there are no others, and they are written twice.
        """
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def saved_copies(self) -> int:
        """How many times the p rows of a prompt stand in its checkpoint."""
        return 1

    @property
    def beyond_peft(self) -> dict[str, Any]:
        """What is set that PEFT cannot express; it would take the prompt for another one."""
        values = {name: (getattr(self, name), self.__dataclass_fields__[name].default) for name in self.NOT_IN_PEFT}
        return {name: value for name, (value, default) in values.items() if value != default}

    def as_saved(self) -> Self:
        """This config as `adapter_config.json` holds it."""
        return replace(self, inference_mode=True)

    @property
    def started(self) -> bool:
        """Whether the config says what the prompt starts from, which then no text of the user's may replace."""
        return False

    def with_examples(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], instruction: Sequence[int] = ()
    ) -> Self:
        """This config with what its method takes from a few training rows, each token ids and labels (−100: no answer).

        `instruction` are the token ids of what stands before them. Most methods take nothing.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; enums become their strings."""
        return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(self).items()}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` into the folder, whole or not at all."""
        from softprompt.checkpoint import write_config

        write_config(Path(save_directory), self)

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub_options: Any) -> "PromptConfig":
        """Read `adapter_config.json` of any method from a folder or a hub id, checked."""
        from softprompt.checkpoint import load_config

        config = load_config(path, **hub_options)
        if not isinstance(config, cls):
            raise ConfigError(
                f"{path} holds a {config.PEFT_TYPE} prompt, not {cls.PEFT_TYPE}; read it with PeftConfig."
            )
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from JSON values; an unknown field is a ConfigError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        return cls(**values)

    def __str__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, default=str)}"


class Placement(str, Enum):
    """Where a prompt in input space stands: before the row (as in PEFT), behind its first token, or in a template."""

    FRONT = "front"
    AFTER_BOS = "after_bos"
    TEMPLATE = "template"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(PromptConfig):
    """What is common to prompts in input space. PEFT knows `placement="front"` only.

    `after_bos` keeps a row's first real token ([CLS], a start token) first; with `template` the virtual tokens stand
    at the slots of every row, which come with the inputs.
    """

    NOT_IN_PEFT = ("placement", "template")

    placement: Placement | str = field(
        default=Placement.FRONT, metadata={"help": "front, after_bos (keeps [CLS] first) or template"}
    )
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        placement = parse_enum(Placement, self.placement, "placement")
        if self.template is not None and placement is not Placement.TEMPLATE:
            placement = Placement.TEMPLATE if placement is Placement.FRONT else placement
            if placement is not Placement.TEMPLATE:
                raise ConfigError(f"placement={placement.value!r} does not go with a template; leave it unset.")
        self._set("placement", placement)

    @property
    def saved_copies(self) -> int:
        return self.num_transformer_submodules or 1


@dataclass(frozen=True, kw_only=True)
class KVConfig(PromptConfig):
    """What is common to prompts made of keys and values.

    The three prefixes of an encoder-decoder (Li and Liang 2021, section 4.1 and their code) can each be on or off; PEFT
    knows the decoder's self-attention only. `layer_shapes` (`[heads, key size, value size]` per layer, filled in by the
    model) is there only where layers are not all alike; `token_dim` and `num_attention_heads` are then the widest's.
    """

    NOT_IN_PEFT = ("decoder_prefix", "cross_prefix", "encoder_prefix", "prefix_always_visible", "layer_shapes")

    decoder_prefix: bool = field(default=True, metadata={"help": "prefix in the decoder's self-attention"})
    cross_prefix: bool = field(default=False, metadata={"help": "prefix in the cross-attention"})
    encoder_prefix: bool = field(default=False, metadata={"help": "prefix in the encoder's self-attention"})
    prefix_always_visible: bool = field(
        default=False, metadata={"help": "let queries see the prefix from beyond a sliding window"}
    )
    layer_shapes: list[list[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.decoder_prefix or self.cross_prefix or self.encoder_prefix):
            raise ConfigError("decoder_prefix, cross_prefix and encoder_prefix are all off; leave one of them on.")
        for shape in self.layer_shapes or []:
            if len(shape) != 3 or not all(type(size) is int and 0 < size <= 1_000_000 for size in shape):
                raise ConfigError(f"layer_shapes holds {shape}; each entry is [heads, key size, value size].")

    @property
    def paired(self) -> bool:
        """Whether its checkpoint has PEFT's form for encoder-decoders, two pairs per layer (see `softprompt.pairs`)."""
        return self.num_transformer_submodules == 2 and self.layer_shapes is None

    @property
    def padded(self) -> bool:
        """Whether its checkpoint has PEFT's form for layers that differ, each padded to the widest (see `pairs`).

        Keys and values of different sizes have no such form, and none had it before `token_dim` was the widest's.
        """
        if self.layer_shapes is None or self.num_transformer_submodules == 2 or self.token_dim is None:
            return False
        widest = widest_shape(self.layer_shapes)
        return widest is not None and (self.num_attention_heads, self.token_dim) == (widest[0], widest[0] * widest[1])

    @property
    def beyond_peft(self) -> dict[str, Any]:
        beyond = super().beyond_peft
        return {name: value for name, value in beyond.items() if not (name == "layer_shapes" and self.padded)}

    def as_saved(self) -> Self:
        saved = super().as_saved()
        return replace(saved, num_layers=2 * self.num_layers) if self.paired and self.num_layers else saved

    @property
    def prefix_shapes(self) -> list[list[int]]:
        """`[heads, key size, value size]` of every layer that a prefix reaches."""
        if self.layer_shapes is not None:
            return self.layer_shapes
        assert self.token_dim is not None and self.num_layers is not None and self.num_attention_heads is not None
        size = self.token_dim // self.num_attention_heads
        return [[self.num_attention_heads, size, size]] * self.num_layers

    @property
    def prefix_width(self) -> int:
        """Numbers per virtual token, Σ h·(k+v)."""
        return sum(heads * (key + value) for heads, key, value in self.prefix_shapes)


def widest_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Heads and size of the layer that every other one fits into.

    None where there is no such layer, or keys and values have different sizes: PEFT cannot give each its part then.
    """
    heads, size = max(each[0] for each in shapes), max(each[1] for each in shapes)
    even = all(key == value for _, key, value in shapes)
    return (heads, size) if even and [heads, size, size] in map(list, shapes) else None
