"""The loss of each row's first token, which the last virtual token predicts: computed once, whatever the batch.

The virtual tokens see no row, so neither does what the last of them predicts. It adds to the model's own loss over the
rows as they are; nothing of the prompt has to stand in them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from softprompt.call import Call
from softprompt.fold import Folded
from softprompt.prompt import spread

IGNORED = -100


@dataclass(frozen=True)
class First:
    """The tokens that virtual tokens predict: `labels` `[M]`, −100 where one does not count, and their `columns` `[M]`.

    `rows` `[M]` is None where each row has one, in order; a row of several sequences has one for each of them.
    """

    labels: Tensor
    columns: Tensor
    rows: Tensor | None = None

    def of(self, values: Tensor) -> Tensor:
        """What belongs to each of them, of `values` `[B, …]` that belong to the rows."""
        return values if self.rows is None else values[self.rows]

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each."""
        rows = torch.arange(len(self.columns), device=self.columns.device) if self.rows is None else self.rows
        return rows, self.columns


def first_tokens(call: Call) -> First:
    """The first token of each row, or of each sequence where a row holds several (its positions start again).

    Where one begins is transformers' rule for what a token may see: wherever a position is not the one before plus 1.
    """
    labels = call.labels
    if not call.packed:
        columns = first_columns(labels, call.mask)
        return First(labels.gather(1, columns)[:, 0], columns[:, 0])
    positions, begins = call.positions, torch.ones_like(labels, dtype=torch.bool)
    assert positions is not None
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    rows, columns = begins.nonzero(as_tuple=True)
    return First(labels[rows, columns], columns, rows)


def first_columns(labels: Tensor, mask: Any) -> Tensor:
    """The column of each row's first real token, `[B, 1]`; the first one where no 2-D mask says otherwise."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.ne(0).to(torch.int8).argmax(dim=1, keepdim=True).to(labels.device)
    return labels.new_zeros(labels.shape[0], 1)


def without_first(call: Call, folded: Folded, divides: bool) -> tuple[Call, First]:
    """The call whose loss leaves the first real token of each sequence out, and those tokens.

    A row whose prompt predicts nothing has none. A model that `divides` its loss as it is told is told all labels, so
    that its loss and the first tokens' add up.
    """
    labels, first = call.labels, first_tokens(call)
    if folded.predicts is not None:
        predicts = spread(torch.tensor(folded.predicts, device=labels.device), folded.kv.rows, len(labels))
        first = replace(first, labels=first.labels.masked_fill(~first.of(predicts), IGNORED))
    rest = labels.index_put(first.places, labels.new_tensor(IGNORED))
    changed = call.but(labels=rest)
    if divides and call.rest.get("num_items_in_batch") is None:
        changed = changed.plus(num_items_in_batch=rest.ne(IGNORED).sum() + first.labels.ne(IGNORED).sum())
    return changed, first


def with_first_loss(
    output: Any, base: PreTrainedModel, logits: Tensor, first: Tensor, rest: Call, divides: bool
) -> Any:
    """The output with the loss of the labels `first` `[M]` added, which `logits` `[M, V]` predict.

    `rest` is the call of the output. A mean that the model has taken by itself becomes the mean over all labels.
    """
    both = torch.stack([torch.full_like(first, IGNORED), first], dim=1)
    items = rest.rest.get("num_items_in_batch")
    logits = logits[:, None].repeat(1, 2, 1)
    if divides:
        loss = base.loss_function(logits=logits, labels=both, vocab_size=logits.shape[-1], num_items_in_batch=items)
        output["loss"] = output["loss"] + loss
        return output
    others, firsts = rest.labels[:, 1:].ne(IGNORED).sum(), first.ne(IGNORED).sum()
    total = cross_entropy(logits[:, 0].float(), first, ignore_index=IGNORED, reduction="sum")
    output["loss"] = (output["loss"] * others).where(others > 0, 0) + total
    output["loss"] = output["loss"] / (others + firsts)
    return output
