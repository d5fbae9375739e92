"""Fold: on a causal model a prompt in front depends on no row, so its keys and values are computed once.

This is exact: the layers see p virtual tokens at positions 0…p−1, as if they stood before every row.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompt.elsewhere import at_hand, gather_for, word_table
from softprompt.facts import record
from softprompt.injection.contract import Way
from softprompt.injection.scope import Recording
from softprompt.prompt import KV, Embeddings


@dataclass(frozen=True)
class Folded:
    """Prompts as keys and values, and what their last virtual tokens predict.

    `logits` `[N, V]` are for each row's first token: the last virtual token sees no row either, so they are computed
    once as well. None where nothing predicts words; `predicts` says of which prompts they are (None: of all).
    `context`: a loss would have to count answers in the prompt too, for which these logits are not enough.
    """

    kv: KV
    logits: Tensor | None = None
    predicts: tuple[bool, ...] | None = None
    context: bool = False

    def detach(self) -> "Folded":
        return replace(self, kv=self.kv.detach(), logits=None if self.logits is None else self.logits.detach())


def fold(way: Way, prompt: Embeddings) -> KV:
    """Run the virtual tokens `[N, p, d]` through the model's body once, with gradient, and keep what they leave."""
    recording, _ = record(way, _inputs(way, prompt))
    gather_for(way.base, recording.modules, recording.layers)
    return KV(tuple(recording.layers), rows=prompt.rows, lengths=prompt.lengths)


def fold_and_predict(way: Way, prompt: Embeddings) -> Folded:
    """The same through the whole model, with what the last virtual tokens predict; only the body if it has no words."""
    if way.base.get_output_embeddings() is None:
        return Folded(fold(way, prompt))
    kv, logits = fold_with_logits(way, prompt, 1)
    lengths = prompt.lengths
    return Folded(kv, logits[:, -1], None if lengths is None or all(lengths) else tuple(map(bool, lengths)))


def fold_with_logits(way: Way, prompt: Embeddings, keep: int | Tensor) -> tuple[KV, Tensor]:
    """The same with the logits `[N, m, V]` of the last `keep` virtual tokens, or of those in the columns `[m]`."""
    recording, inputs = Recording(), _inputs(way, prompt)
    if way.keeps_logits:
        inputs["logits_to_keep"] = keep
    with at_hand(way.base), way.recorded(recording):
        logits = way.base(**inputs, use_cache=False, return_dict=True).logits
    gather_for(way.base, recording.modules, recording.layers)
    kv = KV(tuple(recording.layers), rows=prompt.rows, lengths=prompt.lengths)
    return kv, logits if way.keeps_logits else logits[:, slice(-keep, None) if isinstance(keep, int) else keep]


def _inputs(way: Way, prompt: Embeddings) -> dict[str, Any]:
    vectors = prompt.vectors.to(word_table(way.base))
    inputs: dict[str, Any] = {"inputs_embeds": vectors}
    positions = torch.arange(prompt.length, device=vectors.device)[None]
    if prompt.lengths is not None:  # shorter prompts have their padding in front
        padding = prompt.length - torch.tensor(prompt.lengths, device=vectors.device)[:, None]
        inputs["attention_mask"] = (positions >= padding).long()
        positions = (positions - padding).clamp(min=0)
    if way.takes_positions:
        inputs["position_ids"] = positions + way.position_offset
    return inputs
