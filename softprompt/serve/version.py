"""One version of one prompt, as it is served: what a name means at a moment."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Version:
    """A prompt's content before one base model; immutable, so a request under way keeps the version it began with.

    `name`: what requests call it. `digest`: sha256 (64 hex digits) of its content, its base model and the served
    number format; two contents never share one. `folder`: the immutable copy of the adapter. `source`: the folder it
    was copied from. `length`: virtual tokens that go in front of the text. `slots`: it has virtual tokens between
    words of a template, so it cannot become a KV prefix. `warning`: what is to be doubted about it.
    """

    name: str
    digest: str
    folder: Path
    source: Path
    method: str
    length: int
    slots: bool = False
    warning: str | None = None
