"""A recipe: everything that decides a training run, in one frozen record that is read from and written to YAML.

``Recipe.from_yaml`` refuses what it does not know and names the closest thing it does, so that a typo never trains
with a default in silence. ``Recipe.resolved()`` fills every open field from the table in ``defaults.py``; that filled
record is what a run folder keeps as ``recipe.yaml``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from softprompt.errors import ConfigError
from softprompt.recipe.defaults import AUTO, defaults_for

EMBEDDED = "embedded"  # the name under which a recipe asks for the model that ships inside the package

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "CLOZE")
INITS = ("random", "vocab", "text", "examples", "prompt")
WORD_SCORES = ("sum", "mean")
ANSWER_LOSSES = ("labels", "vocabulary")
HEAD_INITS = ("fit", "given")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("float32", "bfloat16", "float16")
TRACKERS = ("tensorboard", "wandb", "mlflow")  # as transformers names them


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """The settings of one run. A field that is None is filled from ``defaults.py`` by ``resolved()``.

    Raises ``ConfigError`` when a value has the wrong type, is out of range, or contradicts another one.
    """

    train: str = _help(
        "training data: a .jsonl, .csv or .parquet file, or the name of a dataset; with streaming also several files, "
        "'data/*.jsonl', and .gz",
        "",
    )
    out: str = _help("folder of the run; new or empty", "")
    model: str = _help("base model: a folder, a hub name, or 'embedded' for the one in this package", EMBEDDED)
    method: str = _help(
        "how the prompt is made; `softprompt methods` lists them; auto: what was best for this task", AUTO
    )
    task: str = _help(
        "CAUSAL_LM (write the target), SEQ_2_SEQ_LM (on an encoder-decoder), SEQ_CLS (choose a label with a "
        "classifier) or CLOZE (with a word)",
        "CAUSAL_LM",
    )
    eval: str | None = _help("held-out data, same form as the training data")

    only: str | None = _help("use only rows where a column has a value, e.g. relation=P19")

    template: str | None = _help(
        "how a row becomes text, e.g. '{mr} => {ref}'; the last field is the target, [P*3] are virtual tokens, and in "
        "CLOZE the answer stands at [MASK] or the end"
    )
    verbalizer: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "CLOZE: the word, or a list of words, that stands for each label"}
    )
    candidates: str | None = _help(
        "CLOZE without a verbalizer: the words to choose from, those of the training data (train), of all data (data), "
        "or a .txt file"
    )
    word_score: str | None = _help("score of a word of several tokens: the sum or the mean of their log-probabilities")
    answer_loss: str | None = _help(
        "CLOZE trains on the answer's probability among the labels, or in the whole vocabulary; default: labels with a "
        "verbalizer, vocabulary with candidates"
    )
    input_column: str | None = _help("column of the input, when there is no template")
    target_column: str | None = _help("column of the target or label, when there is no template")
    train_limit: int | None = _help("use only the first N training examples")
    streaming: bool = _help("read the training data while training, however much there is; give steps", False)
    shuffle_window: int = _help("with streaming: this many rows at a time are read and mixed", 10_000)
    tasks: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "several tasks for one prompt: name → train, eval, template, …"}
    )
    eval_limit: int | None = _help("score at most N held-out pairs while training, spread over the file; default: 400")
    max_length: int | None = _help("longest example in tokens; default: what the model's context leaves")

    num_virtual_tokens: int | None = _help("length of the prompt")
    init: str | None = _help(
        "where the prompt starts: random, vocab, text, examples (text of training examples) or prompt (another task's)"
    )
    init_text: str | None = _help("the text of init: text; with init: examples an instruction in front of them")
    init_candidates: int | None = _help(
        "compare this many draws of examples, random words and the random start by the loss before training, and start "
        "from the best; default: 1, no comparison"
    )
    init_from: str | None = _help("folder of another task's prompt, for init: prompt")
    head_init: str | None = _help("where a classification head starts: fit (a regression; the default) or given")
    method_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further fields of the method's config"}
    )
    source: str | None = _help("folder of a prompt of several tasks to start from")
    source_task: str | None = _help("the one of its tasks to start from; default: the mean of all")

    teachers: str | None = _help(
        "folder with a trained prompt per task; default: they are trained first, in OUT/teachers"
    )
    teacher: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the teachers that differ from the recipe's own"}
    )
    distillation: float | None = _help("weight of what the teachers say against the tasks' own loss; 0: no teachers")
    temperature: float | None = _help("temperature at which the teachers' probabilities are compared")

    steps: int | None = _help("optimiser steps; give this or epochs")
    epochs: float | None = _help("passes over the training data; give this or steps")
    batch_size: int | None = _help("examples per step")
    eval_batch_size: int = _help("examples per evaluation batch", 32)
    learning_rate: float | None = _help("peak learning rate of the prompt")
    head_learning_rate: float | None = _help("peak learning rate of a classification head")
    base_learning_rate: float | None = _help("tune the base model too, with this peak learning rate; default: frozen")
    task_learning_rate: float | None = _help("peak learning rate of what each of several tasks has of its own")
    schedule: str | None = _help("decay after the warm-up: linear, cosine or constant")
    warmup: float | None = _help("share of the steps over which the learning rate rises, 0 to 1")
    optimizer: str | None = _help("adamw or muon")
    weight_decay: float | None = _help("decoupled weight decay")
    beta1: float | None = _help("momentum: the decay of averaged gradients, 0 to 1")
    beta2: float | None = _help("AdamW's decay of squared gradients, 0 to 1")
    clip: float | None = _help("largest gradient norm; 0 turns clipping off")
    base_dropout: bool = _help("keep the frozen model's own dropout on while training", True)
    group_by_length: bool = _help("put examples of similar length into one batch (less padding)", True)
    seed: int = _help("seed of initialisation, order and dropout", 0)

    eval_steps: int | None = _help("evaluate every N steps; default: every epoch, at least once")
    save_steps: int = _help("save the resumable state every N steps; 0: only when interrupted", 100)
    samples: int = _help("held-out inputs that the report answers with and without the prompt", 6)
    max_new_tokens: int = _help("length of those answers, in tokens", 64)
    keep_encoder: bool = _help("also keep the prompt's encoder beside the adapter", False)
    report_to: list[str] | None = field(
        default=None, metadata={"help": "send the metrics to trackers too: tensorboard, wandb, mlflow"}
    )
    dtype: str = _help("number format of the frozen model", "float32")
    device: str = _help("cpu, cuda, cuda:1, …; 'auto' takes a GPU when there is one", "auto")
    device_map: str | None = _help("spread the base model over GPUs, memory and disk: auto, balanced, … or a mapping")
    offload_folder: str | None = _help("folder for weights that must be written to disk again for device_map")
    max_memory: str | None = _help('how much device_map may use of each device, e.g. {"0": "20GiB", "cpu": "60GiB"}')
    shard: bool = _help("share out the base model among the processes of the run (FSDP2)", False)
    shard_size: int | None = _help(
        "with shard: how many processes share one copy, e.g. those of a machine; default: all"
    )

    def __post_init__(self) -> None:
        for name, kind in _field_types().items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kind))
        if self.verbalizer:
            from softprompt.recipe.cloze import plain_labels  # here because that module builds on this one

            object.__setattr__(self, "verbalizer", plain_labels(self.verbalizer))
        _check_choices(self)
        _check_ranges(self)
        _check_combinations(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """Build from plain values; an unknown key is a ``ConfigError`` that names the closest known one."""
        known = {f.name for f in dataclasses.fields(cls)}
        if "sweep" in values:
            raise ConfigError(f"{where} has a `sweep` block, which is many runs; start it by `softprompt sweep`")
        for key in values:
            if key not in known:
                raise ConfigError(f"{where} has an unknown setting {key!r}{did_you_mean(str(key), known)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file. ``ConfigError`` when it is missing, not YAML, or not a mapping."""
        return cls.from_dict(read_yaml(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values in field order, without the fields that are None or empty."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != {}}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; unknown names are refused as in ``from_dict``."""
        return Recipe.from_dict({**dataclasses.asdict(self), **changes})

    def resolved(self) -> Recipe:
        """The recipe with every open field filled from the defaults of its method and task."""
        from softprompt.recipe.auto import method_of  # here because that module builds on this one

        method = method_of(self)
        table = defaults_for(method, self.task)
        changes: dict[str, Any] = {"method": method} | {
            f.name: getattr(table, f.name)
            for f in dataclasses.fields(table)
            if f.name != "method_options" and getattr(self, f.name) is None
        }
        if self.epochs is not None:
            changes.pop("steps", None)
        if self.init is None and (self.init_candidates or 1) > 1:
            changes["init"] = "examples"
        elif self.init is None and self.init_text is not None:
            changes["init"] = "text"
        elif self.init is None and self.init_from is not None:
            changes["init"] = "prompt"
        elif self.init is None and (self.source or any("init" in name for name in self.method_options)):
            changes["init"] = "random"  # the method's own option decides
        changes["method_options"] = {**table.method_options, **self.method_options}
        from softprompt.recipe.cloze import template_settings  # here because that module builds on this one

        changes.update(template_settings(self))
        return self.replace(**changes)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a ``ConfigError`` that says what is wrong with it."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"the recipe {path} holds a {type(values).__name__}; write lines of the form 'name: value'")
    return {str(key): value for key, value in values.items()}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known word, else the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"


def _field_types() -> dict[str, Any]:
    return typing.get_type_hints(Recipe)


def checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind`` (a plain type, ``X | None`` or ``dict``), or ``ConfigError``."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    if typing.get_origin(wanted) is dict:
        if isinstance(value, Mapping) and (name == "verbalizer" or all(isinstance(key, str) for key in value)):
            return dict(value)
    elif typing.get_origin(wanted) is list:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return list(items)
    elif wanted is float:
        number = _as_float(value)
        if number is not None:
            return number
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    elif wanted is str and isinstance(value, Path):
        return str(value)
    elif name in ("device_map", "max_memory") and isinstance(value, Mapping):
        return json.dumps({str(key): each for key, each in value.items()})  # as a flag has it
    words = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
    words |= {"list": "a list of names", "dict": "a mapping of names to values"}
    expected = words.get(getattr(wanted, "__name__", ""), str(wanted))
    raise ConfigError(f"{name} is {value!r}; it must be {expected}")


def _as_float(value: Any) -> float | None:
    """YAML 1.1 reads ``5e-3`` as text, so text that is a number counts as one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _check_choices(recipe: Recipe) -> None:
    choices = {
        "task": TASKS,
        "init": INITS,
        "head_init": HEAD_INITS,
        "word_score": WORD_SCORES,
        "answer_loss": ANSWER_LOSSES,
        "schedule": SCHEDULES,
        "optimizer": OPTIMIZERS,
        "dtype": DTYPES,
    }
    for name, allowed in choices.items():
        value = getattr(recipe, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    for name in recipe.report_to or ():
        if name not in TRACKERS:
            raise ConfigError(f"report_to names {name!r}; it must be one of {', '.join(TRACKERS)}")


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            "num_virtual_tokens",
            "steps",
            "batch_size",
            "eval_batch_size",
            "eval_steps",
            "max_length",
            "max_new_tokens",
            "train_limit",
            "eval_limit",
            "init_candidates",
            "shuffle_window",
            "shard_size",
        ),
        (lambda value: value >= 1, "at least 1"),
    ),
    **dict.fromkeys(
        (
            "epochs",
            "learning_rate",
            "head_learning_rate",
            "base_learning_rate",
            "task_learning_rate",
            "temperature",
        ),
        (lambda value: value > 0, "greater than 0"),
    ),
    **dict.fromkeys(
        ("weight_decay", "clip", "save_steps", "samples", "seed", "distillation"),
        (lambda value: value >= 0, "0 or more"),
    ),
    **dict.fromkeys(("warmup", "beta1", "beta2"), (lambda value: 0 <= value < 1, "from 0 up to, but not including, 1")),
}


def _check_ranges(recipe: Recipe) -> None:
    for name, (holds, words) in _RANGES.items():
        value = getattr(recipe, name)
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise ConfigError(f"{name} is {value}; it must be {words}")


def _check_combinations(recipe: Recipe) -> None:
    if recipe.steps is not None and recipe.epochs is not None:
        raise ConfigError(f"both steps ({recipe.steps}) and epochs ({recipe.epochs:g}) are set; give one of them")
    if recipe.template and (recipe.input_column or (recipe.target_column and recipe.task != "CLOZE")):
        raise ConfigError("both a template and input_column/target_column are set; give one of the two")
    from softprompt.recipe.cloze import check_base_rate, check_cloze  # here because these modules build on this one
    from softprompt.recipe.placing import check_placing
    from softprompt.recipe.start import check_start
    from softprompt.recipe.streaming import check_streaming
    from softprompt.recipe.tasks import check_tasks

    check_placing(recipe)
    check_start(recipe)
    check_streaming(recipe)
    check_cloze(recipe)
    check_base_rate(recipe)
    check_tasks(recipe)


def require_paths(recipe: Recipe) -> None:
    """A recipe may be incomplete until it is run; then it needs its data and its folder."""
    if not recipe.train and not recipe.tasks:
        raise ConfigError("the recipe names no training data; give it with `train: FILE` or --train FILE")
    if not recipe.out:
        raise ConfigError("the recipe names no run folder; give it with `out: DIR` or --out DIR")


def options_for(config_class: type[Any], options: Mapping[str, Any], reserved: Iterable[str] = ()) -> dict[str, Any]:
    """``options`` checked against the fields of a method's config class.

    Raises ``ConfigError`` for a field the config does not have (naming the closest) or one that the recipe itself sets.
    """
    known = {f.name for f in dataclasses.fields(config_class) if f.init}
    blocked = set(reserved)
    for name in options:
        if name in blocked:
            raise ConfigError(f"method_options sets {name!r}; set it in the recipe itself")
        if name not in known:
            raise ConfigError(f"method_options has an unknown field {name!r}{did_you_mean(name, known - blocked)}")
    return dict(options)
