"""What a prompt is worth: held-out loss, generated text against its references, and accuracy.

All functions take any causal (or sequence classification) model, with or without a soft prompt, so that the frozen
model is measured by the same code. Nothing is trained and no gradient is kept; the model's mode is put back.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softprompt.cloze import Cloze, EncodedCloze
from softprompt.data import IGNORED, Encoded, EncodedLabel, Example, collate, input_rows, source_rows
from softprompt.elsewhere import batch_on
from softprompt.errors import DataError
from softprompt.running.context_loss import rows_alone


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    training = [module for module in model.modules() if module.training]  # a frozen base may stay in eval mode
    model.eval()
    try:
        with torch.no_grad(), rows_alone():
            yield
    finally:
        for module in training:
            module.training = True


def _batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: little padding, and too large a batch fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def evaluate_loss(model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> dict[str, float]:
    """`loss` in nats per target token (every token counts the same, whatever its batch), `perplexity`, `tokens`.

    Rows begin with at least one token of input, as `encode` makes them.
    """
    if not encoded:
        raise DataError("there are no examples to evaluate; give at least one")
    total, tokens = 0.0, 0
    with _evaluating(model):
        for places in _batches_by_length([len(row.input_ids) for row in encoded], batch_size):
            batch = collate([encoded[place] for place in places], pad_id=0)
            count = int((batch["labels"] != IGNORED).sum())
            loss = model(**batch_on(model, batch)).loss
            total, tokens = total + float(loss) * count, tokens + count
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def evaluate_accuracy(
    model: nn.Module, encoded: Sequence[EncodedLabel], batch_size: int = 32, pad_id: int = 0
) -> dict[str, float]:
    """`accuracy` (0 to 1) and mean cross-entropy `loss` in nats per row of a model with logits [B, classes]."""
    if not encoded:
        raise DataError("there are no examples to evaluate; give at least one")
    total, right = 0.0, 0
    with _evaluating(model):
        for places in _batches_by_length([len(row.input_ids) for row in encoded], batch_size):
            batch = batch_on(model, collate([encoded[place] for place in places], pad_id))
            labels = batch.pop("labels")
            logits: Tensor = model(**batch).logits.float()
            total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
    return {"accuracy": right / len(encoded), "loss": total / len(encoded), "rows": len(encoded)}


def predict_labels(
    model: nn.Module, encoded: Sequence[EncodedLabel], batch_size: int = 32, pad_id: int = 0
) -> list[int]:
    """The likeliest class of each text, in their order."""
    found = [0] * len(encoded)
    with _evaluating(model):
        for places in _batches_by_length([len(row.input_ids) for row in encoded], batch_size):
            batch = batch_on(model, collate([encoded[place] for place in places], pad_id))
            del batch["labels"]
            for place, label in zip(places, model(**batch).logits.argmax(-1).tolist(), strict=True):
                found[place] = label
    return found


def evaluate_cloze(
    model: nn.Module, cloze: Cloze, encoded: Sequence[EncodedCloze], batch_size: int = 32
) -> dict[str, float]:
    """`accuracy` among the labels (P@1 among candidates, named `p_at_1`), `majority` and `loss` in nats per row.

    `majority` is the share of the commonest label: what always answering it would score. A row whose answer is none of
    the candidates counts as wrong and has no loss; `outside` says how many there are, and `cut` how many rows were too
    long. The loss is of the kind that is trained on.
    """
    if not encoded:
        raise DataError("there are no examples to evaluate; give at least one")
    scores = _cloze_scores(model, cloze, encoded, batch_size)
    labels = torch.tensor([row.label for row in encoded])
    known, counts = labels >= 0, labels[labels >= 0].bincount()
    if not bool(known.any()):
        raise DataError("no answer in the data is one of the candidates; give candidates that hold the answers")
    logs = scores.log_softmax(-1) if cloze.answer_loss == "labels" else scores
    right = int((scores.argmax(-1) == labels).sum())
    share = "accuracy" if cloze.verbalizer.closed else "p_at_1"
    found: dict[str, float] = {
        share: right / len(encoded),
        "loss": float(-logs[known, labels[known]].mean()),
        "majority": int(counts.max()) / len(encoded),
        "rows": len(encoded),
    }
    remarks: dict[str, float] = {"outside": int((~known).sum()), "cut": sum(row.row.cut > 0 for row in encoded)}
    return found | {name: count for name, count in remarks.items() if count}


def predict_cloze(model: nn.Module, cloze: Cloze, encoded: Sequence[EncodedCloze], batch_size: int = 32) -> list[str]:
    """The likeliest label of each row, in their order."""
    places = _cloze_scores(model, cloze, encoded, batch_size).argmax(-1).tolist()
    return [cloze.verbalizer.labels[place] for place in places]


def _cloze_scores(model: nn.Module, cloze: Cloze, encoded: Sequence[EncodedCloze], batch_size: int) -> Tensor:
    """Log-scores of all labels, `[rows, labels]`, on the CPU."""
    scores = torch.empty(len(encoded), len(cloze.verbalizer.words))
    with _evaluating(model):
        for places in _batches_by_length([len(row.input_ids) for row in encoded], batch_size):
            scores[places] = cloze.scores(model, [encoded[place] for place in places]).cpu()
    return scores


def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str] | Sequence[Example],
    max_new_tokens: int = 64,
    batch_size: int = 16,
    **generation: Any,
) -> list[str]:
    """One text per input, in their order, stripped of surrounding blanks; left-padded batches, greedy by default.

    `generation` goes to the model's `generate` (`num_beams`, `do_sample`, `temperature`, …).
    """
    examples = [Example(text, ("",), where="the input") if isinstance(text, str) else text for text in inputs]
    encoder_decoder = bool(model.config.is_encoder_decoder)
    starts = (source_rows if encoder_decoder else input_rows)(examples, tokenizer)
    options = {"do_sample": False, "num_beams": 1, "pad_token_id": pad_id(tokenizer), **generation}
    texts = [""] * len(starts)
    with _evaluating(model):
        for places in _batches_by_length([len(ids) for ids, _ in starts], batch_size):
            rows = [
                Encoded(ids, ids, examples[place].task, slots) for place in places for ids, slots in [starts[place]]
            ]
            batch = collate(rows, pad_id(tokenizer), padding_side="left")
            width = 0 if encoder_decoder else batch["labels"].shape[1]
            del batch["labels"]
            output = model.generate(**batch_on(model, batch), max_new_tokens=max_new_tokens, **options)
            answers = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for place, answer in zip(places, answers, strict=True):
                texts[place] = answer.strip()
    return texts


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the end token's where the tokenizer has none for padding. Padded places are masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def score_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus `bleu` and `chrf` (0 to 100) by sacrebleu, each prediction against all of its references."""
    if len(predictions) != len(references) or not predictions:
        raise DataError(f"{len(predictions)} texts cannot be scored against {len(references)} sets of references")
    from sacrebleu.metrics.bleu import BLEU  # here because few commands score anything
    from sacrebleu.metrics.chrf import CHRF

    widest = max(len(texts) for texts in references)
    streams = [[texts[n].strip() if n < len(texts) else None for texts in references] for n in range(widest)]
    answers = [text.strip() for text in predictions]
    bleu = BLEU().corpus_score(answers, streams)  # pyright: ignore[reportArgumentType]  None fills missing references
    chrf = CHRF().corpus_score(answers, streams)  # pyright: ignore[reportArgumentType]
    return {"bleu": bleu.score, "chrf": chrf.score}
