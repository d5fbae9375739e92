"""Cloze tasks: choosing the label whose words a model finds likeliest at the answer's place in a template.

- A masked model answers at mask tokens, as many as the longest word has tokens; a word of k tokens is scored at the
  first k of them, all in one pass (Schick and Schütze 2021, 2009.07118, section 3, "PET with multiple masks").
- A causal model answers with the next tokens: the log-probability of the whole word, token by token.
- An encoder-decoder answers in its decoder, behind the sentinel that stands in the encoder's input (T5), or behind the
  start token where there are no sentinels.
The authors of P-tuning train their few-shot tasks on the cross-entropy over the labels' scores ("labels") and LAMA on
the model's whole vocabulary ("vocabulary"): both are here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt import transformers_api as api
from softprompt.cloze.verbalizer import Verbalizer, WordTable
from softprompt.data.cloze import ClozeExample
from softprompt.elsewhere import batch_on, own_class, place_of
from softprompt.errors import ConfigError, DataError, UnsupportedError
from softprompt.recipe import ANSWER_LOSSES, WORD_SCORES
from softprompt.template import Answer, Template, TemplateRow, collate_rows, encode_rows
from softprompt.template.encode import sentinel_id
from softprompt.vocabulary import check_tokens

CHUNK = 64  # sequences per forward pass


@dataclass(frozen=True)
class EncodedCloze:
    """A row in its template and the number of its label (−1: none of the candidates)."""

    row: TemplateRow
    label: int

    @property
    def input_ids(self) -> list[int]:
        return self.row.input_ids

    def without_slots(self) -> "EncodedCloze":
        return EncodedCloze(self.row.without_slots(), self.label)


def answer_of(base: PreTrainedModel) -> Answer:
    """How this model gives an answer. UnsupportedError for one without a language model's head."""
    if base.config.is_encoder_decoder:
        return Answer.SENTINEL
    name = own_class(base).__name__
    if api.predicts_masks(name):
        return Answer.MASK
    if api.predicts_next(name):
        return Answer.NEXT
    raise UnsupportedError(
        f"{type(base).__name__} predicts no words, so it cannot answer a cloze task; load a masked, causal or "
        "encoder-decoder language model"
    )


@final
class Cloze:
    """A template, a verbalizer and how a base model answers: from rows to the scores of the labels.

    `base` is only asked what kind of model it is; the functions below take the model to run, with or without a prompt.
    Raises ConfigError where template, words and tokenizer do not go together.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        verbalizer: Verbalizer,
        word_score: str = "sum",
        loss: str = "labels",
    ) -> None:
        for name, value, known in (("word_score", word_score, WORD_SCORES), ("answer_loss", loss, ANSWER_LOSSES)):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        self.answer = answer_of(base)
        self.tokenizer = tokenizer
        self.template = template
        self.verbalizer = verbalizer
        self.words: WordTable = verbalizer.table(tokenizer, template.answer_after_blank)
        self.mean = word_score == "mean"
        self.answer_loss = loss
        self.decoder_start = _decoder_start(base, tokenizer) if self.answer is Answer.SENTINEL else ()

    def to_dict(self) -> dict[str, Any]:
        """What a saved prompt needs beside its tensors."""
        score = "mean" if self.mean else "sum"
        own = {"template": self.template.text, "word_score": score, "answer_loss": self.answer_loss}
        return own | self.verbalizer.to_dict()

    def encode(self, examples: Sequence[ClozeExample], max_length: int | None = None) -> list[EncodedCloze]:
        """Rows of at most `max_length` tokens, with room for the longest word; fields are cut to fit."""
        labels = [self.verbalizer.index(e.label, e.where) if e.label else -1 for e in examples]
        room = max_length
        if max_length is not None and self.answer is Answer.NEXT:
            room = max_length - (self.words.longest - 1)
        rows = encode_rows(self.template, self.tokenizer, [example.fields for example in examples], room, self.answer,
                           self.words.longest, [example.where for example in examples])  # fmt: skip
        return [EncodedCloze(row, label) for row, label in zip(rows, labels, strict=True)]

    def scores(self, model: nn.Module, rows: Sequence[EncodedCloze]) -> Tensor:
        """Log-scores of every label, `[B, labels]`, float32."""
        count = len(self.words.ids)
        words = self.word_scores(model, rows, [list(range(count))] * len(rows))
        return self.words.label_scores(words.view(len(rows), count))

    def loss(self, model: nn.Module, rows: Sequence[EncodedCloze]) -> Tensor:
        """Mean over the rows of −log P(label | labels), or with "vocabulary" of −log P(its words | all tokens).

        DataError for a row without a label.
        """
        if any(row.label < 0 for row in rows):
            raise DataError("a row has no label, or none that is a candidate, so there is nothing to learn; drop it")
        if self.answer_loss == "labels":
            target = torch.tensor([row.label for row in rows])
            scores = self.scores(model, rows)
            return nn.functional.cross_entropy(scores, target.to(scores.device))
        wanted = [self.words.of_label(row.label) for row in rows]
        parts = self.word_scores(model, rows, wanted).split([len(words) for words in wanted])
        return -torch.stack([part.logsumexp(0) - part.new_tensor(len(part)).log() for part in parts]).mean()

    def word_scores(self, model: nn.Module, rows: Sequence[EncodedCloze], wanted: Sequence[Sequence[int]]) -> Tensor:
        """Log-scores of the wanted words of each row, one after the other, `[Σ words]`, float32."""
        sequences: list[tuple[int, tuple[int, ...]]] = []
        host: list[int] = []
        for place, words in enumerate(wanted):
            found, of_word = self._continuations(words)
            host += [len(sequences) + number for number in of_word]
            sequences += [(place, tokens) for tokens in found]
        ids = [self.words.ids[word] for words in wanted for word in words]
        logs = torch.cat([self._token_logs(model, rows, sequences[start : start + CHUNK])
                          for start in range(0, len(sequences), CHUNK)])  # fmt: skip
        width = logs.shape[1]
        check_tokens([token for word in ids for token in word], logs.shape[2], self.tokenizer)
        index = torch.tensor([[*word, *[0] * (width - len(word))] for word in ids], device=logs.device)
        there = torch.tensor([[place < len(word) for place in range(width)] for word in ids], device=logs.device)
        picked = logs[torch.tensor(host, device=logs.device)[:, None], torch.arange(width, device=logs.device), index]
        total = picked.masked_fill(~there, 0.0).sum(1)
        return total / there.sum(1) if self.mean else total

    def _continuations(self, words: Sequence[int]) -> tuple[list[tuple[int, ...]], list[int]]:
        """What has to follow a row so that all words can be read off, and which of these each word is read from.

        At masks nothing follows. Else a word needs all its tokens but the last, and a continuation that begins with
        those will do.
        """
        if self.answer is Answer.MASK:
            return [()], [0] * len(words)
        found: list[tuple[int, ...]] = []
        number: dict[tuple[int, ...], int] = {}
        for tokens in sorted({self.words.ids[word][:-1] for word in words}, reverse=True):  # longer before its start
            if not found or found[-1][: len(tokens)] != tokens:
                found.append(tokens)
            number[tokens] = len(found) - 1
        return found, [number[self.words.ids[word][:-1]] for word in words]

    def _token_logs(
        self, model: nn.Module, rows: Sequence[EncodedCloze], sequences: Sequence[tuple[int, tuple[int, ...]]]
    ) -> Tensor:
        """Log-probabilities of all tokens from the answer on, `[S, L, V]`, for L tokens of the longest word.

        Columns behind a sequence's own end are never read.
        """
        batch = self._batch(rows, sequences)
        device = place_of(model)
        start = batch.pop("answer_position").to(device)
        logits = model(**batch_on(model, batch)).logits
        columns = (start[:, None] + torch.arange(self.words.longest, device=device)).clamp(max=logits.shape[1] - 1)
        rows_index = torch.arange(len(sequences), device=device)[:, None]
        return logits[rows_index, columns].float().log_softmax(-1)

    def _batch(
        self, rows: Sequence[EncodedCloze], sequences: Sequence[tuple[int, tuple[int, ...]]]
    ) -> dict[str, Tensor]:
        """Inputs of the model for rows with continuations, padded on the right; `answer_position` `[S]` beside them."""
        pad = self.tokenizer.pad_token_id if isinstance(self.tokenizer.pad_token_id, int) else 0
        if self.answer is Answer.NEXT:
            longer = [
                TemplateRow(row.input_ids + list(tokens), row.slots + [-1] * len(tokens), row.answer_position)
                for row, tokens in ((rows[place].row, tokens) for place, tokens in sequences)
            ]
            return collate_rows(longer, pad)
        batch = collate_rows([rows[place].row for place, _ in sequences], pad)
        if self.answer is Answer.SENTINEL:
            width = len(self.decoder_start) + max(len(tokens) for _, tokens in sequences)
            written = [[*self.decoder_start, *tokens] for _, tokens in sequences]
            batch["decoder_input_ids"] = torch.tensor([ids + [pad] * (width - len(ids)) for ids in written])
            batch["answer_position"] = torch.full((len(sequences),), len(self.decoder_start) - 1)
        return batch


def _decoder_start(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the decoder has written before its answer: its start token, a forced first one, and T5's sentinel."""
    config: Any = base.config
    generation: Any = base.generation_config
    start = config.decoder_start_token_id
    start = start if start is not None else generation.decoder_start_token_id if generation is not None else None
    if start is None:
        raise ConfigError(f"{type(base).__name__} names no decoder_start_token_id; set it in the model's config")
    forced = generation.forced_bos_token_id if generation is not None else None
    sentinel = sentinel_id(tokenizer)
    ids = [start, forced, sentinel if sentinel != tokenizer.mask_token_id else None]
    return tuple(number for number in ids if number is not None)
