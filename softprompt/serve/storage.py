"""Prompts in shared storage, mirrored into a folder that a server watches: `s3://…`, or any other URL of fsspec.

    python -m softprompt.serve.storage s3://bucket/prompts prompts/ --every 30

Every replica mirrors for itself, so none of them depends on another, and a replica whose storage is away serves what it
has. A round changes adapter by adapter, each whole or not at all; one that cannot be read as an adapter, or whose key
would not be a prompt's name, is refused with its reason, and what was there before stays.
"""

import argparse
import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import typer

from softprompt.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from softprompt.checkpoint.files import write_files
from softprompt.checkpoint.guard import reason
from softprompt.errors import CheckpointError, ConfigError, SoftPromptError

FILES = (WEIGHTS_NAME, CONFIG_NAME)
"""In this order, in which this library saves too: a folder without a config is no adapter yet."""

STATE = ".softprompt-mirror.json"
MAX_BYTES = 8 << 30  # of one file, which is held in memory while it is checked
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_MAX_NAME = 128

Stamps = dict[str, str]
"""For each file of an adapter, what changes when it does."""


@dataclass(frozen=True)
class Mirrored:
    """What a round did, by the names of the prompts; `refused` has the reasons."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line for each change."""
        done = {"added": self.added, "replaced": self.replaced, "removed": self.removed}
        lines = [f"{what} {name}" for what, names in done.items() for name in names]
        return lines + [f"refused {name!r}: {why}" for name, why in self.refused.items()]


def mirror(url: str, folder: Path) -> Mirrored:
    """Make the adapters of `folder` those below `url`, once. ConfigError, CheckpointError where nothing can be done.

    Adapters that are in the folder and did not come from `url` are left alone. A URL without any adapter removes
    nothing, since that is what a wrong address and a disk that is not mounted look like.
    """
    source = _Source(url)
    found, refused = source.listing()
    state = _State(folder, url)
    done = Mirrored(refused=refused)
    listed = {*found, *refused}
    if state.adapters and not listed:
        raise CheckpointError(
            f"{url} holds no adapter any more, so nothing was removed from {folder}; check the URL, or empty it."
        )
    for name, stamps in found.items():
        if state.is_current(name, stamps):
            continue
        try:
            (done.replaced if _bring(source, state, name, stamps) else done.added).append(name)
        except SoftPromptError as error:
            done.refused[name] = str(error)
    for name in [name for name in state.adapters if name not in listed]:
        try:
            if source.is_gone(name):
                state.remove(name)
                done.removed.append(name)
        except SoftPromptError as error:
            done.refused[name] = str(error)
    return done


def _bring(source: "_Source", state: "_State", name: str, stamps: Stamps) -> bool:
    """Fetch an adapter, check it and put it into its place; whether there was one before."""
    contents = source.read(name, stamps)
    with TemporaryDirectory() as scratch:
        for file, data in contents.items():
            (Path(scratch) / file).write_bytes(data)
        try:
            load_adapter(Path(scratch))
        except SoftPromptError as error:
            raise CheckpointError(str(error).replace(scratch, source.address(name))) from error
    return state.put(name, contents, stamps)


@final
class _Source:
    """Adapters below a URL."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self.storage, root = url_to_fs(url)
        except ImportError as error:
            raise ConfigError(f"{url}: a package is missing: {reason(error)}.") from error
        except Exception as error:  # each storage's client raises its own
            raise ConfigError(
                f"{url} is not an address of fsspec's ({reason(error)}); write s3://bucket/path."
            ) from error
        self.root = root.rstrip("/")

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def listing(self) -> tuple[dict[str, Stamps], dict[str, str]]:
        """The adapters there are, and why others are none. CheckpointError."""
        try:
            return _adapters(self._below())
        except Exception as error:  # each storage's client raises its own
            raise CheckpointError(f"{self.url} cannot be listed ({reason(error)}); nothing was changed.") from error

    def read(self, name: str, stamps: Stamps) -> dict[str, bytes]:
        """The files of an adapter, all of the version that `stamps` says. CheckpointError."""
        where = self.address(name)
        try:
            contents = {file: self.storage.cat_file(f"{self.root}/{name}/{file}") for file in FILES}
            now = _adapters(self._below(name))[0].get(name)
        except Exception as error:  # each storage's client raises its own
            raise CheckpointError(f"{where} cannot be read ({reason(error)}); it is tried again.") from error
        if now != stamps:
            raise CheckpointError(f"{where} changed while it was read; it is tried again.")
        return contents

    def is_gone(self, name: str) -> bool:
        """Whether the storage says of the adapter itself that it is not there: a listing may leave things out."""
        try:
            self.storage.info(f"{self.root}/{name}/{CONFIG_NAME}")
        except FileNotFoundError:
            return True
        except Exception as error:
            raise CheckpointError(f"{self.address(name)} cannot be read ({reason(error)}); it stays.") from error
        return False

    def _below(self, name: str = "") -> dict[str, Mapping[str, Any]]:
        """The files there are now, in all or of one adapter, by their paths relative to the URL."""
        self.storage.invalidate_cache()
        found = self.storage.find(f"{self.root}/{name}" if name else self.root, detail=True)
        return {path[len(self.root) + 1 :]: info for path, info in found.items() if path.startswith(f"{self.root}/")}


def _adapters(files: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Stamps], dict[str, str]]:
    """Which files are adapters, and why others that look like one are none."""
    found: dict[str, Stamps] = {}
    refused: dict[str, str] = {}
    for path, info in files.items():
        name, _, file = path.rpartition("/")
        if file not in FILES:
            continue
        if not _is_name(name):
            refused[name[:200]] = (
                f"its folder cannot name a prompt; use letters, digits, '.', '_', '-' and '/', at most {_MAX_NAME} "
                "characters."
            )
        elif not isinstance(info.get("size"), int) or info["size"] > MAX_BYTES:
            refused[name] = f"{file} has {info.get('size')} bytes; a file of an adapter may have {MAX_BYTES:,}."
        else:
            known = repr(sorted((key, str(value)) for key, value in info.items()))
            found.setdefault(name, {})[file] = hashlib.sha256(known.encode()).hexdigest()
    for name, stamps in found.items():
        missing = [file for file in FILES if file not in stamps]
        if missing:
            refused.setdefault(name, f"it has no {missing[0]}; upload both files, the config last.")
    return {name: stamps for name, stamps in found.items() if name not in refused}, refused


def _is_name(text: str) -> bool:
    return len(text) <= _MAX_NAME and _NAME.fullmatch(text) is not None


@final
class _State:
    """The folder, and in a file in it what has come from where."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url.rstrip("/")
        self.adapters: dict[str, Stamps] = {}
        path = folder / STATE
        if not path.exists():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.adapters = {str(name): dict(stamps) for name, stamps in saved["adapters"].items()}
            came_from = saved["url"]
            if not all(map(_is_name, self.adapters)):
                raise ValueError("names that are none")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged; delete it, and what is the same is taken over.") from error
        if came_from != self.url:
            raise ConfigError(f"{folder} mirrors {came_from}, not {self.url}; give each URL a folder of its own.")

    def is_current(self, name: str, stamps: Stamps) -> bool:
        return self.adapters.get(name) == stamps and all((self.folder / name / file).is_file() for file in FILES)

    def put(self, name: str, contents: Mapping[str, bytes], stamps: Stamps) -> bool:
        """Put an adapter's files into their place; whether this replaced an older version of it."""
        place = self._place(name)
        there = (place / CONFIG_NAME).exists()
        if there and name not in self.adapters:
            if any((place / file).read_bytes() != data for file, data in contents.items()):
                raise CheckpointError(f"{place} is there already and did not come from {self.url}; move it away.")
        else:
            write_files(place, [(file, contents[file]) for file in FILES])
        known = name in self.adapters
        self._save({**self.adapters, name: stamps})
        return known

    def remove(self, name: str) -> None:
        """Take an adapter's files away, and the folders that are empty then."""
        place = self._place(name)
        if place.is_dir():
            write_files(place, [(file, None) for file in reversed(FILES)])
        self._save({other: stamps for other, stamps in self.adapters.items() if other != name})
        with suppress(OSError):
            while place != self.folder:
                place.rmdir()
                place = place.parent

    def _place(self, name: str) -> Path:
        """Where an adapter lies; links below the folder are none of ours and may lead anywhere."""
        place = self.folder
        for part in name.split("/"):
            place = place / part
            if place.is_symlink():
                raise CheckpointError(f"{place} is a link; put a folder there.")
        return place

    def _save(self, adapters: dict[str, Stamps]) -> None:
        data = json.dumps({"url": self.url, "adapters": adapters}, indent=1).encode()
        write_files(self.folder, [(STATE, data)])
        self.adapters = adapters


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m softprompt.serve.storage", description="Mirror adapters.")
    flags.add_argument("url", help="where the adapters are, such as s3://bucket/prompts")
    flags.add_argument("folder", type=Path, help="what `softprompt serve` gets as --prompts")
    flags.add_argument("--every", type=float, help="again after so many seconds (default: once)")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Mirror once, or for ever; returns the exit status: 2 where nothing could be done."""
    options = parser().parse_args(arguments)
    told: list[str] = []
    while True:
        status, lines = _round(options.url, options.folder)
        for line in lines:
            if line not in told:  # what stays refused is said once
                typer.echo(line, err=line.startswith(("error", "refused")))
        told = lines
        if options.every is None:
            return status
        time.sleep(options.every)


def _round(url: str, folder: Path) -> tuple[int, list[str]]:
    try:
        return 0, mirror(url, folder).lines()
    except SoftPromptError as error:
        return 2, [f"error: {error}"]


if __name__ == "__main__":
    raise SystemExit(main())
