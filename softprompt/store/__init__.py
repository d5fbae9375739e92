"""A store of prompts: any number of adapters in folders, loaded when a row asks for them, within a limit of memory.

    store = PromptStore("prompts/", max_bytes=2 << 30)
    good, bad = store.load(["customer-7", "customer-9"], model.facts)
    kv = store.derived(good["customer-7"], ("kv", device, dtype), lambda: ...)

Every adapter is checked as `SoftPromptModel.load_adapter` checks it, and one that is missing, damaged, hostile or made
for another base model is an error of its own; the others load.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, final

from softprompt.checkpoint import CONFIG_NAME
from softprompt.checkpoint.files import half_written
from softprompt.errors import CheckpointError, ConfigError, SoftPromptError
from softprompt.facts import Facts
from softprompt.store.loaded import LoadedPrompt, Loader, size_of
from softprompt.store.stamps import PAUSE, READS, Stamps, finder, same, stamps_of

T = TypeVar("T")

NO_PROMPT = "__base__"
DEFAULT = "default"


@dataclass(eq=False)
class _Held:
    """A prompt in memory, what was read to make it, and what has been derived from it; `nbytes` of both."""

    loaded: LoadedPrompt
    folder: str
    version: Stamps
    nbytes: int
    derived: dict[Hashable, Any] = field(default_factory=dict)


@final
class PromptStore:
    """Prompts by name; threads may share it.

    `prompts` is a folder, every adapter below which gets its relative path as its name (`default`, if the folder itself
    is one; folders that are links are left out), or a mapping of names to folders on this machine. Nothing is opened
    until it is used.

    `max_bytes` limits what is held: prompts in float32, and what was derived from them, on whatever device. The prompts
    that were used least recently go first, each with what was derived from it; a batch that uses them still has them.
    A prompt that is larger than the limit is refused.

    Files are read: somebody who shortens a file that is mapped into memory ends the process, and what has been checked
    stays as it was. `mapped=True` maps them, for folders whose files are only ever replaced as a whole (as this library
    saves; `cp` and PEFT write into the old file): long prompts load faster, and the system may share the memory and
    take it back.

    A prompt is the same object from one `load` to the next until it is dropped, or its files change, are replaced or
    deleted: that shows in the next `load`.
    """

    def __init__(
        self,
        prompts: str | Path | Mapping[str, str | Path] | None = None,
        max_bytes: int = 2 << 30,
        mapped: bool = False,
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes!r} must be a whole number of at least 1.")
        self.max_bytes, self.mapped = max_bytes, mapped
        self._lock = Lock()  # of all that follows; never held while files are read or anything is computed
        self._folders: dict[str, str] = {}
        self._loaders: dict[Facts, Loader] = {}
        self._held: OrderedDict[tuple[str, Loader], _Held] = OrderedDict()
        self._keys: dict[LoadedPrompt, tuple[str, Loader]] = {}
        self._nbytes = 0
        self._one_by_one = [Lock() for _ in range(64)]  # so that two threads do not load the same prompt
        found = prompts if isinstance(prompts, Mapping) else {} if prompts is None else _adapters_below(Path(prompts))
        for name, folder in found.items():
            self.register(name, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, as of a model the store is attached to, knows the same folders, and holds nothing yet."""
        with self._lock:
            return PromptStore, (dict(self._folders), self.max_bytes, self.mapped)

    # ---- names ---------------------------------------------------------------------------------------------------

    def register(self, name: str, path: str | Path) -> None:
        """Have `name` mean the adapter in the folder `path` from now on, whatever it meant before. ConfigError."""
        if not isinstance(name, str) or not name or name == NO_PROMPT:
            raise ConfigError(f"a prompt cannot be called {name!r}; choose a text such as 'customer-7'.")
        if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
            raise ConfigError(f"{path!r} is not the path of the prompt {name!r}; give the folder of an adapter.")
        with self._lock:
            self._folders[name] = str(path)
            self._drop_all(name)

    def remove(self, name: str) -> None:
        """Forget a prompt; its files stay. ConfigError if there is none of that name."""
        with self._lock:
            self._folder(name)
            del self._folders[name]
            self._drop_all(name)

    def __len__(self) -> int:
        return len(self._folders)

    def __contains__(self, name: object) -> bool:
        return name in self._folders

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._folders))

    @property
    def nbytes(self) -> int:
        """What is held now."""
        return self._nbytes

    @property
    def held(self) -> list[str]:
        """The names of the prompts in memory, the least recently used one first."""
        with self._lock:
            return list(dict.fromkeys(name for name, _ in self._held))

    # ---- prompts -------------------------------------------------------------------------------------------------

    def load(self, names: Iterable[str], facts: Facts) -> tuple[dict[str, LoadedPrompt], dict[str, SoftPromptError]]:
        """The prompts of these names for a base model of this facts, and why the others could not be loaded."""
        with self._lock:
            loader = self._loaders.setdefault(facts, Loader(facts, self.mapped))
        good: dict[str, LoadedPrompt] = {}
        bad: dict[str, SoftPromptError] = {}
        for name in dict.fromkeys(names):
            try:
                good[name] = self._current(name, loader) or self._load(name, loader)
            except SoftPromptError as error:
                bad[name] = error.with_traceback(None)  # whose frames would hold what was read
        return good, bad

    def derived(self, loaded: LoadedPrompt, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, made of tensors, kept with the prompt it was derived from under `key` and dropped with it.

        Threads that ask for the same at the same time wait for one of them to compute it; others do not wait. What does
        not fit within the limit beside its prompt, or derives from a prompt that has been dropped, is not kept.
        """
        with loaded.lock:
            with self._lock:
                held = self._held_of(loaded)
                if held is not None and key in held.derived:
                    return held.derived[key]
            value = compute()
            size = size_of(value)
            with self._lock:
                held = self._held_of(loaded)
                if held is not None and held.nbytes + size <= self.max_bytes:
                    held.derived[key] = value
                    held.nbytes += size
                    self._nbytes += size
                    self._make_room()
            return value

    # ---- inside --------------------------------------------------------------------------------------------------

    def _current(self, name: str, loader: Loader) -> LoadedPrompt | None:
        """The prompt, if it is held and its files are still the same."""
        with self._lock:
            folder = self._folder(name)
            held = self._held.get((name, loader))
            if held is None:
                return None
            self._held.move_to_end((name, loader))
        if held.folder == folder and held.version == stamps_of(folder):
            return held.loaded
        with self._lock:
            if self._held.get((name, loader)) is held:
                self._drop((name, loader))
        return None

    def _load(self, name: str, loader: Loader) -> LoadedPrompt:
        with self._one_by_one[hash(name) % len(self._one_by_one)]:
            loaded = self._current(name, loader)
            if loaded is not None:  # another thread was first
                return loaded
            for _ in range(READS):
                with self._lock:
                    folder = self._folder(name)
                version = stamps_of(folder)
                found: LoadedPrompt | SoftPromptError
                try:
                    found = self._read(name, folder, version, loader)
                except SoftPromptError as error:
                    found = error
                if half_written(folder) or not same(folder, version):  # in this order: the last rename ends the first
                    time.sleep(PAUSE)  # some of what was read may be old and some new
                    continue
                if isinstance(found, SoftPromptError):
                    raise found
                with self._lock:
                    self._keep(_Held(found, folder, version, found.nbytes), (name, loader))
                return found
        raise CheckpointError(f"the files of the prompt {name!r} change while they are read; ask for it again.")

    def _read(self, name: str, folder: str, version: Stamps, loader: Loader) -> LoadedPrompt:
        if not any(version) and not os.path.isdir(folder):
            raise CheckpointError(
                f"there is no folder {folder!r} for the prompt {name!r}; a store reads folders on this machine only: "
                "check the path, or download the adapter and register its folder."
            )

        def check_bytes(count: int) -> None:
            if count > self.max_bytes:
                raise ConfigError(
                    f"the prompt {name!r} needs {count:,} bytes, but the store may hold {self.max_bytes:,}; raise "
                    "max_bytes."
                )

        try:
            path = Path(folder)
            return loader.load(name, path, finder(path, version), check_bytes)
        except OSError as error:
            raise CheckpointError(f"{folder} (the prompt {name!r}) cannot be read: {error.strerror}.") from error

    # what follows is called with the lock held

    def _folder(self, name: str) -> str:
        folder = self._folders.get(name)
        if folder is None:
            raise ConfigError(
                f"there is no prompt {name!r} among the {len(self._folders):,} of the store; register it."
            )
        return folder

    def _held_of(self, loaded: LoadedPrompt) -> _Held | None:
        key = self._keys.get(loaded)
        if key is None:
            return None
        self._held.move_to_end(key)
        return self._held[key]

    def _keep(self, held: _Held, key: tuple[str, Loader]) -> None:
        """Unless the name means another folder by now."""
        if self._folders.get(key[0]) == held.folder:
            self._drop(key)
            self._held[key] = held
            self._keys[held.loaded] = key
            self._nbytes += held.nbytes
            self._make_room()

    def _make_room(self) -> None:
        """Drop the least recently used until the rest fits; the last one does by itself."""
        while self._nbytes > self.max_bytes:
            self._drop(next(iter(self._held)))

    def _drop_all(self, name: str) -> None:
        for loader in self._loaders.values():
            self._drop((name, loader))

    def _drop(self, key: tuple[str, Loader]) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            del self._keys[held.loaded]
            self._nbytes -= held.nbytes


def _adapters_below(root: Path) -> dict[str, str]:
    """The folders below `root` that hold an adapter's config, by their relative paths. ConfigError."""
    if not root.is_dir():
        raise ConfigError(f"there is no folder {str(root)!r}; give the folder that the adapters are in.")
    found: dict[str, str] = {}
    for folder, inside, files in os.walk(root):
        inside.sort()
        if CONFIG_NAME in files:
            name = Path(folder).relative_to(root).as_posix()
            name = DEFAULT if name == "." else name
            if name in found:
                raise ConfigError(f"{root} and {folder} are both adapters called {DEFAULT!r}; rename the folder.")
            found[name] = folder
    return found
