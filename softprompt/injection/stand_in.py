"""Generation from vectors on models whose own `generate` takes none.

transformers asks of a model that its `prepare_inputs_for_generation` names `inputs_embeds`, which several hybrids and
older families do not. Their calls get ids then, one standing in for each column of the vectors, and where the table of
words looks these up the vectors are put in their place. Logits processors see the ids of real tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, local
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.injection.scope import Scope, entered


@final
@dataclass
class _Rows:
    """One `generate` of a thread: the vectors `[B, W, d]`, how many ids were given beside them, and the stand-in."""

    base: PreTrainedModel
    vectors: Tensor
    given: int
    token: int
    waiting: bool = False


class _Here(local):
    rows: _Rows | None = None


_HERE = _Here()
_LOCK = Lock()
_PREPARED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@contextmanager
def standing_in(base: PreTrainedModel, vectors: Tensor, given: int, token: int) -> Iterator[None]:
    """Inside the block `generate` takes `inputs_embeds=vectors` `[B, W, d]` of any model that looks its ids up.

    `given` is how many ids `generate` is told beside the vectors, `token` an id that is not padding.
    """
    if base not in _PREPARED and api.generates_from_vectors(base):
        yield
        return
    _prepare(base)
    rows, before, scope = _Rows(base, vectors, given, token), _HERE.rows, Scope()
    scope.at(base.get_input_embeddings(), after=_look_up(rows))
    _HERE.rows = rows
    try:
        with entered(scope):
            yield
    finally:
        _HERE.rows = before


def _prepare(base: PreTrainedModel) -> None:
    """Have a model's `prepare_inputs_for_generation` ask this thread for stand-ins. It stays so, threads share it."""
    with _LOCK:
        if base in _PREPARED:
            return
        own, caches = api.preparation(base), api.cache_name(base.forward) is not None

        def prepare(
            input_ids: Tensor,
            next_sequence_length: int | None = None,
            inputs_embeds: Tensor | None = None,
            is_first_iteration: bool = False,
            **kwargs: Any,  # by this name transformers knows that the rest is the model's
        ) -> Any:
            rows = _HERE.rows
            options = {"next_sequence_length": next_sequence_length, "is_first_iteration": is_first_iteration, **kwargs}
            if rows is None or rows.base is not base:
                return own(input_ids, **options)
            if is_first_iteration or next_sequence_length is None or not caches:  # the whole row is run
                rows.waiting, written = True, input_ids[:, rows.given :]
                columns = written.new_full((len(written), rows.vectors.shape[1]), rows.token)
                input_ids = torch.cat([columns, written], dim=1)
            return own(input_ids, **options)

        api.set_preparation(base, prepare)
        _PREPARED[base] = True


def _look_up(rows: _Rows) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        width = rows.vectors.shape[1]
        if not rows.waiting or output.ndim != 3 or output.shape[1] < width:
            return output
        rows.waiting = False
        vectors = rows.vectors.repeat_interleave(len(output) // len(rows.vectors), dim=0).to(output)
        return torch.cat([vectors, output[:, width:]], dim=1)

    return hook
