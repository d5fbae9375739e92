"""The template language: `"{premise} Question: {hypothesis} ? [P*3] Answer: [MASK] ."`

| written | meaning |
|---|---|
| `{column}` | data; the only part that is ever cut |
| `[P]`, `[P*3]` | one or three new virtual tokens at that very place (P-tuning's "anywhere", 2103.10385, section 3.2) |
| `[P1]`, `[P2*3]` | named ones: the same name again is the same virtual tokens again |
| `[MASK]` | where the answer stands, at most once; without it the answer stands at the end |
| `[CLS]`, `[SEP]`, `[BOS]`, `[EOS]` | the tokenizer's own; where none is written, start and end come by themselves |
| anything else | words, P-tuning's anchor tokens |

`{{` and `}}` are plain braces, `[[P]]` is the text "[P]", any other bracket is itself. What a column holds is only
text. In a template for generation the last field is the target; the virtual tokens stand before it.
"""

import re
import string
from typing import Any, final

from softprompt.errors import ConfigError
from softprompt.template.encode import Answer, TemplateRow, collate_rows, encode_rows
from softprompt.template.pieces import Field, Mark, Piece, Slot, Words

__all__ = ["Answer", "Field", "Mark", "Slot", "Template", "TemplateRow", "Words", "collate_rows", "encode_rows"]

_MARKS = "MASK|CLS|SEP|BOS|EOS"
_TOKEN = re.compile(
    rf"\[\[(?P<plain>P[^\[\]]*|{_MARKS})\]\]|\[P(?P<name>\d*)(?:\*(?P<count>\d+))?\]|\[(?P<mark>{_MARKS})\]"
)
# What was surely meant to be one of them: [p], [P*], [P*x], [P 3], [mask], "[P*" before a field.
_NEARLY = re.compile(rf"\[\s*(?:p\s*(?:[\d*][^\]]*)?|{_MARKS})\s*(?:\]|$)", re.IGNORECASE)


@final
class Template:
    """A parsed template. ConfigError: malformed braces or brackets, no field, two `[MASK]`s, clashing slot names."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pieces = _parse(text)
        self.fields = tuple(piece.name for piece in self.pieces if isinstance(piece, Field))
        if not self.fields:
            raise ConfigError(f'template "{text}" names no column; write for example "{{input}} => {{target}}"')
        if self.pieces.count(Mark("MASK")) > 1:
            raise ConfigError(f'template "{text}" has [MASK] more than once; the answer stands at one place')

    @classmethod
    def parse(cls, text: str) -> "Template":
        """The same as `Template(text)`."""
        return cls(text)

    @property
    def num_virtual_tokens(self) -> int:
        """How many different virtual tokens it has."""
        return 1 + max((piece.index for piece in self.pieces if isinstance(piece, Slot)), default=-1)

    @property
    def has_mask(self) -> bool:
        return Mark("MASK") in self.pieces

    @property
    def answer_after_blank(self) -> bool:
        """Whether the answer is written after a blank, which byte-level vocabularies hold with the word."""
        if not self.has_mask:
            return not _ends_with_line_break(self.pieces)
        before = self.pieces[: self.pieces.index(Mark("MASK"))]
        return bool(before) and isinstance(before[-1], Words) and before[-1].text.endswith(" ")

    def split_target(self) -> tuple[tuple[Piece, ...], str, str]:
        """A template for generation: the pieces before its last field, that field, and the words behind it.

        ConfigError where anything but words stands behind the target, or `[MASK]` anywhere.
        """
        if self.has_mask:
            raise ConfigError(
                f'template "{self.text}" has [MASK], but a target is generated at its last field; drop [MASK], '
                "or choose a label word there with task: CLOZE"
            )
        last = max(place for place, piece in enumerate(self.pieces) if isinstance(piece, Field))
        field, after = self.pieces[last], self.pieces[last + 1 :]
        assert isinstance(field, Field)
        if not all(isinstance(piece, Words) for piece in after):
            raise ConfigError(
                f'template "{self.text}" has virtual or special tokens behind its last field, which is the target to '
                "generate; put them before it"
            )
        return self.pieces[:last], field.name, "".join(piece.text for piece in after if isinstance(piece, Words))

    def encode(self, tokenizer: Any, fields: dict[str, str], max_length: int | None = None,
               answer: Answer | None = None, masks: int = 1) -> TemplateRow:  # fmt: skip
        """One row: see `encode_rows`. `answer` is `mask` by default if the tokenizer has a mask, else `next`."""
        kind = answer or (Answer.MASK if tokenizer.mask_token_id is not None else Answer.NEXT)
        return encode_rows(self, tokenizer, [fields], max_length, kind, masks)[0]

    def __repr__(self) -> str:
        return f"Template({self.text!r})"


def _parse(text: str) -> tuple[Piece, ...]:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f'template "{text}" is malformed ({error}); write fields as {{column}} and braces as {{{{'
        ) from error
    names: dict[str, range] = {}
    pieces: list[Piece] = []
    for literal, field, spec, conversion in parts:
        pieces += _literal(literal, text, pieces, names)
        if field is None:
            continue
        if not field or spec or conversion:
            raise ConfigError(f'template "{text}" has a field that is not a plain {{column}}; use the columns\' names')
        pieces.append(Field(field))
    return tuple(pieces)


def _literal(literal: str, text: str, before: list[Piece], names: dict[str, range]) -> list[Piece]:
    """The words, slots and marks of a part without fields; `names` holds the named slots so far and is added to."""
    pieces: list[Piece] = []
    place = 0
    for found in _TOKEN.finditer(literal):
        pieces += _words(literal[place : found.start()], text)
        place = found.end()
        if found["plain"]:
            pieces.append(Words(f"[{found['plain']}]"))
        elif found["mark"]:
            pieces.append(Mark(found["mark"]))
        else:
            used = max((piece.index for piece in [*before, *pieces] if isinstance(piece, Slot)), default=-1) + 1
            pieces += [Slot(index) for index in _slots(found["name"], found["count"], used, names, text)]
    return pieces + _words(literal[place:], text)


def _words(words: str, text: str) -> list[Piece]:
    nearly = _NEARLY.search(words)
    if nearly:
        raise ConfigError(
            f'template "{text}" has {nearly.group()!r}, which is none of [P], [P*3], [P1], [MASK], [CLS], [SEP], '
            "[BOS], [EOS]; write one of these, or double the brackets for plain text, as in [[P]]"
        )
    return [Words(words)] if words else []


def _slots(name: str, count: str | None, used: int, names: dict[str, range], text: str) -> range:
    """The indices of `[P*count]`, or of `[Pname*count]`: new ones, unless the name has its own already."""
    length = int(count) if count is not None else 1
    if length < 1:
        raise ConfigError(f'template "{text}" has [P{name}*{count}]; a slot stands for at least one virtual token')
    new = range(used, used + length)
    if not name:
        return new
    known = names.setdefault(name, new)
    if len(known) != length:
        raise ConfigError(
            f'template "{text}" gives [P{name}] {len(known)} and {length} virtual tokens; a name stands for the same '
            "ones everywhere"
        )
    return known


def _ends_with_line_break(pieces: tuple[Piece, ...]) -> bool:
    last = pieces[-1]
    return isinstance(last, Words) and last.text.rstrip(" ").endswith("\n")
