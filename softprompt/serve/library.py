"""The prompts a server has now: names to versions, versions to immutable copies of what was checked.

    library = PromptLibrary(Path("prompts"), base, objects)
    library.scan()
    with library.use("customer-7") as version: ...      # version.folder stays until the block ends

Every adapter below the folder is served under its relative path (`a/b`; segments `[A-Za-z0-9][A-Za-z0-9._-]*`, at most
128 characters), the folder itself as "default"; an adapter of several tasks under one name per task, `a/b:0`, `a/b:1`,
…, each a prompt of its own: `Version.folder` always holds a single prompt. What requests call a prompt is only ever
looked up in a dictionary.

`Version.folder` has `adapter_config.json` and `adapter_model.safetensors`, as `save_adapter` writes them, and with
`folded=True` (and unless `Version.slots`) `kv.safetensors`, see `softprompt.serve.folded`. It never changes.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, final

from softprompt.checkpoint import SavedAdapter
from softprompt.checkpoint.files import local_files
from softprompt.checkpoint.guard import reason
from softprompt.config import KVConfig
from softprompt.errors import CheckpointError, ConfigError, SoftPromptError, UnsupportedError
from softprompt.inspect_prompt import method_name, tasks_of
from softprompt.methods import METHODS
from softprompt.prompt import Embeddings
from softprompt.serve.adapters import Found, adapters_in, read_whole, settled
from softprompt.serve.base import Base, other_base
from softprompt.serve.changes import Changes, NameTakenError, UnknownPromptError, shown
from softprompt.serve.objects import Objects, StorageError, stands_inside
from softprompt.serve.version import Version
from softprompt.store.loaded import Loader
from softprompt.store.stamps import Stamps, stamps_of

log = logging.getLogger(__name__)

MAX_TASKS = 1000
_TUNED_BASE = "base"  # beside a prompt that was trained together with its base model
_SHOWN = 1000  # characters of a reason


@dataclass(frozen=True)
class _Entry:
    """An adapter: what is served of it, its files when that was made (None: to be read again), and what is wrong."""

    folder: Path
    stamps: Stamps | None
    versions: tuple[Version, ...] = ()
    error: str | None = None


@final
class PromptLibrary:
    """Threads may share it. `get`, `names`, `use`, `lease` and `listing` never wait for a file or a computation.

    `objects`: where the copies are kept, made if it is not there; `sole=True` says that nobody else uses it, so that
    copies nobody needs any more are deleted. `folded`: write `kv.safetensors` too.
    """

    def __init__(self, folder: Path, base: Base, objects: Path, *, folded: bool = False, sole: bool = False) -> None:
        """Reads nothing yet; call `scan`. ConfigError where `folder` is none or `objects` cannot be written."""
        self.folder, self.base = Path(folder).absolute(), base
        if not self.folder.is_dir():
            raise ConfigError(f"there is no folder {str(folder)!r}; give the folder that the adapters are in.")
        _check_apart(self.folder.resolve(), Path(objects).resolve())
        self._objects = Objects(objects, base, folded, sole)
        self._changing = Lock()  # held by whoever changes what is served, for as long as that takes
        self._lock = Lock()  # of what follows, never held for long
        self._entries: dict[str, _Entry] = {}
        self._served: dict[str, Version] = {}
        self._told: list[Callable[[Changes], None]] = []
        self._loader: Loader | None = None

    # ---- requests ------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Version:
        """What the name means now. UnknownPromptError."""
        with self._lock:
            found = self._served.get(name)
        if found is None:
            raise UnknownPromptError(f"there is no prompt {shown(name)!r}; GET /v1/models lists those there are.")
        return found

    def names(self) -> list[str]:
        """What requests may ask for now, sorted; without the base model's own name."""
        with self._lock:
            return sorted(self._served)

    @contextmanager
    def use(self, name: str) -> Iterator[Version]:
        """`get` and `lease` in one step, between which nothing can change. UnknownPromptError on entry."""
        while True:
            version = self.get(name)
            if self._objects.hold(version.digest):
                break  # else it was replaced just now
        try:
            yield version
        finally:
            self._objects.drop(version.digest)

    @contextmanager
    def lease(self, version: Version) -> Iterator[Version]:
        """Its folder stays until the block ends. UnknownPromptError on entry if it has been deleted already."""
        if not self._objects.hold(version.digest):
            raise UnknownPromptError(f"the prompt {version.name!r} has been replaced or unloaded; ask again.")
        try:
            yield version
        finally:
            self._objects.drop(version.digest)

    # ---- what is served ------------------------------------------------------------------------------------------

    def scan(self, stop: Event | None = None) -> Changes:
        """Look at the folder and serve what is in it; only what has changed is read. Never raises for an adapter.

        While a folder cannot be listed, as when a disk is away, everything below it stays. `stop` ends it early.
        """
        changes = Changes()
        with self._changing:
            try:
                found = adapters_in(self.folder)
            except OSError as error:
                log.warning("%s cannot be listed (%s); what was served still is", self.folder, reason(error))
                return changes
            away = tuple(f"{name}/" for name, place in found.items() if place.unread)
            for name in self._entries.keys() - found.keys():
                if not name.startswith(away):
                    self._set(name, None, changes)
            for name, place in found.items():
                if stop is not None and stop.is_set():
                    break
                if self._changed(name, place):
                    entry, _ = self._read(name, place)
                    self._set(name, entry, changes)
            self.base.release()
            self._tell(changes)
        return changes

    def load(self, name: str) -> tuple[Version, ...]:
        """Serve the adapter (`a/b`) as its files are now: one version, or one per task.

        UnknownPromptError if the folder has none of that name, NameTakenError, StorageError, and other
        SoftPromptErrors for what is wrong with it; what was served before then still is.
        """
        changes = Changes()
        with self._changing:
            try:
                place = adapters_in(self.folder).get(name)
            except OSError as error:
                raise ConfigError(f"{self.folder} cannot be listed ({reason(error)}); nothing was changed.") from error
            if place is None:
                raise UnknownPromptError(f"there is no adapter {shown(name)!r} in the folder of prompts.")
            entry, error = self._read(name, place)
            self._set(name, entry, changes)
            self.base.release()
            self._tell(changes)
        if error is not None:
            raise error
        return entry.versions

    def unload(self, name: str) -> None:
        """Serve the adapter (`a/b`, with all its tasks) no more, until `load` or a change of its files.

        UnknownPromptError if it is not served.
        """
        changes = Changes()
        with self._changing:
            entry = self._entries.get(name)
            if entry is None or not entry.versions:
                raise UnknownPromptError(f"no adapter {shown(name)!r} is served, so it cannot be unloaded.")
            self._set(name, _Entry(entry.folder, stamps_of(str(entry.folder))), changes)
            self._tell(changes)

    def subscribe(self, told: Callable[[Changes], None]) -> None:
        """Have `told` called after every change, in order, in the thread that made it; it must not make changes."""
        with self._lock:
            self._told.append(told)

    # ---- looking at it -------------------------------------------------------------------------------------------

    def listing(self) -> list[dict[str, Any]]:
        """One JSON object per name: `name`, `state` ("served", "unloaded", "refused"), `digest`, `length`, `method`,
        `slots`, `warning` and `error` (None, or why the files as they are now are not served). No paths outside the
        folder.
        """
        with self._lock:
            entries = dict(self._entries)
        rows = []
        for name, entry in entries.items():
            nothing = {"digest": None, "length": None, "method": None, "slots": False}
            state = "unloaded" if entry.error is None else "refused"
            rows += [_row(version, entry.error) for version in entry.versions] or [
                {"name": shown(name), "state": state, **nothing, "warning": None, "error": entry.error}
            ]
        return sorted(rows, key=lambda row: row["name"])

    def nearest(self, name: str, count: int = 5) -> list[list[tuple[str, float]]]:
        """For each virtual token the closest words and their cosines, closest first.

        UnknownPromptError; UnsupportedError for prompts that are keys and values.
        """
        from softprompt.report.nearest import nearest_tokens

        with self.use(name) as version:
            if issubclass(METHODS[version.method].config_class, KVConfig):
                raise UnsupportedError(
                    f"the prompt {name!r} is keys and values ({version.method}), which no words are near to; "
                    "prompts in input space have nearest words."
                )
            files = local_files(version.folder)
            prompt = self._prompts().load(version.name, version.folder, files, lambda size: None).prompt()
        assert isinstance(prompt, Embeddings)
        return nearest_tokens(prompt.vectors[0], self.base.words(), self.base.tokenizer, count)

    def close(self) -> None:
        """With `sole` the copies are deleted."""
        with self._changing:
            self._objects.close()

    # ---- inside; with `_changing` held ---------------------------------------------------------------------------

    def _prompts(self) -> Loader:
        if self._loader is None:
            self._loader = Loader(self.base.facts)
        return self._loader

    def _changed(self, name: str, place: Found) -> bool:
        entry = self._entries.get(name)
        return entry is None or entry.stamps is None or entry.stamps != _stamps(place)

    def _read(self, name: str, place: Found) -> tuple[_Entry, SoftPromptError | None]:
        """The adapter as its files are now; with an error, as it was served before."""
        before = self._entries.get(name)
        versions = () if before is None else before.versions
        stamps: Stamps | None = _stamps(place)
        try:
            if place.error is not None:
                raise ConfigError(f"{name[:200]!r} is not served: {place.error}")
            return self._make(name, place.folder), None
        except StorageError as error:
            stamps, found = None, error  # to be tried again: its files are not at fault
        except SoftPromptError as error:
            found = error
        except Exception as error:  # whatever a stranger's file brings about, the server goes on
            log.exception("the prompt %r cannot be read", name)
            found = CheckpointError(f"{place.folder} cannot be read ({type(error).__name__}: {reason(error)}).")
            found.__cause__ = error
        return _Entry(place.folder, stamps, versions, self._plain(found)), found

    def _make(self, name: str, folder: Path) -> _Entry:
        """Check an adapter and copy it; its versions are held. SoftPromptError."""
        self._check_base(folder)
        saved, loaded, stamps = read_whole(name, folder, self._prompts())
        method, inside = method_name(saved.config.peft_type), stands_inside(loaded.config)
        parts, versions = _parts(name, saved), []
        warning = other_base(saved.config.base_model_name_or_path, self.base.path)
        if self.base.name in dict(parts):
            raise NameTakenError(f"{name!r} is what requests call the base model; rename the prompt's folder.")
        try:
            for called, part in parts:
                digest = self._objects.put(part, self._prompts())
                place, length = self._objects.folder / digest, loaded.config.num_virtual_tokens
                versions.append(Version(called, digest, place, folder, method, length, inside, warning))
        except BaseException:
            for version in versions:
                self._objects.drop(version.digest)
            raise
        return _Entry(folder, stamps if settled(stamps) else None, tuple(versions))

    def _check_base(self, folder: Path) -> None:
        own = folder / _TUNED_BASE
        if (own / "config.json").is_file() and own.resolve() != Path(self.base.path).resolve():
            raise CheckpointError(
                f"{folder} was trained along with its base model, which is beside it in {_TUNED_BASE}/; serve that one."
            )

    def _set(self, name: str, entry: _Entry | None, changes: Changes) -> None:
        """Serve what the entry says; None: the adapter is no longer there."""
        before = self._entries.get(name)
        old = {} if before is None else {version.name: version for version in before.versions}
        new = {} if entry is None else {version.name: version for version in entry.versions}
        with self._lock:
            if entry is None:
                self._entries.pop(name, None)
            else:
                self._entries[name] = entry
            for called in old.keys() - new.keys():
                del self._served[called]
            self._served.update(new)
        if before is not None and (entry is None or entry.versions is not before.versions):
            for version in old.values():
                self._objects.drop(version.digest)
        changes.note(old, new)
        if entry is not None and entry.error and (before is None or before.error != entry.error):
            changes.refused[shown(name)] = entry.error

    def _tell(self, changes: Changes) -> None:
        if not changes:
            return
        changes.write(log)
        for told in list(self._told):
            try:
                told(changes)
            except Exception:  # the others are told all the same
                log.exception("a subscriber of the library failed")

    def _plain(self, error: SoftPromptError) -> str:
        """The message, with paths relative to the folder of prompts."""
        text = str(error).replace(f"{self.folder}/", "").replace(f"{self._objects.folder}/", "")
        return shown(text, _SHOWN)


def _check_apart(folder: Path, objects: Path) -> None:
    """ConfigError if copies would be served as prompts, or prompts lie among the copies."""
    if objects.is_relative_to(folder) or folder.is_relative_to(objects):
        raise ConfigError(f"{folder} and the copies in {objects} must not be in one another; choose another folder.")


def _stamps(place: Found) -> Stamps:
    """Nothing of a folder that is not even looked at."""
    return () if place.error is not None else stamps_of(str(place.folder))


def _parts(name: str, saved: SavedAdapter) -> list[tuple[str, SavedAdapter]]:
    """What requests call each prompt of an adapter, and the prompt. ConfigError for too many."""
    count = len(tasks_of(saved.config))
    if not count:
        return [(name, saved)]
    if count > MAX_TASKS:
        raise ConfigError(f"{saved.source} has {count:,} tasks, more than the {MAX_TASKS:,} that are served.")
    from softprompt.together.tasks import task_prompt

    return [(f"{name}:{number}", task_prompt(saved, number)) for number in range(count)]


def _row(version: Version, error: str | None) -> dict[str, Any]:
    return {
        "name": version.name,
        "state": "served",
        "digest": version.digest,
        "length": version.length,
        "method": version.method,
        "slots": version.slots,
        "warning": version.warning,
        "error": error,
    }
