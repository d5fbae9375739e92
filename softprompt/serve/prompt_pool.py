"""The prompts of the rows under way, as keys and values: each is there once, however many rows have it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from softprompt.batch.find import placement_of
from softprompt.config import Placement
from softprompt.elsewhere import at_hand, word_table
from softprompt.errors import UnsupportedError
from softprompt.facts import Facts
from softprompt.fold import fold
from softprompt.injection.contract import Way
from softprompt.prompt import KV, Embeddings
from softprompt.serve.version import Version
from softprompt.store import PromptStore

SPARE = 2  # a pool that is more than so many times as long as its longest prompt is made anew
KNOWN = 4096  # versions whose folders are remembered, if they are not in memory


@dataclass(frozen=True)
class Found:
    """A prompt: keys and values `[1, h, p, k]`, or vectors that stand inside a row, and where (see `Placement`)."""

    prompt: KV | Embeddings
    placement: Placement = Placement.FRONT

    @property
    def length(self) -> int:
        return self.prompt.length


class PromptFinder:
    """Loads the prompts of versions, and keeps the latest within `max_bytes`, folded. For a single thread."""

    def __init__(self, way: Way, facts: Facts, max_bytes: int) -> None:
        self._way, self._facts = way, facts
        self._store = PromptStore(max_bytes=max_bytes)
        self._folders: dict[str, str] = {}

    @torch.no_grad()
    def find(self, version: Version) -> Found:
        """Raises SoftPromptError."""
        self._know(version.digest, str(version.folder))
        good, bad = self._store.load([version.digest], self._facts)
        if bad:
            raise bad[version.digest]
        loaded = good[version.digest]
        prompt, placement = loaded.prompt(), placement_of(loaded.config)
        own = word_table(self._way.base)
        if isinstance(prompt, Embeddings) and not self._facts.can_fold(placement):
            return Found(Embeddings(prompt.vectors.to(own)), placement)

        def as_kv() -> KV:
            if isinstance(prompt, KV):
                kv = prompt
            else:
                with at_hand(self._way.base):
                    kv = fold(self._way, Embeddings(prompt.vectors.to(own)))
            return kv.map(lambda part: part.detach().to(own).clone(memory_format=torch.contiguous_format))

        kv = self._store.derived(loaded, "served", as_kv)
        if kv.cross or kv.encoder:
            raise UnsupportedError(f"the prompt {version.name!r} is for an encoder-decoder; train one for this model.")
        return Found(kv)

    def _know(self, digest: str, folder: str) -> None:
        if self._folders.get(digest) == folder:
            return
        if len(self._folders) >= KNOWN:
            for old in set(self._folders) - set(self._store.held):
                self._store.remove(old)
                del self._folders[old]
        self._store.register(digest, folder)
        self._folders[digest] = folder


@final
class PromptPool:
    """Prompts side by side in one tensor per layer, `[N, h, p, k]`, shorter ones with zeros in front; keys are digests.

    A place that nobody has is all zeros: what is hidden still is multiplied by 0, which infinities would show.
    """

    def __init__(self) -> None:
        self._keys: list[str] = []  # by place
        self._lengths: list[int] = []
        self._users: dict[str, int] = {}
        self._kv: KV | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it holds, the zeros before shorter prompts included."""
        lengths = list(self._lengths)  # (other threads ask)
        return len(lengths) * max(lengths, default=0)

    def __len__(self) -> int:
        return len(self._keys)

    def longest_with(self, length: int) -> int:
        """The longest of its prompts and one of `length`."""
        return max([length, *self._lengths])

    def __contains__(self, key: object) -> bool:
        return key in self._users

    def goes_with(self, kv: KV) -> bool:
        """Whether a prompt can share a batch with those that are there: a sliding window is for all or for none."""
        return self._kv is None or self._kv.always_visible == kv.always_visible

    def take(self, key: str, kv: KV) -> None:
        """One more row has this prompt."""
        if key not in self._users:
            self._place(key, kv)
            self._users[key] = 0
        self._users[key] += 1

    def give_back(self, key: str) -> None:
        """One row less has it."""
        self._users[key] -= 1
        if self._users[key]:
            return
        del self._users[key]
        place, last = self._keys.index(key), len(self._keys) - 1
        self._keys[place], self._lengths[place] = self._keys[last], self._lengths[last]
        self._keys.pop()
        self._lengths.pop()
        if not self._keys:
            self._kv = None
            return
        assert self._kv is not None
        if self._kv.length > SPARE * max(self._lengths):
            self._resize(self._kv, len(self._keys), max(self._lengths), place, last)
            return
        for part in _parts(self._kv):
            part[place] = part[last]
            part[last] = 0

    def of(self, keys: Sequence[str | None]) -> KV | None:
        """The prompts of rows by their keys (None: no prompt), as one; None where no row has any."""
        if self._kv is None or not any(keys):
            return None
        count, length = len(self._keys), self._kv.length
        nobody = [count] if None in keys else []  # the place behind the last, which is empty
        number = {key: place for place, key in enumerate(self._keys)}
        rows = [count if key is None else number[key] for key in keys]
        longest = max(self._lengths[place] for place in rows if place < count)
        lengths = (*(min(each, longest) for each in self._lengths), *(0 for _ in nobody))
        device = self._kv.layers[0][0].device
        shown = self._kv.map(lambda part: part[: len(lengths), :, length - longest :])
        return KV(
            shown.layers,
            rows=torch.tensor(rows, device=device),
            lengths=lengths,  # always: they say how many there are, of which the rows may have few
            always_visible=shown.always_visible,
        )

    def _place(self, key: str, kv: KV) -> None:
        """Give it the place behind the last; one more stays free."""
        place, like = len(self._keys), kv if self._kv is None else self._kv
        rows = 0 if self._kv is None else len(like.layers[0][0])
        if place + 2 > rows or kv.length > like.length:
            self._resize(like, place + 1, self.longest_with(kv.length), None, 0)
        assert self._kv is not None
        for part, new in zip(_parts(self._kv), _parts(kv), strict=True):
            part[place, :, part.shape[2] - kv.length :] = new[0]
        self._keys.append(key)
        self._lengths.append(kv.length)

    def _resize(self, like: KV, count: int, length: int, place: int | None, last: int) -> None:
        """Room for `count` prompts of `length` tokens; the one at `last` moves to `place`, if that is given."""
        rows = count + 1 + count // 8  # one at least stays free
        moved = list(range(len(self._keys)))
        if place is not None and place < len(moved):
            moved[place] = last
        old = self._kv

        def wider(part: Tensor) -> Tensor:
            new = part.new_zeros(rows, part.shape[1], length, part.shape[3])
            if old is not None and moved:
                shared = min(length, part.shape[2])
                new[: len(moved), :, length - shared :] = part[moved, :, part.shape[2] - shared :]
            return new

        self._kv = KV(like.map(wider).layers, always_visible=like.always_visible)


def _parts(kv: KV) -> list[Tensor]:
    return [part for pair in kv.layers for part in pair]
