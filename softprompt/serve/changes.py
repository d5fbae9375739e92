"""What a library of prompts tells of itself: what has changed, and why something cannot be served."""

import logging
from dataclasses import dataclass, field

from softprompt.errors import SoftPromptError
from softprompt.serve.version import Version


class UnknownPromptError(SoftPromptError):
    """A name that no prompt is served under now."""


class NameTakenError(SoftPromptError):
    """A prompt that would be called as something else is already."""


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

    def note(self, old: dict[str, Version], new: dict[str, Version]) -> None:
        """Take in what an adapter was served as, and what it is served as now."""
        for name, version in new.items():
            if name not in old:
                self.added[name] = version
            elif old[name].digest != version.digest:
                self.replaced[name] = version
        self.removed.update({name: version for name, version in old.items() if name not in new})

    def write(self, log: logging.Logger) -> None:
        """A line for each of them."""
        for what, versions in (("added", self.added), ("replaced", self.replaced), ("removed", self.removed)):
            for name, version in versions.items():
                told = (what, name, version.method, version.length, version.digest[:12])
                log.info("%s the prompt %s (%s, %d virtual tokens, %s)", *told)
                if version.warning and what != "removed":
                    log.warning("the prompt %s: %s", name, version.warning)
        for name, why in self.refused.items():
            log.warning("refused the prompt %r: %s", name, why)


def shown(text: str, limit: int = 200) -> str:
    """Text as JSON can have it, shortened."""
    short = text if len(text) <= limit else f"{text[:limit]}…"
    return short.encode("utf-8", "backslashreplace").decode()
