"""Command line flags from dataclass fields: a setting that a recipe or a method's config gains is a flag at once."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer

from softprompt.errors import ConfigError
from softprompt.methods import METHODS
from softprompt.recipe import Recipe

RECIPE_OPTIONS = "method_options"  # the one mapping of a recipe whose members are flags of their own


def recipe_parameters() -> list[inspect.Parameter]:
    """One optional flag per field of a recipe that is not a mapping; None means that it was not given."""
    return dataclass_parameters(Recipe, "Recipe")


def dataclass_parameters(settings: type[Any], panel: str) -> list[inspect.Parameter]:
    """One optional flag per field of a dataclass that is not a mapping, under a heading of the help."""
    hints = typing.get_type_hints(settings)
    fields = [field for field in dataclasses.fields(settings) if typing.get_origin(hints[field.name]) is not dict]
    return [_parameter(field.name, hints[field.name], field.metadata.get("help", ""), panel) for field in fields]


def method_parameters() -> list[inspect.Parameter]:
    """One optional flag per field with a help text in any method's config that is not a recipe's own setting."""
    return [
        _parameter(name, kind, f"{text} [{', '.join(methods)}]", "Method options")
        for name, (kind, text, methods) in _method_fields().items()
    ]


def _method_fields() -> dict[str, tuple[Any, str, list[str]]]:
    """Name → (type, help, methods that have it)."""
    own = {field.name for field in dataclasses.fields(Recipe)}
    found: dict[str, tuple[Any, str, list[str]]] = {}
    for name, method in METHODS.items():
        hints = typing.get_type_hints(method.config_class)
        for field in dataclasses.fields(method.config_class):
            if "help" in field.metadata and field.name not in own:
                entry = found.setdefault(field.name, (hints[field.name], field.metadata["help"], []))
                entry[2].append(name)
    return found


def method_flags(name: str) -> list[str]:
    """The flags that belong to a method: `--prefix-projection`, …"""
    return [_flag(field) for field, (_, _, methods) in _method_fields().items() if name in methods]


def split_given(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given of the recipe's own settings, and of the methods' options."""
    options = _method_fields()
    set_ones = {name: value for name, value in given.items() if value is not None and value != []}
    return (
        {name: value for name, value in set_ones.items() if name not in options},
        {name: value for name, value in set_ones.items() if name in options},
    )


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """ConfigError for a flag that belongs to other methods than the one chosen."""
    for name in options:
        owners = _method_fields()[name][2]
        if method in METHODS and method not in owners:
            raise ConfigError(f"{_flag(name)} is an option of {' and '.join(owners)}, not of {method}; leave it out")


def with_parameters(parameters: Iterable[inspect.Parameter]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace a function's `**given` by named parameters, for typer, which reads signatures."""

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = list(parameters)
        function.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
        return function

    return change


def _parameter(name: str, kind: Any, text: str, panel: str) -> inspect.Parameter:
    plain = _plain(kind)
    flag = f"{_flag(name)}/--no-{_flag(name)[2:]}" if plain is bool else _flag(name)
    option = typer.Option(None, flag, help=text, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=plain | None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(kind: Any) -> Any:
    """What a flag is parsed as: `int` for `int | None`, `str` for an enum; a list is given by repeating the flag."""
    for option in typing.get_args(kind) or (kind,):
        if option in (bool, int, float) or typing.get_origin(option) is list:
            return option
    return str
