"""From pieces and the texts of the fields to token ids, the columns of the virtual tokens, and where the answer stands.

Words and fields that stand together are tokenised as one text, so a template without slots gives the ids of the plain
text. A blank before a slot or mark only separates and is dropped; a blank behind one belongs to the word that follows;
at the start of a row both are. Nothing in a field is ever taken for a special token or a slot.

A row that is too long loses words at the end of its longest field (in tokens) until that is as long as the next
longest, then at the end of both, and so on. Words of the template, virtual tokens, masks and special tokens stay.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt.errors import ConfigError, DataError
from softprompt.template.pieces import Field, Mark, Piece, Slot, Words

if TYPE_CHECKING:
    from softprompt.template import Template

SENTINEL = "<extra_id_0>"  # T5's first sentinel, 1910.10683 section 3.1.4


class Answer(str, Enum):
    """How a model gives its answer: at mask tokens, as the next token, or in the decoder after a sentinel."""

    MASK = "mask"
    NEXT = "next"
    SENTINEL = "sentinel"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class TemplateRow:
    """A row of T tokens. `slots[t]` is the virtual token that stands in column t, or −1; `input_ids[t]` is then a pad.

    `answer_position` is the column whose output is read: the first mask, the last column (its output predicts the
    next token), or on encoder-decoders the sentinel. `cut` is how many tokens its fields have lost.
    """

    input_ids: list[int]
    slots: list[int]
    answer_position: int
    cut: int = 0

    def without_slots(self) -> "TemplateRow":
        """The row as the frozen model gets it, to compare with: no virtual tokens at all."""
        kept = [place for place, slot in enumerate(self.slots) if slot < 0]
        before = sum(1 for place in kept if place < self.answer_position)
        ids = [self.input_ids[place] for place in kept]
        return TemplateRow(ids, [-1] * len(kept), min(before, len(kept) - 1), self.cut)


@dataclass(frozen=True)
class Ids:
    """Token ids that no text gives: special tokens and masks."""

    ids: tuple[int, ...]


Part = tuple[Words | Field, ...] | Slot | Ids
"""A run of words and fields that is tokenised together, or a single token."""

Filled = tuple[Sequence[Part], Mapping[str, str]]
"""A row: its parts and the texts of its fields."""


def encode_rows(
    template: "Template",
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    max_length: int | None = None,
    answer: Answer = Answer.NEXT,
    masks: int = 1,
    where: Sequence[str] | None = None,
) -> list[TemplateRow]:
    """Rows of texts by field name, as token ids of at most `max_length` tokens, virtual ones included.

    `masks` mask tokens stand at `[MASK]` for `Answer.MASK`. DataError names a row (by `where`) without a field or too
    short to be cut; ConfigError: a mark that this tokenizer or this way to answer does not have.
    """
    places = where or [f"row {number}" for number in range(1, len(rows) + 1)]
    parts = _parts(with_marks(template, tokenizer, answer, masks))
    for fields, place in zip(rows, places, strict=True):
        for name in template.fields:
            if name not in fields:
                raise DataError(f'{place} has no field "{name}" of the template; it has {", ".join(fields) or "none"}')
    encoded = encode_parts([(parts, fields) for fields in rows], tokenizer, max_length, places)
    target = _answer_id(tokenizer, answer)
    return [_row(ids, slots, target, cut) for ids, slots, cut in encoded]


def _row(ids: list[int], slots: list[int], target: int | None, cut: int) -> TemplateRow:
    columns = enumerate(zip(ids, slots, strict=True))
    return TemplateRow(ids, slots, next((n for n, both in columns if both == (target, -1)), len(ids) - 1), cut)


def _answer_id(tokenizer: Any, answer: Answer) -> int | None:
    if answer is Answer.NEXT:
        return None
    return tokenizer.mask_token_id if answer is Answer.MASK else sentinel_id(tokenizer)


def sentinel_id(tokenizer: Any) -> int | None:
    """What stands at `[MASK]` of an encoder-decoder: T5's first sentinel, else the mask token, if there is one."""
    number = tokenizer.convert_tokens_to_ids(SENTINEL)
    known = isinstance(number, int) and number != tokenizer.unk_token_id
    return number if known else tokenizer.mask_token_id


def with_marks(template: "Template", tokenizer: Any, answer: Answer, masks: int) -> list[Piece | Ids]:
    """The pieces with special tokens as ids: the template's, and the tokenizer's start and end where it writes none.

    A row that ends with the answer has no end token, and on a causal model nothing behind `[MASK]`, where no token can
    see it: words there are left off, a slot or a field there is a ConfigError.
    """
    pieces: list[Piece | Ids] = []
    for place, piece in enumerate(template.pieces):
        if piece == Mark("MASK") and answer is Answer.NEXT:
            _check_rest(template, place)
            break
        pieces.append(_as_ids(template, piece, tokenizer, answer, masks) if isinstance(piece, Mark) else piece)
    if not template.has_mask and answer is not Answer.NEXT:
        pieces.append(_as_ids(template, Mark("MASK"), tokenizer, answer, masks))
    start, end = special_around(tokenizer)
    marks = [piece.name for piece in template.pieces if isinstance(piece, Mark)]
    if not {"CLS", "BOS"} & set(marks):
        pieces.insert(0, Ids(start))
    if answer is not Answer.NEXT and not (marks and template.pieces[-1] in (Mark("SEP"), Mark("EOS"))):
        pieces.append(Ids(end))
    return pieces


def _check_rest(template: "Template", place: int) -> None:
    rest = [piece for piece in template.pieces[place + 1 :] if isinstance(piece, Slot | Field)]
    if rest:
        what = f"the field {{{rest[0].name}}}" if isinstance(rest[0], Field) else "a virtual token"
        raise ConfigError(
            f'template "{template.text}" has {what} behind [MASK], which a causal model cannot see when it answers; '
            "move it before [MASK], or take a masked model"
        )


def _as_ids(template: "Template", mark: Mark, tokenizer: Any, answer: Answer, masks: int) -> Ids:
    if mark.name == "MASK":
        number = _answer_id(tokenizer, answer)
        if number is None and answer is Answer.SENTINEL and not template.has_mask:
            return Ids(())  # an encoder-decoder without sentinels answers in its decoder all the same
        count = masks if answer is Answer.MASK else 1
    else:
        number, count = getattr(tokenizer, f"{mark.name.lower()}_token_id"), 1
    if not isinstance(number, int):
        raise ConfigError(
            f'template "{template.text}" has [{mark.name}], but this tokenizer has no such token; leave it out'
        )
    return Ids((number,) * count)


def special_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that this tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    raise ConfigError("this tokenizer changes a text when it adds special tokens, so no template can be laid out")


def _parts(pieces: Sequence[Piece | Ids]) -> list[Part]:
    """Words and fields that stand together as one run."""
    parts: list[Part] = []
    for piece in pieces:
        if isinstance(piece, Words | Field):
            if parts and isinstance(parts[-1], tuple):
                parts[-1] = (*parts[-1], piece)
            else:
                parts.append((piece,))
        elif isinstance(piece, Slot | Ids):
            parts.append(piece)
    return parts


def run_parts(pieces: Sequence[Piece], tokenizer: Any) -> list[Part]:
    """The pieces of an input to generate from: the tokenizer's start, no end. ConfigError for unknown marks."""
    found: list[Piece | Ids] = []
    for piece in pieces:
        if not isinstance(piece, Mark):
            found.append(piece)
            continue
        number = getattr(tokenizer, f"{piece.name.lower()}_token_id")
        if not isinstance(number, int):
            raise ConfigError(f"the template has [{piece.name}], but this tokenizer has no such token; leave it out")
        found.append(Ids((number,)))
    if not {Mark("CLS"), Mark("BOS")} & set(pieces):
        start, _ = special_around(tokenizer)
        found.insert(0, Ids(start))
    return _parts(found)


def encode_parts(
    rows: Sequence[Filled],
    tokenizer: Any,
    max_length: int | None,
    where: Sequence[str],
) -> list[tuple[list[int], list[int], int]]:
    """Ids and slots of every row, and the tokens it has lost: too long rows are cut as the module's text says."""
    fitting = []
    for row, place, (ids, slots) in zip(rows, where, _join(rows, tokenizer), strict=True):
        parts, fields, whole = row[0], dict(row[1]), len(ids)
        while max_length is not None and len(ids) > max_length:
            fields = _shortened(parts, fields, len(ids) - max_length, tokenizer, place)
            ((ids, slots),) = _join([(parts, fields)], tokenizer)
        fitting.append((ids, slots, whole - len(ids)))
    return fitting


def _join(rows: Sequence[Filled], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and slots of every row at full length; all texts go through the tokenizer in one call."""
    texts = [text for parts, fields in rows for text in _texts(parts, fields, adds_space(tokenizer))]
    tokens = iter(text_ids(tokenizer, texts))
    pad = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(n, int)), 0)
    joined = []
    for parts, _ in rows:
        ids: list[int] = []
        slots: list[int] = []
        for part in parts:
            new = [pad] if isinstance(part, Slot) else list(part.ids) if isinstance(part, Ids) else next(tokens)
            ids += new
            slots += [part.index] if isinstance(part, Slot) else [-1] * len(new)
        joined.append((ids, slots))
    return joined


def _texts(parts: Sequence[Part], fields: Mapping[str, str], space_added: bool) -> list[str]:
    """The text of every run."""
    texts: list[str] = []
    begun = False
    for part in parts:
        if not isinstance(part, tuple):
            continue
        text = "".join(fields[piece.name] if isinstance(piece, Field) else piece.text for piece in part).rstrip(" ")
        if not begun:
            text = text.lstrip(" ")
        elif space_added and text.startswith(" "):
            text = text[1:]
        begun = begun or bool(text)
        texts.append(text)
    return texts


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`split_special_tokens`: "</s>" in a text is five characters, not the end token."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]


def adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer treats every text as if after a blank (SentencePiece style)."""
    return tokenizer.tokenize("a")[0].startswith("▁")


def _shortened(parts: Sequence[Part], fields: dict[str, str], over: int, tokenizer: Any, where: str) -> dict[str, str]:
    """`fields` with at least one of them shorter, by about `over` tokens in all."""
    runs = [part for part in parts if isinstance(part, tuple)]
    uses = Counter(piece.name for run in runs for piece in run if isinstance(piece, Field))
    counts = dict(zip(uses, map(len, text_ids(tokenizer, [fields[name] for name in uses])), strict=True))
    if not any(counts.values()):
        raise DataError(
            f"{where} does not fit: {over} tokens too many without any text in its fields; shorten the template or "
            "allow a greater max_length if the model has it"
        )
    limit = _longest_allowed([counts[name] for name in uses.elements()], over)
    cut = {name: _cut(fields[name], limit, tokenizer) for name, count in counts.items() if count > limit}
    return {**fields, **cut}


def _longest_allowed(counts: list[int], over: int) -> int:
    """The greatest L at which Σ max(0, count − L) ≥ over: longest fields are cut first, and to the same length."""
    limit = max(counts) - 1
    while limit > 0 and sum(max(0, count - limit) for count in counts) < over:
        limit -= 1
    return limit


def _cut(text: str, tokens: int, tokenizer: Any) -> str:
    """As many whole words from the start of `text` as make at most so many tokens; of one long word, characters."""
    words = [found.end() for found in re.finditer(r"\S+", text)]
    kept = _most(words, text, tokens, tokenizer)
    return text[: kept or _most(range(1, words[0] if words else len(text)), text, tokens, tokenizer)]


def _most(ends: Sequence[int], text: str, tokens: int, tokenizer: Any) -> int:
    """The greatest of the ascending `ends` at which `text` makes at most so many tokens; 0 if none does."""
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(text_ids(tokenizer, [text[: ends[middle - 1]]])[0]) <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return ends[low - 1] if low else 0


def collate_rows(rows: Sequence[TemplateRow], pad_id: int, padding_side: str = "right") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, where a row has any, `slots` `[B, T]`, and `answer_position` `[B]`."""
    width = max(len(row.input_ids) for row in rows)
    left = padding_side == "left"

    def padded(values: list[int], fill: int) -> list[int]:
        rest = [fill] * (width - len(values))
        return rest + values if left else values + rest

    moved = [row.answer_position + (width - len(row.input_ids) if left else 0) for row in rows]
    batch = {
        "input_ids": torch.tensor([padded(row.input_ids, pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
        "answer_position": torch.tensor(moved),
    }
    if any(slot >= 0 for row in rows for slot in row.slots):
        batch["slots"] = torch.tensor([padded(row.slots, -1) for row in rows])
    return batch
