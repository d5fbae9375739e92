"""Log-probabilities of the labels instead of logits: what TRL's trainers ask a model for, and make their loss of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from softprompt.call import Call
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.prompt import Embeddings, spread
from softprompt.running.first_loss import IGNORED, First, without_first
from softprompt.transformers_api import ModelOutput

if TYPE_CHECKING:
    from softprompt.running import Run

WANTED = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass
class TokenScores(ModelOutput):
    """Of every label, zero where one does not count: its log-probability, and of what predicts it the entropy, the
    logarithm of the sum of squared probabilities and the mean logit; whether it is the likeliest (the first of equals),
    and whether it counts (`label_mask`). What was not asked for is None. All but the first two are without gradient.

    With a prompt `[B, T]`, each where its label stands: the labels of first tokens, which a virtual token predicts, are
    among them. Without one `[B, T − 1]`, from the second label on. `loss` is minus the mean of the log-probabilities,
    or minus their sum over `num_items_in_batch`; `aux_loss` is what a mixture of experts adds to it, for the caller to
    weigh.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@final
@dataclass(frozen=True)
class Asked:
    """Which scores, by name, of logits divided by a temperature."""

    wanted: tuple[str, ...] = WANTED
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in self.wanted:
            if name not in WANTED:
                raise ConfigError(f"there is no score {name!r} of a token; there are {', '.join(WANTED)}.")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r} cannot divide logits; give a number above 0.")


Parts = dict[str, Tensor]


def token_scores(
    base: nn.Module,
    run: "Run | None",
    call: Call,
    wanted: Sequence[str] = WANTED,
    temperature: float = 1.0,
) -> TokenScores:
    """The scores of a row's labels with the prompt of a `run`; None: the `base` model's alone.

    ConfigError where not every token has a label, and for a name that no score has; UnsupportedError where a loss is
    more than the row's labels.
    """
    asked = Asked(tuple(wanted), temperature)
    if not call.labels_tokens:
        raise ConfigError("scores per token need a label for every token of whole rows; pass labels, and no cache.")
    items = call.rest.get("num_items_in_batch")
    call = call.less("num_items_in_batch").without_cache()
    if run is None:
        output = base(**call.but(labels=None).keywords(base))
        parts = _shifted(output.logits, call.labels, asked)
    elif isinstance(run.prompt, Embeddings) and run.prompt.context is not None:
        raise UnsupportedError(
            "this prompt's loss counts the answers in the prompt, which scores per token have no place for; train it "
            "with transformers' Trainer, or prompt_tuning here."
        )
    else:
        scored = _folded if run.folds and run.facts.causal else _in_rows
        output, parts = scored(run, call, asked)
    total, mask = parts["log_probs"].sum(), parts["label_mask"]
    kept = {name: parts[name] for name in parts if name in asked.wanted or name in ("log_probs", "label_mask")}
    scores = TokenScores(**kept, aux_loss=output.get("aux_loss"))
    scores.loss = -total / (mask.sum().clamp(min=1) if items is None else items)
    return scores


def _folded(run: "Run", call: Call, asked: Asked) -> tuple[Any, Parts]:
    folded = run.predicting()
    rest, first = without_first(call, folded, divides=False)
    labels = rest.labels
    output = run.way.call(folded.kv, rest.but(labels=None))
    parts = _in_place(_shifted(output.logits, labels, asked))
    if folded.logits is None:
        return output, parts
    logits = first.of(spread(folded.logits, folded.kv.rows, len(labels)))
    firsts = _placed(first, logits, labels, asked)
    return output, {name: torch.where(firsts["label_mask"], firsts[name], part) for name, part in parts.items()}


def _in_rows(run: "Run", call: Call, asked: Asked) -> tuple[Any, Parts]:
    """With vectors in the rows; the scores are where the caller's labels are."""
    call, placement = run.placed(call.with_mask(), run.vectors, "right")
    labels = call.labels
    output = run.way.call(run.kv, call.but(labels=None))
    parts = _in_place(_shifted(output.logits, labels, asked))
    columns = placement.columns
    if columns is None:
        return output, parts
    return output, {name: part.gather(1, columns.to(part.device)) for name, part in parts.items()}


def _in_place(parts: Parts) -> Parts:
    """Scores `[B, S − 1]` of all labels but the first, `[B, S]`: that one nothing predicts."""
    return {name: pad(part, (1, 0)) for name, part in parts.items()}


def _shifted(logits: Tensor, labels: Tensor, asked: Asked) -> Parts:
    """The scores `[B, S − 1]` of `labels` `[B, S]`, each predicted by the column before."""
    return _scores(logits[:, :-1], labels[:, 1:], asked)


def _scores(logits: Tensor, labels: Tensor, asked: Asked) -> Parts:
    """Of `labels` `[B, S]` under `logits` `[B, S, V]`; a softmax is taken of those alone that count."""
    mask = labels.ne(IGNORED)
    scaled, chosen = logits[mask].float() / asked.temperature, labels[mask]
    log_probs = scaled.log_softmax(-1)
    parts = {"log_probs": log_probs.gather(-1, chosen[:, None])[:, 0]}
    if "entropy" in asked.wanted:
        parts["entropy"] = _Entropy.apply(log_probs)
    with torch.no_grad():
        if "log_sum_sq_probs" in asked.wanted:
            parts["log_sum_sq_probs"] = (2 * log_probs).logsumexp(-1)
        if "mean_logits" in asked.wanted:
            parts["mean_logits"] = scaled.mean(-1)
        if "is_top1" in asked.wanted:
            parts["is_top1"] = log_probs.argmax(-1) == chosen
    found = {name: part.new_zeros(mask.shape).masked_scatter(mask, part) for name, part in parts.items()}
    return {**found, "label_mask": mask}


@final
class _Entropy(torch.autograd.Function):
    """The entropy `[N]` of log-probabilities `[N, V]`, which are all that it keeps: the softmax keeps them anyway.

    Trainers that do no more than report it then pay for nothing.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor) -> Tensor:
        ctx.save_for_backward(log_probs)
        return -(log_probs.exp() * log_probs).sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (log_probs,) = ctx.saved_tensors
        return -gradients[0][:, None] * log_probs.exp() * (log_probs + 1)


def _placed(first: First, logits: Tensor, labels: Tensor, asked: Asked) -> Parts:
    """The scores of first tokens, which `logits` `[M, V]` predict, where those stand in `labels` `[B, T]`."""
    parts = _scores(logits[:, None], first.labels[:, None], asked)
    return {name: part.new_zeros(labels.shape).index_put(first.places, part[:, 0]) for name, part in parts.items()}
