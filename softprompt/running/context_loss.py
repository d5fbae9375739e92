"""The loss of a prompt that is itself a text with answers: the row's labels, and the answers in the prompt.

L = 1/N · Σ w_i · CE(x_i), over the N label tokens of all rows, those in the prompt counted in each row; w = γ^j for the
j-th answer from the end, the row's own being the last (CPT, https://arxiv.org/abs/2410.17222).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from softprompt.call import Call
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.fold import fold_with_logits
from softprompt.injection.input_vectors import Placement
from softprompt.prompt import Context, Embeddings
from softprompt.running.first_loss import IGNORED, first_columns

if TYPE_CHECKING:
    from softprompt.running import Run

KINDS = 4  # a token's type modulo this is its kind; 0 is an answer
_ROWS_ALONE: ContextVar[bool] = ContextVar("softprompt_rows_alone", default=False)


@contextmanager
def rows_alone() -> Iterator[None]:
    """Inside the block a loss is of the rows' labels alone: held-out loss, which prompts are compared by."""
    token = _ROWS_ALONE.set(True)
    try:
        yield
    finally:
        _ROWS_ALONE.reset(token)


def forward_with_context(run: "Run", prompt: Embeddings, call: Call) -> Any:
    """The model's output over real tokens, its loss with the context's answers in it.

    `input_type_mask` `[B, T]`, where it is given, says which of the row's tokens are answers; else all are that have a
    label. ConfigError for rows of several sequences, and for labels that do not begin with the row.
    """
    assert prompt.context is not None
    types, labels = call.rest.get("input_type_mask"), call.labels
    call = call.less("input_type_mask")
    plain = replace(run, prompt=replace(prompt, context=None))
    if labels is None or (_ROWS_ALONE.get() and types is None):
        return plain.forward(call)
    if not call.labels_tokens or call.packed:
        raise ConfigError(
            "this prompt's loss takes one whole sequence per row, with a label for every token and no cache; give the "
            "rows an attention_mask, and leave the cache out."
        )
    if call.beyond_text:
        raise UnsupportedError(
            "this prompt's loss counts a text's answers, and rows with images or other media cannot have it; train "
            "prompt_tuning on them."
        )
    if types is not None and types.shape != labels.shape:
        raise ConfigError(
            f"input_type_mask has shape {tuple(types.shape)}, labels {tuple(labels.shape)}; give one each."
        )
    items = call.rest.get("num_items_in_batch")
    call = call.but(labels=None).less("num_items_in_batch").with_mask(always=True).without_cache()
    predicting = predicting_tokens(prompt.context)
    if plain.folds:
        kv, virtual = fold_with_logits(run.way, Embeddings(prompt.vectors), predicting)
        placement = Placement(None, labels.shape[1])
        columns = first_columns(labels, call.mask)
    else:
        kv, virtual, columns = None, None, torch.zeros_like(labels[:, :1])
        call, placement = plain.placed(call.but(labels=labels), prompt, "right")
        arranged, call = call.labels[:, prompt.length :], call.but(labels=None)
        if types is not None and placement.columns is not None:
            order = (placement.columns - prompt.length).argsort(dim=1)
            types = types.gather(1, order)
        labels = arranged
    output = run.way.call(kv, call)
    logits = output.logits
    if virtual is None:
        virtual, logits = logits[:, predicting], logits[:, prompt.length :]
    loss = context_loss(prompt.context, virtual, logits, columns, labels, types, items)
    return placement.restore(type(output)(**{**output, "loss": loss}))  # a new one, in which the loss comes first


def context_loss(
    context: Context,
    virtual: Tensor,
    logits: Tensor,
    first: Tensor,
    labels: Tensor,
    types: Tensor | None = None,
    items: Tensor | int | None = None,
) -> Tensor:
    """The loss, a scalar.

    `virtual` `[B|1, m, V]` are the logits of the m `predicting_tokens` and `logits` `[B, T, V]` those of the row, whose
    first token is in the column `first` `[B, 1]`. With `items`, the labels of all rows of one step, the result is these
    rows' share of the step's mean.
    """
    rows, count = labels.shape[0], len(context.ids)
    kinds, types = _joined(context, labels, types)
    weights = answer_weights(kinds, context.decay)
    of_prompt, of_row = weights[:, :count].expand(rows, -1), weights[:, count:].expand(rows, labels.shape[1])
    labels = labels.masked_fill((types == 0) | (types % KINDS != 0), IGNORED)
    rest = labels.scatter(1, first, IGNORED)  # the first token is predicted by the last virtual one
    total = (of_row.roll(-1, 1) * _losses(logits, pad(rest[:, 1:], (0, 1), value=IGNORED))).sum()
    of_first = _losses(virtual[:, -1:].expand(rows, -1, -1), labels.gather(1, first))
    total = total + (of_row.gather(1, first) * of_first).sum()
    answers = predicting_tokens(context)[:-1] + 1
    of_answers = _losses(virtual[:, :-1], context.ids[answers].expand(virtual.shape[0], -1))
    total = total + (of_prompt[:, answers] * of_answers).sum()
    own = (labels != IGNORED).sum()
    mean = total / (own + rows * len(answers))
    return mean if items is None else mean * own / items


def predicting_tokens(context: Context) -> Tensor:
    """The virtual tokens `[m]` that something counted follows: a token of an answer or, the last one, a row."""
    counted = (context.types > 0) & (context.types % KINDS == 0)
    counted = torch.cat([counted[1:], counted.new_ones(1)])
    return counted.nonzero()[:, 0]


def answer_weights(kinds: Tensor, decay: float) -> Tensor:
    """γ^j `[B, S]` for tokens of types `kinds` `[B, S]`, j the number of the row's answers with a greater type."""
    is_answer = (kinds > 0) & (kinds % KINDS == 0)
    is_answer[:, 0] = False  # nothing predicts the first token
    answer = torch.where(is_answer, kinds // KINDS, 0)
    there = torch.zeros(kinds.shape[0], int(answer.max()) + 1, device=kinds.device)
    there.scatter_(1, answer, 1.0)
    later = there.flip(1).cumsum(1).flip(1) - there
    return torch.where(is_answer, decay ** later.gather(1, answer), 1.0)


def _joined(context: Context, labels: Tensor, types: Tensor | None) -> tuple[Tensor, Tensor]:
    """Types of the prompt's and the row's tokens, `[1, p+1]` or `[B, p+T]`, and of the row's alone.

    The row's follow the prompt's. PEFT adds the greatest of the prompt's, which makes answers of other tokens where
    that is no answer itself; here it is rounded up to one.
    """
    last = -(-int(context.types.max()) // KINDS) * KINDS
    own = context.types[None]
    if types is None:
        row = torch.full_like(own[:, :1], last + KINDS)
    else:
        row = torch.where(types > 0, types.to(own) + last, 0)
    return torch.cat([own.expand(row.shape[0], -1), row], dim=1), row


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy `[B, S]` of `logits` `[B, S, V]`, 0 where the target is −100."""
    flat = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(targets.shape)
