"""Log-probabilities of the labels instead of logits: what TRL's trainers ask a model for, and make their loss of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softprompt.call import Call
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.prompt import Embeddings, spread
from softprompt.running.first_loss import IGNORED, First, without_first
from softprompt.transformers_api import ModelOutput

if TYPE_CHECKING:
    from softprompt.running import Run

_NAMES = ("log_probs", "entropy", "is_top1", "label_mask")


@dataclass
class TokenScores(ModelOutput):
    """Of every label, `[B, S]`, zero where one does not count: its log-probability, the entropy of what predicts it,
    whether it is the likeliest, and whether it counts (`label_mask`).

    The labels of first tokens, which a virtual token predicts, are among them. `loss` is their mean, or their sum over
    `num_items_in_batch`; `aux_loss` is what a mixture of experts adds to it, for the caller to weigh.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def token_scores(base: nn.Module, run: "Run | None", call: Call) -> TokenScores:
    """The scores of a row's labels with the prompt of a `run`; None: the `base` model's alone.

    ConfigError where not every token has a label; UnsupportedError where a loss is more than the row's labels.
    """
    if not call.labels_tokens:
        raise ConfigError("scores per token need a label for every token of whole rows; pass labels, and no cache.")
    items = call.rest.get("num_items_in_batch")
    call = call.less("num_items_in_batch").without_cache()
    if run is None:
        output = base(**call.but(labels=None).keywords(base))
        parts = _shifted(output.logits, call.labels)
    elif isinstance(run.prompt, Embeddings) and run.prompt.context is not None:
        raise UnsupportedError(
            "this prompt's loss counts the answers in the prompt, which scores per token have no place for; train it "
            "with transformers' Trainer, or prompt_tuning here."
        )
    else:
        output, parts = _folded(run, call) if run.folds and run.facts.causal else _in_rows(run, call)
    scores = TokenScores(**dict(zip(_NAMES, parts, strict=True)), aux_loss=output.get("aux_loss"))
    counted = scores.label_mask.sum().clamp(min=1) if items is None else items  # pyright: ignore[reportOptionalMemberAccess]
    scores.loss = -parts[0].sum() / counted
    return scores


def _folded(run: "Run", call: Call) -> tuple[Any, Parts]:
    folded = run.predicting()
    rest, first = without_first(call, folded, divides=False)
    labels = rest.labels
    output = run.way.call(folded.kv, rest.but(labels=None))
    parts = _shifted(output.logits, labels)
    if folded.logits is None:
        return output, parts
    logits = first.of(spread(folded.logits, folded.kv.rows, len(labels)))
    firsts = _placed(first, logits, labels)
    both = [torch.cat(pair, dim=1) for pair in zip(firsts, parts, strict=True)]
    return output, (both[0], both[1], both[2], both[3])


def _in_rows(run: "Run", call: Call) -> tuple[Any, Parts]:
    """With vectors in the rows, in whose order the scores are."""
    call, _ = run.placed(call.with_mask(), run.vectors, "right")
    output = run.way.call(run.kv, call.but(labels=None))
    return output, _shifted(output.logits, call.labels)


def _shifted(logits: Tensor, labels: Tensor) -> Parts:
    """The scores `[B, S − 1]` of `labels` `[B, S]`, each predicted by the column before."""
    return _scores(logits[:, :-1], labels[:, 1:])


def _scores(logits: Tensor, labels: Tensor) -> Parts:
    """Of `labels` `[B, S]` under `logits` `[B, S, V]`; a softmax is taken of those alone that count."""
    mask = labels.ne(IGNORED)
    log_probs, chosen = logits[mask].float().log_softmax(-1), labels[mask]
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        top = log_probs.argmax(-1) == chosen
    found = log_probs.gather(-1, chosen[:, None])[:, 0]
    score, entropies, tops = (each.new_zeros(mask.shape).masked_scatter(mask, each) for each in (found, entropy, top))
    return score, entropies, tops, mask


def _placed(first: First, logits: Tensor, labels: Tensor) -> Parts:
    """The scores of first tokens, which `logits` `[M, V]` predict, where those stand in `labels` `[B, T]`."""
    parts = _scores(logits[:, None], first.labels[:, None])
    score, entropy, top, mask = (part.new_zeros(labels.shape).index_put(first.places, part[:, 0]) for part in parts)
    return score, entropy, top, mask
