"""Examples become token ids with labels, and those become padded batches. What other modules import for data is here.

The border between input and target is exact: both are tokenised on their own, so the ids a prompt was trained on are
the ids that generation starts from. Spaces at the border belong to the target, because byte-level vocabularies hold
words with their leading space. The loss is on the target and the end token after it, never on the input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt.data.examples import Example, LabelledExample, expand, load_examples, load_labelled
from softprompt.errors import DataError
from softprompt.template import Template
from softprompt.template.encode import adds_space, encode_parts, run_parts

__all__ = [
    "IGNORED",
    "Encoded",
    "EncodedLabel",
    "Example",
    "LabelledExample",
    "Template",
    "collate",
    "encode",
    "encode_all",
    "encode_labels",
    "encode_pairs",
    "expand",
    "input_ids",
    "input_rows",
    "load_examples",
    "load_labelled",
    "source_rows",
    "target_ids",
]

IGNORED = -100  # the label that transformers' losses skip


@dataclass(frozen=True)
class Encoded:
    """Token ids and, of the same length, labels: −100 on the input, the target's ids and the end token after it.

    For an encoder-decoder the ids are the source alone, and the labels the target and the end token, of its own length.
    `task` is the number of the row's task where one prompt serves several; `slots`, where virtual tokens stand inside
    the row, holds for each column the one that stands there, or −1.
    """

    input_ids: list[int]
    labels: list[int]
    task: int | None = None
    slots: list[int] | None = None

    def without_slots(self) -> "Encoded":
        """The row as the frozen model gets it, to compare with: no virtual tokens at all."""
        if self.slots is None:
            return self
        kept = [place for place, slot in enumerate(self.slots) if slot < 0]
        of_row = len(self.labels) == len(self.input_ids)
        labels = [self.labels[place] for place in kept] if of_row else self.labels
        return Encoded([self.input_ids[place] for place in kept], labels, self.task)


@dataclass(frozen=True)
class EncodedLabel:
    """Token ids of a text to classify and the index of its class."""

    input_ids: list[int]
    label: int


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, room_for_prompt: int = 0) -> Encoded:
    """Ids and labels of the first target; DataError names the row if `max_length − room_for_prompt` is too little."""
    return encode_all([example], tokenizer, max_length, room_for_prompt)[0]


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, room_for_prompt: int = 0
) -> list[Encoded]:
    """`encode` for many examples at once, which fast tokenizers do several times faster."""
    room = max_length - room_for_prompt
    encoded = []
    starts, targets = input_rows(examples, tokenizer), target_ids(examples, tokenizer)
    for example, (start, slots), target in zip(examples, starts, targets, strict=True):
        if len(start) + len(target) > room:
            beside = f" beside {room_for_prompt} virtual tokens" if room_for_prompt else ""
            raise DataError(
                f"{example.where} does not fit: its input takes {len(start)} tokens and its target {len(target)}, but "
                f"there is room for {max(room, 0)}{beside}; shorten or drop the row, or allow a greater length if the "
                "model has it"
            )
        columns = None if slots is None else slots + [-1] * len(target)
        encoded.append(Encoded(start + target, [IGNORED] * len(start) + target, example.task, columns))
    return encoded


def encode_pairs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, max_target: int
) -> list[Encoded]:
    """Rows for an encoder-decoder: sources as its tokenizer ends them, targets with the end token, each of its length.

    DataError names the row whose source or target is too long.
    """
    encoded = []
    sources, targets = source_rows(examples, tokenizer), target_rows(examples, tokenizer)
    for example, (source, slots), target in zip(examples, sources, targets, strict=True):
        for name, ids, room in (("input", source, max_length), ("target", target, max_target)):
            if len(ids) > room:
                raise DataError(
                    f"{example.where} does not fit: its {name} takes {len(ids)} tokens, but there is room for "
                    f"{max(room, 0)}; shorten or drop the row"
                )
        encoded.append(Encoded(source, target, example.task, slots))
    return encoded


def source_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int] | None]]:
    """`input_rows` for an encoder, which reads the end token that its tokenizer puts behind a text."""
    last = _ids(tokenizer, ["a"], special=True)[0][-1]
    rows = input_rows(examples, tokenizer)
    if last != tokenizer.eos_token_id:
        return rows
    ended = [ids[-1:] == [last] for ids, _ in rows]
    return [
        (ids, slots) if done else ([*ids, last], None if slots is None else [*slots, -1])
        for (ids, slots), done in zip(rows, ended, strict=True)
    ]


def target_rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The first targets' ids as the tokenizer writes targets, with the end token behind them."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError("this tokenizer has no end-of-sequence token, so a target could not end; set eos_token")
    rows: Any = tokenizer(text_target=[example.targets[0].strip() for example in examples], verbose=False)["input_ids"]
    return [list(ids) if end in ids[1:] else [*ids, end] for ids in rows]


def encode_labels(
    examples: Sequence[LabelledExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    room_for_prompt: int = 0,
    truncate: bool = False,
) -> list[EncodedLabel]:
    """Ids of texts to classify, with the special tokens the tokenizer puts around them.

    DataError names a text that does not fit, unless it may be cut (`truncate`; special tokens stay).
    """
    room = max_length - room_for_prompt
    encoded = []
    for example, ids in zip(examples, _ids(tokenizer, [e.text for e in examples], special=True), strict=True):
        if len(ids) > room and truncate:
            ids = list(tokenizer(example.text, truncation=True, max_length=room)["input_ids"])  # pyright: ignore
        elif len(ids) > room:
            raise DataError(
                f"{example.where} does not fit: its text takes {len(ids)} tokens, but there is room for "
                f"{max(room, 0)}; shorten or drop the row"
            )
        encoded.append(EncodedLabel(ids, example.label))
    return encoded


def input_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int] | None]]:
    """`input_ids`, and with each row the columns of its virtual tokens (`Encoded.slots`) where it has any inside."""
    if not any(example.pieces for example in examples):
        return [(ids, None) for ids in input_ids(examples, tokenizer)]
    rows = [(run_parts(example.pieces, tokenizer), {}) for example in examples]
    return [(ids, slots) for ids, slots, _ in encode_parts(rows, tokenizer, None, [e.where for e in examples])]


def input_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What generation starts from: each input's ids, with a start token if the tokenizer adds one, no end token."""
    if any(example.pieces for example in examples):
        return [ids for ids, _ in input_rows(examples, tokenizer)]
    chats = [bool(example.messages) for example in examples]
    texts = [_chat_texts(e, tokenizer)[0] if e.messages else e.input for e in examples]
    encoded = _ids_of_kinds(tokenizer, texts, special=[not chat for chat in chats])
    for index, (example, ids) in enumerate(zip(examples, encoded, strict=True)):
        if not example.messages and ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            encoded[index] = ids = ids[:-1]
        if not ids:
            where = "" if example.where == "the input" else f"{example.where}: "
            raise DataError(
                f"{where}the input is empty and this tokenizer adds no start token; begin with at least one word"
            )
    return encoded


def target_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The first target's ids, ended by the end-of-sequence token (by the template's own end of turn in a chat)."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError("this tokenizer has no end-of-sequence token, so a target could not end; set eos_token")
    spaced = adds_space(tokenizer)
    texts = [_answer(e, tokenizer) if e.messages else _after_border(e, spaced) for e in examples]
    encoded = _ids(tokenizer, texts, special=False)
    for example, text, ids in zip(examples, texts, encoded, strict=True):
        if not example.messages or text == example.targets[0].rstrip():  # a template without an end of turn
            ids.append(end)
    return encoded


def _after_border(example: Example, spaced: bool) -> str:
    text = example.border + example.targets[0]
    return text[1:] if spaced and text.startswith(" ") else text


def _answer(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The assistant's last turn with its end, without the blank that some templates write after that."""
    start, whole = _chat_texts(example, tokenizer)
    return whole[len(start) :].rstrip()


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool) -> list[list[int]]:
    # verbose=False: the tokenizer's own warning about long texts would only repeat our error in vaguer words
    return tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"] if texts else []  # pyright: ignore


def _ids_of_kinds(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: Sequence[bool]) -> list[list[int]]:
    """Ids of texts of which some get the tokenizer's special tokens, in the given order."""
    found: dict[int, list[int]] = {}
    for kind in set(special):
        places = [index for index, this in enumerate(special) if this == kind]
        found.update(zip(places, _ids(tokenizer, [texts[index] for index in places], kind), strict=True))
    return [found[index] for index in range(len(texts))]


def _chat_texts(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The chat up to where the assistant's last turn begins, and the whole chat."""
    if not tokenizer.chat_template:
        raise DataError(
            f'{example.where} holds "messages", but this tokenizer has no chat template; use input and '
            "target columns or a template"
        )
    messages: Any = example.messages
    try:
        start = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:  # templates refuse roles that they do not know or that do not alternate
        raise DataError(f"{example.where}: this tokenizer's chat template refuses the messages ({error})") from error
    if not whole.startswith(start):
        raise DataError(
            f"{example.where}: this tokenizer's chat template writes an answer differently once it is "
            "given, so its tokens cannot be told apart; use input and target columns"
        )
    return start, whole


def collate(
    batch: Sequence[Encoded] | Sequence[EncodedLabel], pad_id: int, padding_side: str = "right"
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], `labels` [B, T] (of targets of their own [B, t], of texts to classify
    [B]); `task_ids` [B] and `slots` [B, T] if any.
    """
    width = max(len(row.input_ids) for row in batch)
    own = any(isinstance(row, Encoded) and len(row.labels) != len(row.input_ids) for row in batch)
    label_width = max(len(row.labels) for row in batch if isinstance(row, Encoded)) if own else width

    def padded(values: list[int], fill: int, to: int = width) -> list[int]:
        rest = [fill] * (to - len(values))
        return rest + values if padding_side == "left" else values + rest

    labels = [row.label if isinstance(row, EncodedLabel) else padded(row.labels, IGNORED, label_width) for row in batch]
    result = {
        "input_ids": torch.tensor([padded(row.input_ids, pad_id) for row in batch]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in batch]),
        "labels": torch.tensor(labels),
    }
    tasks = [row.task for row in batch if isinstance(row, Encoded) and row.task is not None]
    if any(isinstance(row, Encoded) and row.slots is not None for row in batch):
        columns = [row.slots if isinstance(row, Encoded) and row.slots else [-1] * len(row.input_ids) for row in batch]
        result["slots"] = torch.tensor([padded(row, -1) for row in columns])
    return {**result, "task_ids": torch.tensor(tasks)} if tasks else result
