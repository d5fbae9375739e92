"""The base model as the library of prompts sees it: what fits before it, what a prompt folds to, its words."""

import hashlib
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any, Protocol, final

import torch
from torch import Tensor

from softprompt.batch.find import placement_of
from softprompt.elsewhere import all_words, word_table
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.facts import Facts
from softprompt.injection.contract import Way
from softprompt.prompt import KV, evaluating
from softprompt.running import Run
from softprompt.store.loaded import LoadedPrompt
from softprompt.transformers_api import hub_file

_WEIGHTS = (".safetensors", ".bin")


class Base(Protocol):
    """`LentBase` is an engine's own model; `FolderBase` reads one onto the CPU while something has to be folded.

    `path`: where its files are, a folder or a name on the hub. `name`: what requests call the base model itself, which
    no prompt may be called. `fingerprint`: hex digits that change with the weights. `dtype`: the number format it is
    served in, such as "bfloat16".
    """

    @property
    def path(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def facts(self) -> Facts: ...

    def fold(self, loaded: LoadedPrompt) -> KV:
        """As `SoftPromptModel.fold`, on the CPU. UnsupportedError for what cannot be keys and values in front."""
        ...

    def words(self) -> Tensor:
        """The word embeddings `[V, d]` on the CPU."""
        ...

    def release(self) -> None:
        """Nothing more is to be folded for now, so that memory for it may be given back."""
        ...


@final
class LentBase:
    """The model that an engine runs anyway, by its way. `fingerprint_of(path)` is its fingerprint."""

    def __init__(self, way: Way, facts: Facts, tokenizer: Any, path: str, name: str, fingerprint: str) -> None:
        self.facts, self.tokenizer = facts, tokenizer
        self.path, self.name, self.fingerprint = path, name, fingerprint
        self._way = way

    @property
    def dtype(self) -> str:
        return str(word_table(self._way.base).dtype).removeprefix("torch.")

    def fold(self, loaded: LoadedPrompt) -> KV:
        return folded(self._way, self.facts, loaded)

    def words(self) -> Tensor:
        weight = self._way.base.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return all_words(self._way.base) if weight.is_meta else weight.detach().cpu()

    def release(self) -> None: ...


@final
class FolderBase:
    """A model that another process runs: it is read onto the CPU when something needs it, and dropped again.

    `dtype`: float32, bfloat16 or float16, what the other process computes in. Threads may share it. ConfigError, also
    later, for a model that cannot be loaded.
    """

    def __init__(self, path: str, name: str, dtype: str) -> None:
        from softprompt.recipe import DTYPES

        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not a number format to serve in; use one of {', '.join(DTYPES)}.")
        self.path, self.name, self.dtype = path, name, dtype
        self._lock = RLock()
        self._way: Way | None = None
        self._facts: Facts | None = None
        self._words: Tensor | None = None

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.path)

    @cached_property
    def tokenizer(self) -> Any:
        from softprompt.loading import load_tokenizer

        return load_tokenizer(self.path)

    @property
    def facts(self) -> Facts:
        with self._lock:
            if self._facts is None:
                self._open()
            assert self._facts is not None
            return self._facts

    def fold(self, loaded: LoadedPrompt) -> KV:
        with self._lock:
            return folded(self._open(), self.facts, loaded)

    def words(self) -> Tensor:
        """Kept from the first time on, since the model is not."""
        with self._lock:
            if self._words is None:
                was_open = self._way is not None
                self._words = all_words(self._open().base)
                if not was_open:
                    self.release()
            return self._words

    def release(self) -> None:
        with self._lock:
            self._way = None

    def _open(self) -> Way:
        from softprompt.base_model import find_way
        from softprompt.loading import load_base

        if self._way is None:
            model = load_base(self.path, self.tokenizer, dtype=self.dtype, device="cpu").requires_grad_(False)
            self._way, self._facts = find_way(model)
        return self._way


@torch.no_grad()
def folded(way: Way, facts: Facts, loaded: LoadedPrompt) -> KV:
    """A prompt as keys and values, `[1, h, p, k]` each, in the base model's type, on the CPU.

    UnsupportedError where it stands inside the rows, depends on them, or is to be seen from beyond a sliding window.
    """
    own = word_table(way.base)
    with evaluating(way.base):
        kv = Run(way, facts, loaded.prompt(), placement_of(loaded.config)).as_kv()
    if kv.always_visible:
        raise UnsupportedError(
            "prefix_always_visible lets queries see the prefix from beyond a sliding window, which this engine cannot; "
            "serve it with --engine transformers, or train without."
        )
    return kv.map(lambda part: part.to(own.dtype).cpu())


def other_base(trained: str | None, path: str) -> str | None:
    """What to say of a prompt that was trained before `trained`, where that is called otherwise than the base model.

    A folder may have been renamed, so that this is a doubt and no error: a prompt's shape says nothing of the weights.
    """
    if not trained or _called(trained) == _called(path):
        return None
    return (
        f"it says that it was trained before {_called(trained)!r}, and stands before {_called(path)!r} here; unless "
        "these are the same weights, its answers are worthless."
    )


def _called(path: str) -> str:
    """The last part of a model's name or folder; in the hub's cache (models--a--b/snapshots/<commit>) the model's."""
    from softprompt.loading import resolve_model

    parts = Path(resolve_model(path)).expanduser().absolute().parts
    cached = [part.rsplit("--", 1)[-1] for part in parts if part.startswith("models--")]
    return cached[-1] if cached else parts[-1]


def fingerprint_of(path: str) -> str:
    """What tells one base model from another without reading all of it: its place, its config, and of every file of
    weights the name, size and time of change. ConfigError for a model that is not on this machine.
    """
    from softprompt.loading import resolve_model

    folder = Path(resolve_model(path))
    try:
        if not folder.is_dir():
            folder = Path(hub_file(path, "config.json") or "").parent  # of one commit, in the hub's cache
        seen = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape"))
        seen.update((folder / "config.json").read_bytes())
        for file in sorted(folder.iterdir()):
            if file.suffix in _WEIGHTS and file.is_file():
                found = file.stat()
                seen.update(f"\0{file.name}\0{found.st_size}\0{found.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    except OSError as error:  # of the hub's client too
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} is no base model that can be read ({first}); give a model's folder.") from error
    return seen.hexdigest()
