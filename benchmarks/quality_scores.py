"""What quality.py measures beyond the library's own scores, and how rows get text in their context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softprompt.cloze import EncodedCloze
from softprompt.data import IGNORED, Encoded, Example, collate, input_ids
from softprompt.evaluate import pad_id, score_texts
from softprompt.template import TemplateRow
from softprompt.train.batches import BatchOrder

if TYPE_CHECKING:
    from quality_bench import Bench


def rank(scores: Mapping[str, float]) -> tuple[float, float]:
    """Higher is better, as `softprompt train` keeps steps: accuracy where there is one, then a lower loss."""
    return (scores.get("accuracy", 0.0), -scores["loss"])


def score_answers(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU and chrF (sacrebleu) and mean ROUGE-L (F, best reference), 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, texts, strict=True)
    found = [scorer.score_multi(list(targets), text)["rougeL"].fmeasure for targets, text in pairs]
    return {**score_texts(texts, references), "rouge_l": 100 * sum(found) / len(found)}


@torch.no_grad()
def first_answers(model: nn.Module, rows: Sequence[Encoded], batch_size: int) -> float:
    """Share of rows whose every target token is the likeliest; the end token does not count."""
    model.eval()
    right = 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id=0)
        labels = batch.pop("labels")
        for row in labels:
            row[row.ne(IGNORED).nonzero()[-1]] = IGNORED
        logits: Tensor = model(**batch).logits[:, :-1]
        wanted = labels[:, 1:]
        right += int(((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(1).sum())
    return right / len(rows)


def in_context(rows: Sequence[Any], tokenizer: Any, text: str) -> list[Any]:
    """Rows with a text in front, behind the start token: plain tokens, no prompt."""
    before = input_ids([Example(text, ("",))], tokenizer)[0]
    start = tokenizer.bos_token_id
    return [_behind(row, before, 1 if row.input_ids[0] == start == before[0] else 0) for row in rows]


def _behind(row: Encoded | EncodedCloze, before: list[int], start: int) -> Encoded | EncodedCloze:
    """A row without its first `start` tokens, behind other tokens."""
    ids = before + row.input_ids[start:]
    if isinstance(row, Encoded):
        return Encoded(ids, [IGNORED] * len(before) + row.labels[start:])
    moved = row.row.answer_position + len(before) - start
    return replace(row, row=TemplateRow(ids, [-1] * len(ids), moved, row.row.cut))


def probe_accuracy(bench: Bench, seed: int, steps: int) -> float:
    """Logistic regression on the mean token vectors of the sentences that the other arms see in so many steps."""
    from sklearn.linear_model import LogisticRegression

    order = BatchOrder(bench.data.lengths, bench.task.batch, seed)
    numbers = {number for step in range(steps) for number in order[step]}
    encoder = bench.base(seed).base_model
    seen: list[Any] = [bench.data.train[number] for number in sorted(numbers)]
    asked: list[Any] = list(bench.test.held_out)
    vectors, wanted = (torch.cat(list(_means(encoder, rows, pad_id(bench.tokenizer)))) for rows in (seen, asked))
    middle, scale = vectors.mean(0), vectors.std(0) + 1e-6
    model = LogisticRegression(C=1.0, max_iter=1000)
    model.fit(((vectors - middle) / scale).numpy(), [row.label for row in seen])
    return float(model.score(((wanted - middle) / scale).numpy(), [row.label for row in asked]))


@torch.no_grad()
def _means(encoder: Any, rows: Sequence[Any], pad: int) -> Iterator[Tensor]:
    """Means over the real tokens of the encoder's last layer, `[b, d]`."""
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32], pad)
        batch.pop("labels")
        mask = batch["attention_mask"][..., None]
        yield (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
