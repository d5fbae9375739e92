"""The prompts a server has now: names to versions, versions to immutable copies of what was checked.

    library = PromptLibrary(Path("prompts"), base, objects)
    library.scan()
    with library.use("customer-7") as version: ...      # version.folder stays until the block ends

Every adapter below the folder is served under its relative path (`a/b`; segments `[A-Za-z0-9][A-Za-z0-9._-]*`, at most
128 characters); an adapter of several tasks under one name per task, `a/b:0`, `a/b:1`, …, each a prompt of its own:
`Version.folder` always holds a single prompt, and `Version.task` is None. What requests call a prompt is only ever
looked up in a dictionary.

`Version.folder` has `adapter_config.json` and `adapter_model.safetensors`, as `save_adapter` writes them, and with
`folded=True` (and unless `Version.slots`) `kv.safetensors`, see `softprompt.serve.folded`. It never changes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from softprompt.errors import SoftPromptError
from softprompt.serve.base import Base
from softprompt.serve.version import Version


class UnknownPromptError(SoftPromptError):
    """A name that no prompt is served under now."""


@dataclass(frozen=True)
class Changes:
    """What a `scan`, `load` or `unload` changed, by the names of requests (`a/b`, `a/b:0`).

    `added`, `replaced`: the versions that are served from now on. `removed`: those that are no longer. `refused`: the
    reasons, by the names of adapters (folders); an older version goes on being served where there is one.
    """

    added: dict[str, Version] = field(default_factory=dict)
    replaced: dict[str, Version] = field(default_factory=dict)
    removed: dict[str, Version] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.replaced or self.removed or self.refused)


@final
class PromptLibrary:
    """Threads may share it. `get`, `names`, `use`, `lease` and `listing` never wait for a file or a computation.

    `objects`: where the copies are kept, made if it is not there; `sole=True` says that nobody else uses it, so that
    copies nobody needs any more are deleted. `folded`: write `kv.safetensors` too.
    """

    def __init__(self, folder: Path, base: Base, objects: Path, *, folded: bool = False, sole: bool = False) -> None:
        """Reads nothing yet; call `scan`. ConfigError where `folder` is none or `objects` cannot be written."""
        raise NotImplementedError

    # ---- requests ------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Version:
        """What the name means now. UnknownPromptError."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """What requests may ask for now, sorted; without the base model's own name."""
        raise NotImplementedError

    def use(self, name: str) -> AbstractContextManager[Version]:
        """`get` and `lease` in one step, between which nothing can change. UnknownPromptError on entry."""
        raise NotImplementedError

    def lease(self, version: Version) -> AbstractContextManager[Version]:
        """Its folder stays until the block ends. UnknownPromptError on entry if it has been deleted already."""
        raise NotImplementedError

    # ---- what is served ------------------------------------------------------------------------------------------

    def scan(self) -> Changes:
        """Look at the folder and serve what is in it; only what has changed is read. Never raises for an adapter."""
        raise NotImplementedError

    def load(self, name: str) -> tuple[Version, ...]:
        """Serve the adapter (`a/b`) as its files are now: one version, or one per task.

        UnknownPromptError if the folder has none of that name, ConfigError for a name that cannot be served, other
        SoftPromptErrors for what is wrong with it; what was served before then still is.
        """
        raise NotImplementedError

    def unload(self, name: str) -> None:
        """Serve the adapter (`a/b`, with all its tasks) no more, until `load` or a change of its files.

        UnknownPromptError if it is not served.
        """
        raise NotImplementedError

    def subscribe(self, told: Callable[[Changes], None]) -> None:
        """Have `told` called after every change, in order, in the thread that made it; it must not make changes."""
        raise NotImplementedError

    # ---- looking at it -------------------------------------------------------------------------------------------

    def listing(self) -> list[dict[str, Any]]:
        """One JSON object per name: `name`, `state` ("served", "unloaded", "refused"), `digest`, `length`, `method`,
        `slots` and `error` (None, or why the files as they are now are not served). No paths outside the folder.
        """
        raise NotImplementedError

    def nearest(self, name: str, count: int = 5) -> list[list[tuple[str, float]]]:
        """For each virtual token the closest words and their cosines, closest first.

        UnknownPromptError; UnsupportedError for prompts that are keys and values.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End watching; with `sole` the copies are deleted."""
        raise NotImplementedError
