"""Checks on everything a checkpoint brings in: names, paths, and tensor files, before they are used.

Nothing is unpickled except by `torch.load(weights_only=True)`, which builds tensors and plain containers only; names,
types, shapes and sizes are compared with what the config promises before a byte of tensor data is read.
"""

import math
import os
import pickle
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.checkpoint.tensor_file import DTYPES, HEADER_BYTES, Layout, read_file, read_text
from softprompt.errors import CheckpointError

HEAD_BYTES = 16 << 30  # room for task heads, whose shapes only the base model knows
_FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]
_ONE_THREAD = 1 << 14
_TAKEN_NAMES = frozenset(dir(nn.ModuleDict())) | {"__base__"}


def check_adapter_name(name: Any) -> str:
    """`name`, if it can be both a key of an `nn.ModuleDict` and a folder. Raises CheckpointError."""
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"adapter name {name!r} is not a non-empty text; choose a name such as 'default'.")
    shown = repr(name if len(name) <= 60 else name[:57] + "...")
    if not name.isprintable() or any(char in '/\\:."' for char in name) or name != name.strip() or len(name) > 100:
        raise CheckpointError(
            f"adapter name {shown} cannot name a folder and a module; use at most 100 letters, digits, '-' and '_'."
        )
    if name in _TAKEN_NAMES:
        raise CheckpointError(f"adapter name {shown} is reserved; choose another.")
    return name


def check_subfolder(subfolder: str) -> str:
    """A relative path that stays below the folder it is relative to. Raises CheckpointError."""
    ways_out = [PurePosixPath(subfolder), PureWindowsPath(subfolder)]
    if "\0" in subfolder or any(way.is_absolute() or way.drive or ".." in way.parts for way in ways_out):
        raise CheckpointError(f"subfolder {subfolder!r} leaves the adapter's folder; give a plain relative path.")
    return subfolder


def file_inside(folder: Path, name: str, roots: Callable[[], tuple[Path, ...]] = tuple) -> Path | None:
    """The regular file `name` (a relative path) in `folder`, or None where there is none.

    A link may only lead to somewhere in `folder` or in one of `roots()` (the hub's cache keeps its files in another
    folder); pipes and devices would block or never end. Raises CheckpointError.
    """
    if os.path.basename(name) == name:
        try:
            if stat.S_ISREG(os.lstat(os.path.join(folder, name)).st_mode):
                return folder / name  # what is not a link lies where it is
        except FileNotFoundError:
            return None
        except OSError:
            pass  # its reason is found below
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
        allowed = [root.resolve() for root in (folder, *roots())]
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to nothing; copy the adapter again.") from None
        return None
    except (OSError, RuntimeError) as error:  # no permission, or links that lead in a circle
        raise CheckpointError(f"{path} cannot be read: {reason(error)}.") from error
    if not any(real.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{path} is a link out of its folder, to {real}; put the file itself there.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file; put the adapter's file there.")
    return path


def is_head(name: str, modules: list[str] | None) -> bool:
    """Whether tensor `name` (`base_model.<path>.<parameter>`) belongs to a module listed in `modules_to_save`."""
    inside = name.removeprefix("base_model.")
    return inside != name and any(f".{module}." in f".{inside}" for module in modules or ())


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], heads: list[str] | None = None, mapped: bool = False
) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `.bin` file, on the CPU, each in its own memory (or `mapped`: `read_file`).

    The file must hold exactly the names in `shapes`, with these shapes, and besides them only tensors of the modules
    `heads`. Raises CheckpointError that names the file and the reason.
    """
    need = 8 * sum(math.prod(shape) for shape in shapes.values())
    limit = need + HEADER_BYTES + (HEAD_BYTES if heads else 0)

    def check(found: dict[str, Layout]) -> None:
        check_layouts(path, found, shapes, heads)

    if path.suffix == ".safetensors":
        with damage(path):
            tensors = read_file(path, check, mapped, lambda size: _check_size(path, size, limit))
    else:
        with damage(path):
            _check_size(path, path.stat().st_size, limit)
        tensors = _read_bin(path, check)
    return check_finite(path, tensors)


def read_any_tensors(path: Path, check: Callable[[dict[str, Layout]], None]) -> dict[str, Tensor]:
    """Every tensor of a `.safetensors` or `.bin` file, if `check` accepts their layouts. Raises CheckpointError."""

    def check_all(found: dict[str, Layout]) -> None:
        check(found)
        _check_types(path, found)

    if path.suffix == ".bin":
        return check_finite(path, _read_bin(path, check_all))
    with damage(path):
        return check_finite(path, read_file(path, check_all))


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a `.safetensors` file. Raises CheckpointError."""
    with damage(path):
        return read_text(path)


def check_layouts(
    path: Path, found: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]], heads: list[str] | None
) -> None:
    """Raise CheckpointError unless `found` is exactly what the config promises."""
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(f"{path} has no tensor {name!r}; it holds {_listing(found)}.")
        if found[name][0] != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(found[name][0])} but its config promises {list(shape)}; the two files "
                f"do not belong together."
            )
    for name in found:
        if name not in shapes and not is_head(name, heads):
            raise CheckpointError(
                f"{path} holds a tensor {_short(name)} that is neither the prompt nor part of modules_to_save "
                f"({', '.join(heads or []) or 'none'})."
            )
    _check_types(path, found)


def _check_types(path: Path, found: Mapping[str, Layout]) -> None:
    for name, (shape, dtype) in found.items():
        counter = dtype is torch.int64 and shape == ()  # such as a batch norm's num_batches_tracked
        if dtype not in _FLOATS and not counter:
            raise CheckpointError(
                f"{path}: {_short(name)} has type {str(dtype).removeprefix('torch.')}; a prompt is made of real "
                f"numbers (float32, float16, bfloat16 or float64)."
            )
        if len(shape) > 8:
            raise CheckpointError(f"{path}: {_short(name)} has {len(shape)} dimensions; no parameter has so many.")


def _total(tensor: Tensor) -> float:
    """The sum of all numbers, in pieces that torch adds in one thread: threads take longer to meet than to add."""
    return sum(part.sum().item() for part in tensor.reshape(-1).split(_ONE_THREAD))


def check_finite(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, if every number is finite. Raises CheckpointError."""
    for name, tensor in tensors.items():
        if math.isfinite(_total(tensor)):  # what is not finite stays so in a sum, and this is the faster question
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"{path}: {bad} of the {tensor.numel()} numbers in {_short(name)} are NaN or infinite; the training "
                f"diverged or the file is damaged, so use an earlier checkpoint."
            )
    return tensors


def _read_bin(path: Path, check: Callable[[dict[str, Layout]], None]) -> dict[str, Tensor]:
    """A file of `torch.save`, without running anything in it."""
    size = path.stat().st_size
    with damage(path):
        _check_stored(path, size)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not tensors by name; save the adapter again.")
    for name, tensor in loaded.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or not tensor.is_cpu:
            raise CheckpointError(f"{path}: {_short(name)} is not a plain tensor; save the adapter again.")
    check({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.items()})
    if sum(tensor.numel() * tensor.element_size() for tensor in loaded.values()) > size:
        raise CheckpointError(f"{path}: its tensors claim more data than the {size:,} bytes there are; it is damaged.")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in loaded.items()}


def _check_stored(path: Path, size: int) -> None:
    """`torch.save` stores its records as they are; compressed ones may unpack to more than memory holds."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(each.compress_type != zipfile.ZIP_STORED for each in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path} is compressed, which torch.save never does; save the adapter again.")


@contextmanager
def damage(path: Path, *meant: type[Exception]) -> Iterator[None]:
    """Whatever a parser of foreign bytes throws, but what is `meant`, becomes one CheckpointError."""
    try:
        yield
    except (CheckpointError, *meant):
        raise
    except Exception as error:  # the parsers raise a dozen types, from KeyError to UnpicklingError, on damaged bytes
        if isinstance(error, pickle.UnpicklingError):
            what = "it holds pickled Python objects, which could run code and are never loaded, or is damaged"
        else:
            what = f"it is damaged, cut short or of another format ({reason(error)})"
        raise CheckpointError(f"{path}: {what}; save the adapter again, as safetensors.") from error


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise CheckpointError(
            f"{path} has {size:,} bytes but its config promises tensors of at most {limit:,}; the two files do not "
            f"belong together."
        )


def reason(error: BaseException) -> str:
    """The first line of an exception's message, shortened."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0][:120].rstrip(" .:")


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _listing(names: Mapping[str, Any]) -> str:
    shown = ", ".join(_short(name) for name in list(names)[:5])
    return (shown or "nothing") + (f" and {len(names) - 5} more" if len(names) > 5 else "")
