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
        self._searches = [_Search(each) for each in strings if each]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be sent; after the first stop string, which sets `found`, nothing more."""
        if self.found:
            return ""
        before, text = len(self._held), self._held + text
        places = [before + end - len(each.string) for each in self._searches if (end := each.push(text[before:]))]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        hold = max((each.seen for each in self._searches), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """What was held back for nothing."""
        text, self._held = self._held, ""
        return text


class _Search:
    """Looks for a string in a text that comes in parts, each character once (Knuth, Morris and Pratt).

    `seen`: how much of the string's beginning the text ends with.
    """

    def __init__(self, string: str) -> None:
        self.string, self.seen = string, 0
        self._shorter = [0] * len(string)  # for each beginning the longest shorter one that it ends with
        for place in range(1, len(string)):
            self._shorter[place] = self._after(self._shorter[place - 1], string[place])

    def push(self, text: str) -> int:
        """Where in this part the string ends first; 0 if it does not. To be called until then."""
        for place, letter in enumerate(text):
            self.seen = self._after(self.seen, letter)
            if self.seen == len(self.string):
                return place + 1
        return 0

    def _after(self, seen: int, letter: str) -> int:
        while seen and self.string[seen] != letter:
            seen = self._shorter[seen - 1]
        return seen + (self.string[seen] == letter)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""


def texts_of(tokenizer: Any, tokens: Sequence[int], before: int) -> list[str]:
    """The text of each token behind another; a part of a character is shown as `BROKEN`. Special tokens by name."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    first = text([before])
    both = [text([before, token]) for token in tokens]
    return [
        each[len(first) :] if each.startswith(first) else text([token])
        for token, each in zip(tokens, both, strict=True)
    ]
