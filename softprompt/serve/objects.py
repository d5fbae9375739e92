"""Immutable copies of prompts, in folders named by what they hold.

    objects/<digest>/adapter_config.json, adapter_model.safetensors, and kv.safetensors where prompts are folded

A copy is made beside its place and renamed into it, so it is there whole or not at all, whatever happens meanwhile.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from threading import RLock
from typing import final

import torch

from softprompt.batch.find import placement_of
from softprompt.checkpoint import SavedAdapter, read_adapter, save_adapter
from softprompt.checkpoint.config_file import config_to_json
from softprompt.checkpoint.files import local_files, sync_folder
from softprompt.checkpoint.guard import reason
from softprompt.config import Placement, PromptConfig
from softprompt.errors import CheckpointError, ConfigError, SoftPromptError
from softprompt.serve.base import Base
from softprompt.serve.folded import check_folded, write_folded
from softprompt.store.loaded import Loader

_NEW, _OLD = ".new-", ".old-"
_ABANDONED = 3600  # seconds after which another process is not still writing


class StorageError(SoftPromptError):
    """A copy of a prompt that could not be written, which is not the prompt's fault."""


def digest_of(saved: SavedAdapter, base: Base, folded: bool) -> str:
    """sha256 of the config, of every tensor's name, type, shape and bytes, and of the base model; 64 hex digits."""
    told = [config_to_json(saved.config), base.fingerprint, base.dtype, folded]
    told += [[name, str(each.dtype), list(each.shape)] for name, each in sorted(saved.tensors.items())]
    seen = hashlib.sha256(json.dumps(["softprompt object 1", *told]).encode())
    for _, each in sorted(saved.tensors.items()):  # their lengths are among what is told
        seen.update(each.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def stands_inside(config: PromptConfig) -> bool:
    """Whether virtual tokens stand between a row's own, so that they are no prefix."""
    return placement_of(config) is not Placement.FRONT


@final
class Objects:
    """The copies in a folder, each as long as somebody holds it, if `sole` says that nobody else uses the folder.

    Threads may share it; one at a time calls `put`. `folded`: with keys and values.
    """

    def __init__(self, folder: Path, base: Base, folded: bool, sole: bool) -> None:
        """ConfigError for a folder that cannot be written."""
        self.folder = Path(folder).absolute()
        self.base, self.folded, self.sole = base, folded, sole
        self._lock = RLock()  # of what follows and of folders that go away; a lease may end in a finalizer, anywhere
        self._held: Counter[str] = Counter()
        self._checked: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
        except OSError as error:
            raise ConfigError(f"{folder} cannot hold copies of prompts ({reason(error)}); choose another.") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{folder} cannot be written, where copies of prompts belong; choose another.")

    def put(self, saved: SavedAdapter, loader: Loader) -> str:
        """The digest of a checked adapter, whose copy is there now and held for the caller until `drop`.

        StorageError where there is no room, UnsupportedError for what cannot be folded; nothing is left of it then.
        """
        digest = digest_of(saved, self.base, self.folded)
        with self._lock:
            self._held[digest] += 1
            known = digest in self._checked and (self.folder / digest).is_dir()
        try:
            if not known:
                self._ensure(digest, saved, loader)
                with self._lock:
                    self._checked.add(digest)
        except BaseException:
            self.drop(digest)
            raise
        return digest

    def hold(self, digest: str) -> bool:
        """Keep a copy until `drop`; False if it has gone already."""
        with self._lock:
            if self.sole and not self._held[digest]:
                return False
            self._held[digest] += 1
            return True

    def drop(self, digest: str) -> None:
        """Nobody needs it more than before `hold` or `put`; the last one takes it away."""
        gone = None
        with self._lock:
            self._held[digest] -= 1
            if self._held[digest] <= 0:
                del self._held[digest]
                if self.sole:
                    self._checked.discard(digest)
                    gone = self._put_away(self.folder / digest)
        if gone is not None:
            shutil.rmtree(gone, ignore_errors=True)

    def close(self) -> None:
        if self.sole:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _ensure(self, digest: str, saved: SavedAdapter, loader: Loader) -> None:
        place = self.folder / digest
        try:
            if place.is_dir():
                if self._intact(place, digest):
                    return
                shutil.rmtree(self._put_away(place) or place, ignore_errors=True)
            self._make(place, digest, saved, loader)
        except OSError as error:
            raise StorageError(f"{place} cannot be written ({reason(error)}); free some space.") from error
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise StorageError(str(error)) from error
            raise

    def _make(self, place: Path, digest: str, saved: SavedAdapter, loader: Loader) -> None:
        new = Path(mkdtemp(prefix=_NEW, dir=self.folder))
        try:
            save_adapter(new, saved.config, saved.tensors)
            loaded = loader.load(place.name, new, local_files(new), lambda count: None)
            if self.folded and not stands_inside(loaded.config):
                write_folded(new, self.base.fold(loaded), digest, self.base.fingerprint)
            try:
                new.rename(place)
            except OSError:
                if not place.is_dir() or not self._intact(place, digest):  # unless another process was first
                    raise
            sync_folder(self.folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _intact(self, place: Path, digest: str) -> bool:
        """Whether the copy of an earlier or another process is what its name says."""
        try:
            saved = read_adapter(local_files(place), place)
            if self.folded and not stands_inside(saved.config):
                check_folded(place, digest)
            return digest_of(saved, self.base, self.folded) == digest
        except (SoftPromptError, OSError):
            return False

    def _put_away(self, place: Path) -> Path | None:
        """Give a folder another name in one step, to be deleted after; None if there is none."""
        gone = self.folder / f"{_OLD}{secrets.token_hex(6)}"
        try:
            place.rename(gone)
        except OSError:
            return None
        return gone

    def _clean(self) -> None:
        """Take away what a process left that was killed."""
        for path in self.folder.iterdir():
            if path.name.startswith((_NEW, _OLD)):
                with suppress(FileNotFoundError):  # another process has just finished with it
                    if self.sole or time.time() - path.stat().st_mtime > _ABANDONED:
                        shutil.rmtree(path, ignore_errors=True)
