"""Losses and logits that a model's own head would get wrong where a prompt or padding stands beside the real tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt.call import Call

SPANS = (("start_positions", "start_logits"), ("end_positions", "end_logits"))


def real_columns(call: Call, slots: Tensor | None) -> Tensor | None:
    """Which columns `[B, T]` hold the caller's own tokens; None where all do."""
    mask = call.flat_mask
    real = None if mask is None else mask != 0
    if slots is None:
        return real
    words = slots < 0
    return words if real is None else real & words.to(real.device)


def with_span_loss(output: Any, call: Call, slots: Tensor | None = None) -> Any:
    """The output with the loss of the given answer spans, the mean cross-entropy of start and end over real tokens.

    A head of its own takes the softmax over all columns, padding and virtual tokens too. A span outside the real tokens
    counts nowhere (all of them: the loss is not a number), as in transformers. Other outputs stay as they are.
    """
    if any(call.rest.get(position) is None or output.get(logits) is None for position, logits in SPANS):
        return output
    real = real_columns(call, slots)
    losses = [_column_loss(output[logits], call.rest[position], real) for position, logits in SPANS]
    output["loss"] = torch.stack(losses).mean()
    return output


def with_kept_logits(output: Any, keep: int | Tensor) -> Any:
    """The output with the logits of the last `keep` columns (0: all), or of the columns `keep` `[K]`, alone."""
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    output["logits"] = output["logits"][:, columns]
    return output


def _column_loss(logits: Tensor, columns: Tensor, real: Tensor | None) -> Tensor:
    """Mean cross-entropy of the right columns `[B]` or `[B, 1]` under `logits` `[B, T]`, those that are real."""
    real = torch.ones_like(logits, dtype=torch.bool) if real is None else real.to(logits.device)
    columns = columns.to(logits.device).flatten()
    known = (columns >= 0) & (columns < logits.shape[1])
    known &= real.gather(1, columns.where(known, 0)[:, None])[:, 0]
    scores = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
    return cross_entropy(scores, columns.where(known, -100), ignore_index=-100)
