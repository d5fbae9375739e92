"""Looking at the folder of prompts again and again."""

from contextlib import AbstractContextManager

from softprompt.serve.library import PromptLibrary


def watching(library: PromptLibrary, seconds: float) -> AbstractContextManager[None]:
    """Inside the block a thread calls `library.scan()` every so many seconds; 0: never."""
    raise NotImplementedError
