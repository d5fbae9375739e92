"""`softprompt serve`: its flags."""

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any

from softprompt.cli.flags import dataclass_parameters
from softprompt.serve.options import ServeOptions

GIVEN_APART = ("base", "prompts")
PATHS = ("objects", "keys")


def serve_parameters() -> list[inspect.Parameter]:
    """One optional flag per field of `ServeOptions`."""
    flags = dataclass_parameters(ServeOptions, "Server")
    return [flag for flag in flags if flag.name not in GIVEN_APART]


def options_of(base: str, prompts: Path, given: dict[str, Any]) -> ServeOptions:
    """The options of a command line; `ps` does not show an administrator's key in the environment."""
    values = {name: value for name, value in given.items() if value is not None}
    values |= {name: Path(values[name]) for name in PATHS if name in values}
    values.setdefault("admin_key", os.environ.get("SOFTPROMPT_ADMIN_KEY") or None)
    known = {field.name for field in dataclasses.fields(ServeOptions)}
    return ServeOptions(base, prompts, **{name: value for name, value in values.items() if name in known})
