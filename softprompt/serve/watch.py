"""A library that follows its folder: the folder is looked at again and again."""

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from softprompt.serve.base import Base
from softprompt.serve.library import PromptLibrary
from softprompt.serve.options import ServeOptions

log = logging.getLogger(__name__)

_SHARE = 10  # of the time, at least, is not spent on looking


@contextmanager
def open_library(options: ServeOptions, base: Base, folded: bool = False) -> Iterator[PromptLibrary]:
    """The library that the options describe, scanned once and watched; inside the block. Raises ConfigError.

    Without `options.objects` its copies are in a temporary folder, and gone after the block.
    """
    own = options.objects is None
    objects = Path(tempfile.mkdtemp(prefix="softprompt-")) if options.objects is None else options.objects
    library = PromptLibrary(options.prompts, base, objects, folded=folded, sole=own)
    try:
        library.scan()
        with watching(library, options.watch_seconds):
            yield library
    finally:
        library.close()


@contextmanager
def watching(library: PromptLibrary, seconds: float) -> Iterator[None]:
    """Inside the block a thread calls `library.scan()` every so many seconds; 0: never.

    Where looking takes long, as in a folder of very many adapters, it is done less often.
    """
    if not seconds:
        yield
        return
    stop = Event()
    thread = Thread(target=_watch, args=(library, seconds, stop), name="softprompt-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(library: PromptLibrary, seconds: float, stop: Event) -> None:
    pause = seconds
    while not stop.wait(pause):
        begun = time.monotonic()
        try:
            library.scan(stop)
        except Exception:  # nothing may end the watch
            log.exception("the folder of prompts could not be looked at")
        pause = max(seconds, _SHARE * (time.monotonic() - begun))
