"""An answer's text as its tokens come: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
"""What a tokenizer gives for bytes that are no character, or not one yet."""

CONTEXT = 6  # tokens of the text before the answer, which decide whether its first word begins with a space
PATIENCE = 16  # a character is at most four bytes, so after as many tokens without one some bytes are none


class Detokenizer:
    """Token by token, the text that a tokenizer gives for all of them after the tokens `before`.

    Special tokens have no text. Characters whose bytes are spread over tokens come with the last of them; bytes of a
    character that never is completed have no text.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-CONTEXT:])
        self._read = len(self._ids)  # the others wait

    def push(self, token: int) -> str:
        """What is known now and was not before one more token."""
        self._ids.append(token)
        known, text = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if text == known:
            self._ids.pop()
            return ""
        if text.endswith(BROKEN) and len(self._ids) - self._read < PATIENCE:
            return ""
        self._ids = self._ids[self._read :]  # what was read last is the context of what comes
        self._read = len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        """What still waits, but for a character that has not been completed."""
        known, text = self._decode(self._ids[: self._read]), self._decode(self._ids)
        return text[len(known) :].rstrip(BROKEN)

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids)


class StopStrings:
    """Holds back the end of a text while it may be the beginning of a stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(each for each in strings if each)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be sent; after the first stop string, which sets `found`, nothing more."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in (text.find(each) for each in self._strings) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        hold = max((_overlap(text, each) for each in self._strings), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """What was held back for nothing."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """How long the longest end of `text` is that `string` begins with, but is not yet the whole of it."""
    longest = min(len(string) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""


def text_of(tokenizer: Any, token: int, before: int) -> str:
    """The text of one token behind another; a part of a character is shown as `BROKEN`. Special tokens by name."""
    ids = [before, token]
    both, first = (
        tokenizer.decode(each, skip_special_tokens=False, clean_up_tokenization_spaces=False) for each in (ids, ids[:1])
    )
    return both[len(first) :] if both.startswith(first) else tokenizer.decode([token])
