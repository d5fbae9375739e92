"""Adapters below a folder that somebody else changes: which there are, and one of them read whole."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from softprompt.checkpoint import CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME, SavedAdapter, read_adapter
from softprompt.checkpoint.files import half_written, local_files
from softprompt.checkpoint.guard import reason
from softprompt.errors import CheckpointError, ConfigError, SoftPromptError
from softprompt.store import DEFAULT
from softprompt.store.loaded import LoadedPrompt, Loader
from softprompt.store.stamps import PAUSE, READS, Stamps, same, stamps_of

MAX_NAME = 128
MAX_BYTES = 2 << 30  # of one prompt in float32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_MARKS = {CONFIG_NAME, WEIGHTS_NAME, OLD_WEIGHTS_NAME}  # one of them makes a folder an adapter, if only half of one
_TRUSTED = 0.1  # seconds after which a file system gives another change another time


@dataclass(frozen=True)
class Found:
    """The folder of an adapter, and why nothing in it is even looked at, if so. `unread`: who knows what is below."""

    folder: Path
    error: str | None = None
    unread: bool = False


def adapters_in(root: Path) -> dict[str, Found]:
    """The adapters below `root` by their relative paths, `root` itself as "default". OSError if it cannot be listed.

    No file is opened, and no link followed.
    """
    found: dict[str, Found] = {}
    waiting = [("", str(root))]
    while waiting:
        name, path = waiting.pop()
        try:
            with os.scandir(path) as entries:
                inside = list(entries)
        except FileNotFoundError:
            if not name:
                raise
            continue  # deleted since
        except OSError as error:
            if not name:
                raise
            found[name] = Found(Path(path), f"its folder cannot be read ({reason(error)}).", unread=True)
            continue
        for entry in inside:
            below = f"{name}/{entry.name}" if name else entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append((below, entry.path))
            elif entry.name in _MARKS:
                found[name] = Found(Path(path), _name_error(name))
            elif entry.is_symlink() and _leads_to_folder(entry):
                found[below] = Found(Path(entry.path), "it is a link to a folder; put the adapter's own folder there.")
    own = found.pop("", None)
    if own is not None:
        taken = f"it and the folder {DEFAULT} would both be called {DEFAULT!r}; rename that folder."
        found["." if DEFAULT in found else DEFAULT] = Found(own.folder, taken if DEFAULT in found else None)
    return dict(sorted(found.items()))


def _leads_to_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _name_error(name: str) -> str | None:
    if not name or (len(name) <= MAX_NAME and _NAME.fullmatch(name)):
        return None
    return (
        f"its path cannot name a prompt; use letters, digits, '.', '_', '-' and '/', at most {MAX_NAME} characters, "
        "each part beginning with a letter or a digit."
    )


def read_whole(name: str, folder: Path, loader: Loader) -> tuple[SavedAdapter, LoadedPrompt, Stamps]:
    """An adapter as it is saved and as it stands before the base model, checked, all of it of one moment.

    SoftPromptError for what is wrong with it.
    """

    def check_bytes(count: int) -> None:
        if count > MAX_BYTES:
            raise ConfigError(f"the prompt {name!r} has {count:,} bytes, more than the {MAX_BYTES:,} that are served.")

    for _ in range(READS):
        stamps = stamps_of(str(folder))
        found: tuple[SavedAdapter, LoadedPrompt, Stamps] | SoftPromptError
        try:
            loaded = loader.load(name, folder, local_files(folder), check_bytes)
            found = read_adapter(local_files(folder), folder), loaded, stamps
        except SoftPromptError as error:
            found = error
        except OSError as error:
            found = CheckpointError(f"{folder} cannot be read ({reason(error)}).")
        if half_written(str(folder)) or not same(str(folder), stamps):  # in this order, as in the store
            time.sleep(PAUSE)  # some of what was read may be old and some new
            continue
        if isinstance(found, SoftPromptError):
            raise found
        return found
    raise CheckpointError(f"the files in {folder} change while they are read; it is tried again.")


def settled(stamps: Stamps) -> bool:
    """Whether another change of the files would show in their stamps: times have steps."""
    latest = max((stamp[4] for stamp in stamps if stamp is not None), default=0)
    return abs(time.time_ns() - latest) > _TRUSTED * 1e9
