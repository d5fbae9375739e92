"""Models whose prompts a thread has switched off. Another thread's calls of the same model go on with theirs.

Python tells nobody which thread started which, so a thread that is started inside the block has the prompt, too; it is
warned, since loops that stream what a thread generates may mean it otherwise.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any


class _Here(local):
    models: tuple[Any, ...] = ()


_HERE = _Here()
_LOCK = threading.Lock()
_BLOCKS: list[tuple[Any, frozenset[threading.Thread]]] = []
"""The models that threads have switched off now, and the threads there were when they did."""


class SwitchedOnWarning(UserWarning):
    """A thread uses a prompt that another thread has switched off since before this one was started."""


@contextmanager
def disabling(model: Any) -> Iterator[None]:
    """Inside the block this thread has no prompt before `model`."""
    before = _HERE.models
    block = model, frozenset(threading.enumerate())
    with _LOCK:
        _BLOCKS.append(block)
    _HERE.models = (*before, model)
    try:
        yield
    finally:
        _HERE.models = before
        with _LOCK:
            _BLOCKS[:] = [each for each in _BLOCKS if each is not block]


def disabled(model: Any) -> bool:
    """Whether this thread has switched the prompts of `model` off."""
    if _HERE.models and any(each is model for each in _HERE.models):
        return True
    if _BLOCKS:
        _warn(model)
    return False


def _warn(model: Any) -> None:
    own = threading.current_thread()
    if any(own not in alive for other, alive in list(_BLOCKS) if other is model):
        warnings.warn(
            "this thread was started while another is inside disable_adapter(), which holds for the thread that "
            "entered it alone: the prompt is used here. Enter disable_adapter() in the thread that calls the model.",
            SwitchedOnWarning,
            stacklevel=4,
        )
