"""The files of a checkpoint: finding them in a folder or on the hub, and putting them there whole or not at all."""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softprompt.checkpoint.config_file import CONFIG_NAME
from softprompt.checkpoint.guard import check_subfolder, file_inside, reason
from softprompt.errors import CheckpointError, ConfigError

HALF_WRITTEN_SECONDS = 1.0

Find = Callable[[str], Path | None]
"""From the name of a file of an adapter to where it is, or None where the adapter has no such file."""


def need(find: Find, name: str, asked: str | Path) -> Path:
    """The path of a file the adapter must have; `asked` is what the user called the adapter. Raises CheckpointError."""
    path = find(name)
    if path is None:
        folder = Path(asked)
        inside = sorted(each.parent.name for each in folder.glob(f"*/{name}")) if folder.is_dir() else []
        hint = (
            f"it has adapters in {', '.join(inside[:5])}, so name one of these"
            if inside
            else "give an adapter's folder"
        )
        raise CheckpointError(f"{asked} has no {name}; {hint}.")
    return path


def locate(
    asked: str | Path,
    subfolder: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Find:
    """Where the files of an adapter are: a folder on this machine first, else a repository on the hub."""
    subfolder = check_subfolder(subfolder or "")
    if not str(asked) or "\0" in str(asked):
        raise CheckpointError(f"{str(asked)!r} is not the path of an adapter; give its folder or a hub id.")
    path = Path(asked)
    try:
        if path.is_dir():
            return local_files(path, subfolder)
        plainly_a_path = path.is_absolute() or (path.parent != Path() and path.parent.is_dir())
        if path.exists():
            raise CheckpointError(f"{asked} is a file; give the folder that holds {CONFIG_NAME}.")
    except OSError as error:  # no permission, or a name longer than names can be
        raise CheckpointError(f"{str(asked)[:200]} cannot be read: {reason(error)}.") from error
    if plainly_a_path:
        raise CheckpointError(f"there is no folder {asked}; check the path.")  # asking the hub would take its time
    options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    return partial(_find_on_hub, str(asked), subfolder, options)


def local_files(folder: Path, subfolder: str = "") -> Find:
    """The files of an adapter in a folder on this machine."""
    return partial(_find_local, folder, subfolder)


def _find_local(folder: Path, subfolder: str, name: str) -> Path | None:
    return file_inside(folder, str(Path(subfolder) / name) if subfolder else name, partial(_cache_blobs, folder))


def _cache_blobs(folder: Path) -> tuple[Path, ...]:
    """For a snapshot in the hub's own cache, the folder its links lead to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE).resolve()
    for parent in folder.resolve().parents:
        if parent.name == "snapshots" and parent.parent.parent == cache:
            return (parent.parent / "blobs",)
    return ()


def _find_on_hub(repo_id: str, subfolder: str, options: Mapping[str, Any], name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(repo_id, name, subfolder=subfolder or None, **options))
    except LocalEntryNotFoundError as error:
        if name != CONFIG_NAME:
            return None  # the config is in the cache, so this file is not part of what was downloaded
        raise CheckpointError(
            f"there is no folder {repo_id!r} here, and the hub could not be reached for an adapter of that name; check "
            f"the path, or run `hf download {repo_id}` where there is a network."
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # the hub's client raises its own, its transport's and the system's errors
        raise CheckpointError(
            f"there is no folder {repo_id!r} here, and the hub gave no such adapter ({reason(error)}); check the path."
        ) from error
    return file_inside(path.parent, path.name, lambda: (Path(options["cache_dir"] or HF_HUB_CACHE),))


def write_files(folder: Path, contents: Sequence[tuple[str, bytes | None]]) -> None:
    """Put files into `folder` in the order given, all or none; None takes a file away.

    Everything is first written beside its place under another name and flushed to the disk, then renamed. Whatever
    goes wrong, including an interrupt, puts back what was there. Raises CheckpointError with the path and the reason.
    """
    made = not folder.exists()
    mark = f".{secrets.token_hex(6)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, _ in contents:
            if (folder / name).is_dir():
                raise CheckpointError(f"{folder / name} is a folder, so no file can be saved there; move it away.")
        try:
            for name, data in contents:
                if data is not None:
                    _write(folder / f"{mark}.{name}.new", data)
            _swap(folder, contents, mark)
        finally:
            for rest in folder.glob(f"{mark}.*"):
                rest.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: saving failed ({reason(error)}) and changed nothing; free some space or choose another folder."
        ) from error


def half_written(folder: str) -> bool:
    """Whether `write_files` is between the first and the last of its renames in `folder`, or has been stopped there.

    Nothing is left half-done for long, so only a folder that has just changed is looked into.
    """
    try:
        if abs(time.time() - os.stat(folder).st_mtime) > HALF_WRITTEN_SECONDS:
            return False
        names = os.listdir(folder)
    except OSError:
        return False
    waiting: dict[str, set[str]] = {}
    for name in names:
        if name.startswith(".") and name.endswith(".new"):
            mark, _, rest = name[1:].partition(".")
            waiting.setdefault(mark, set()).add(rest)
    first, last = "adapter_model.safetensors.new", f"{CONFIG_NAME}.new"
    return any(last in left and first not in left for left in waiting.values())


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _swap(folder: Path, contents: Sequence[tuple[str, bytes | None]], mark: str) -> None:
    """Rename the new files into place; on any failure rename the old ones back."""
    touched: list[str] = []
    try:
        for name, data in contents:
            if name not in touched:
                if (folder / name).is_file():
                    _duplicate(folder / name, folder / f"{mark}.{name}.old")
                touched.append(name)
            if data is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / f"{mark}.{name}.new").replace(folder / name)
        sync_folder(folder)
    except BaseException:
        for name in touched:
            if (folder / f"{mark}.{name}.old").exists():
                (folder / f"{mark}.{name}.old").replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise


def _duplicate(path: Path, other: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)


def sync_folder(folder: Path) -> None:
    """Make renames durable where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def for_hub(options: dict[str, Any]) -> dict[str, Any]:
    """Options of PEFT's loaders: those for the hub are passed on, those that change nothing here are taken off."""
    for_hub = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
    without_effect = ("torch_device", "low_cpu_mem_usage", "autocast_adapter_dtype", "ephemeral_gpu_offload")
    for name in options:
        if name not in (*for_hub, *without_effect):
            raise ConfigError(f"loading an adapter has no option {name!r}; it has {', '.join(for_hub)}.")
    return {name: value for name, value in options.items() if name in for_hub}
