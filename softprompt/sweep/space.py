"""What a sweep varies: the ``sweep`` block of a recipe, read and checked before anything runs.

A list holds choices, ``{low, high, log, step}`` is a range, and ``method`` may map each method to a space of its own.
``seed`` is no dimension: every setting is run once with each seed, and judged by the mean.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from softprompt.errors import ConfigError
from softprompt.methods import METHODS
from softprompt.recipe import Recipe, checked, did_you_mean
from softprompt.recipe.defaults import AUTO

if TYPE_CHECKING:
    from optuna import Trial

FIXED = ("out", "eval", "eval_limit", "only", "task", "report_to")  # runs that differ here cannot be compared
OPTION = "method_options."

Settings = dict[str, Any]
"""Recipe fields (``method_options.NAME`` too) with their values."""


class Domain(ABC):
    """The values that one setting can take."""

    @abstractmethod
    def suggest(self, trial: Trial, name: str) -> Any:
        """The value that a trial has for it."""

    @abstractmethod
    def some(self) -> list[Any]:
        """All choices, or both ends of a range."""

    @abstractmethod
    def plain(self) -> Any:
        """As YAML and JSON hold it."""


@final
@dataclass(frozen=True)
class Choices(Domain):
    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)

    def some(self) -> list[Any]:
        return list(self.values)

    def plain(self) -> Any:
        return list(self.values)


@final
@dataclass(frozen=True)
class Range(Domain):
    """From ``low`` to ``high``, both included; ``log`` draws evenly over the logarithms."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Trial, name: str) -> Any:
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def some(self) -> list[Any]:
        return [self.low, self.high]

    def plain(self) -> Any:
        return {name: value for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class Space:
    """Everything a sweep varies. ``methods`` is empty when the method is not; otherwise each one's own settings."""

    common: Mapping[str, Domain]
    methods: Mapping[str, Mapping[str, Domain]]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, block: Any, recipe: Recipe) -> Space:
        """Read the block. ``ConfigError`` for what it cannot mean, in one sentence."""
        if not isinstance(block, Mapping) or not block:
            raise ConfigError(
                "the recipe has no `sweep` block that says what to vary; give one such as "
                "`sweep: {learning_rate: [0.01, 0.1]}`"
            )
        block = {str(name): value for name, value in block.items()}
        methods = _methods(block.pop("method", None))
        seeds = block.pop("seed", [recipe.seed])
        owners = list(methods) or [_known(recipe.resolved().method)]
        common = {name: _domain(name, value, owners) for name, value in block.items()}
        if isinstance(seeds, Mapping):
            raise ConfigError("sweep: seed is a range, but every setting is run with all seeds; list them")
        return cls(common, methods, tuple(_domain("seed", seeds, owners).some()))

    def names(self, method: str | None) -> dict[str, tuple[str, Domain]]:
        """The settings of a method: the name of each among the trial's parameters → the recipe's field, its values."""
        own = self.methods.get(method or "", {})
        shared = {name: (name, domain) for name, domain in self.common.items() if name not in own}
        return {**shared, **{f"{method}.{name}": (name, domain) for name, domain in own.items()}}

    def suggest(self, trial: Trial) -> None:
        """Give a trial its parameters."""
        method = trial.suggest_categorical("method", list(self.methods)) if self.methods else None
        for name, (_, domain) in self.names(method).items():
            domain.suggest(trial, name)

    def settings(self, params: Mapping[str, Any]) -> Settings:
        """A trial's parameters as settings of the recipe."""
        method = params.get("method")
        chosen = {} if method is None else {"method": method}
        return chosen | {field: params[name] for name, (field, _) in self.names(method).items()}

    def complete(self, params: Mapping[str, Any]) -> bool:
        """Whether a trial got as far as having all its parameters."""
        method = params.get("method")
        chosen = {"method"} if self.methods else set()
        return chosen <= set(params) and set(params) == chosen | set(self.names(method))

    def ranges(self) -> list[str]:
        """The names of what is a range, and so has no grid."""
        methods = self.methods or [None]
        return [n for method in methods for n, (_, each) in self.names(method).items() if isinstance(each, Range)]

    def size(self) -> int:
        """How many settings the grid has; there must be no range."""
        methods = self.methods or [None]
        return sum(math.prod(len(each.some()) for _, each in self.names(method).values()) for method in methods)

    def grid(self) -> Iterator[dict[str, Any]]:
        """The parameters of every setting, in the order of the recipe."""
        for method in self.methods or [None]:
            names = self.names(method)
            chosen = {} if method is None else {"method": method}
            for values in itertools.product(*(domain.some() for _, domain in names.values())):
                yield chosen | dict(zip(names, values, strict=True))

    def probes(self) -> Iterator[tuple[str, Any, Settings]]:
        """Each value of each setting once, with the first ones of all others: name, value and the whole settings."""
        for method in self.methods or [None]:
            names = self.names(method)
            first = {name: domain.some()[0] for name, (_, domain) in names.items()}
            chosen = {} if method is None else {"method": method}
            yield "method", method, self.settings({**chosen, **first})
            for name, (_, domain) in names.items():
                for value in domain.some():
                    yield name, value, self.settings({**chosen, **first, name: value})

    def plain(self) -> dict[str, Any]:
        """As YAML and JSON hold it."""
        own = {m: {name: domain.plain() for name, domain in each.items()} for m, each in self.methods.items()}
        common = {name: domain.plain() for name, domain in self.common.items()}
        return ({"method": own} if own else {}) | common | {"seed": list(self.seeds)}

    def fields(self) -> list[str]:
        """All fields that are varied, in the order of the recipe."""
        own = [name for each in self.methods.values() for name in each]
        return list(dict.fromkeys([*(["method"] if self.methods else []), *self.common, *own]))


def _methods(value: Any) -> dict[str, dict[str, Domain]]:
    """The methods to try, each with the settings that are its own."""
    if value is None:
        return {}
    if isinstance(value, list):
        value = {method: {} for method in _listed("method", value)}
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"sweep: method is {value!r}; list the methods, or map each to settings of its own")
    spaces = {}
    for method, own in value.items():
        _known(method)
        if not isinstance(own or {}, Mapping):
            raise ConfigError(f"sweep: method: {method} is {own!r}; it must be a mapping of settings to values")
        spaces[method] = {str(name): _domain(str(name), each, [method]) for name, each in (own or {}).items()}
    return spaces


def _known(method: Any) -> str:
    if method == AUTO:
        raise ConfigError("sweep: auto chooses a method, so it cannot be compared with methods; name what it chose")
    if method not in METHODS:
        raise ConfigError(f"sweep: there is no method {method!r}{did_you_mean(str(method), METHODS)}")
    return method


def _domain(name: str, value: Any, methods: list[str]) -> Domain:
    """The values of one setting, each of its field's type."""
    kind = _kind(name, methods)
    if isinstance(value, list):
        return Choices(tuple(_listed(name, [_checked(name, each, kind) for each in value])))
    if isinstance(value, Mapping):
        return _range(name, value, kind)
    raise ConfigError(
        f"sweep: {name} is {value!r}; give a list of values or a range such as {{low: 0.01, high: 1, log: true}}, and "
        "what does not vary outside `sweep`"
    )


def _listed(name: str, values: list[Any]) -> list[Any]:
    if not values:
        raise ConfigError(f"sweep: {name} is an empty list; give its values, or leave it out")
    for place, value in enumerate(values):
        if any(value == other and type(value) is type(other) for other in values[:place]):
            raise ConfigError(f"sweep: {name} lists {value!r} twice; drop one")
    return values


def _kind(name: str, methods: list[str]) -> Any:
    """The type of a setting. ``ConfigError`` for one that does not exist, or that cannot be varied."""
    hints = typing.get_type_hints(Recipe)
    if name.startswith(OPTION):
        return _option_kind(name.removeprefix(OPTION), methods)
    varied = {field for field, hint in hints.items() if typing.get_origin(hint) is not dict} - set(FIXED)
    if name in varied and name != "method":
        return hints[name]
    if name in FIXED:
        raise ConfigError(f"sweep: {name} cannot be varied, since the runs could not be compared; leave it out")
    if name in hints:
        raise ConfigError(f"sweep: {name} is no single value; vary its members, such as {OPTION}NAME")
    raise ConfigError(f"sweep has an unknown setting {name!r}{did_you_mean(name, varied)}")


def _option_kind(option: str, methods: list[str]) -> Any:
    """The type of a method's option, which every one of the methods must have."""
    kind = None
    for method in methods:
        config = METHODS[method].config_class
        known = {field.name for field in dataclasses.fields(config) if field.init and "help" in field.metadata}
        if option not in known:
            raise ConfigError(f"sweep: {method} has no option {option!r}{did_you_mean(option, known)}")
        kind = typing.get_type_hints(config)[option]
    return kind


def _checked(name: str, value: Any, kind: Any) -> Any:
    """A value as its field takes it; the members of an enum are left to the method's config."""
    if not isinstance(value, str | int | float | bool | None):
        raise ConfigError(f"sweep: {name} has the value {value!r}; it must be a single number, word, true or false")
    kinds = [each for each in typing.get_args(kind) or (kind,) if each is not type(None)]
    if len(kinds) > 1 or kinds[0] not in (bool, int, float, str):
        return value
    try:
        return checked(name, value, kind)
    except ConfigError as error:
        raise ConfigError(f"sweep: {error}") from None


def _range(name: str, value: Mapping[str, Any], kind: Any) -> Range:
    numbers = [each for each in typing.get_args(kind) or (kind,) if each in (int, float)]
    if not numbers:
        raise ConfigError(f"sweep: {name} is a range, but it is no number; list its values")
    number = numbers[0]
    hints = {"low": number, "high": number, "log": bool, "step": number}
    for key in value:
        if key not in hints:
            raise ConfigError(f"sweep: {name} has an unknown part {key!r}{did_you_mean(str(key), hints)}")
    if not {"low", "high"} <= set(value):
        raise ConfigError(f"sweep: {name} is {dict(value)}; a range needs both low and high")
    try:
        made = Range(**{key: checked(f"{name}: {key}", each, hints[key]) for key, each in value.items()})
    except ConfigError as error:
        raise ConfigError(f"sweep: {error}") from None
    if not made.low < made.high:
        raise ConfigError(f"sweep: {name} has low {made.low} and high {made.high}; low must be the smaller")
    if made.log and (made.low <= 0 or made.step):
        raise ConfigError(f"sweep: {name} is a range with log: true; it needs a low above 0, and no step")
    if made.step is not None and made.step <= 0:
        raise ConfigError(f"sweep: {name} has the step {made.step}; it must be greater than 0")
    return made
