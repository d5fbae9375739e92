"""The loss of each row's first token, which the last virtual token predicts: computed once, whatever the batch.

The virtual tokens see no row, so neither does what the last of them predicts. It adds to the model's own loss over the
rows as they are; nothing of the prompt has to stand in them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from softprompt.fold import Folded
from softprompt.prompt import spread

IGNORED = -100


def first_columns(labels: Tensor, mask: Any) -> Tensor:
    """The column of each row's first real token, `[B, 1]`; the first one where no 2-D mask says otherwise."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.ne(0).to(torch.int8).argmax(dim=1, keepdim=True).to(labels.device)
    return labels.new_zeros(labels.shape[0], 1)


def without_first(inputs: dict[str, Any], folded: Folded, divides: bool) -> tuple[dict[str, Any], Tensor]:
    """The inputs whose loss leaves the first real token of each row out, and the labels `[B]` of those tokens.

    A row whose prompt predicts nothing has none. A model that `divides` its loss as it is told is told all labels, so
    that its loss and the first tokens' add up.
    """
    labels = inputs["labels"]
    columns = first_columns(labels, inputs.get("attention_mask"))
    first = labels.gather(1, columns)[:, 0]
    if folded.predicts is not None:
        predicts = spread(torch.tensor(folded.predicts, device=labels.device), folded.kv.rows, len(first))
        first = first.masked_fill(~predicts, IGNORED)
    rest = labels.scatter(1, columns, IGNORED)
    changed = {**inputs, "labels": rest}
    if divides and inputs.get("num_items_in_batch") is None:
        changed["num_items_in_batch"] = rest.ne(IGNORED).sum() + first.ne(IGNORED).sum()
    return changed, first


def with_first_loss(
    output: Any, base: PreTrainedModel, logits: Tensor, first: Tensor, rest: dict[str, Any], divides: bool
) -> Any:
    """The output with the loss of the labels `first` `[B]` added, which `logits` `[B, V]` predict.

    `rest` are the inputs of the output. A mean that the model has taken by itself becomes the mean over all labels.
    """
    both = torch.stack([torch.full_like(first, IGNORED), first], dim=1)
    items = rest.get("num_items_in_batch")
    logits = logits[:, None].repeat(1, 2, 1)
    if divides:
        loss = base.loss_function(logits=logits, labels=both, vocab_size=logits.shape[-1], num_items_in_batch=items)
        output["loss"] = output["loss"] + loss
        return output
    others, firsts = rest["labels"][:, 1:].ne(IGNORED).sum(), first.ne(IGNORED).sum()
    total = cross_entropy(logits[:, 0].float(), first, ignore_index=IGNORED, reduction="sum")
    output["loss"] = (output["loss"] * others).where(others > 0, 0) + total
    output["loss"] = output["loss"] / (others + firsts)
    return output
