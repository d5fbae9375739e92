"""Fold: on a causal model a prompt in front depends on no row, so its keys and values are computed once.

This is exact: the layers see p virtual tokens at positions 0…p−1, as if they stood before every row.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompt.doors.cache import Door
from softprompt.doors.opening import Recording
from softprompt.elsewhere import at_hand, gather_for, word_table
from softprompt.probe import record
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


def fold(door: Door, prompt: Embeddings) -> KV:
    """Run the virtual tokens `[N, p, d]` through the model's body once, with gradient, and keep what they leave."""
    recording, _ = record(door, _inputs(door, prompt))
    gather_for(door.base, recording.modules, recording.layers)
    return KV(tuple(recording.layers), rows=prompt.rows, lengths=prompt.lengths)


def fold_and_predict(door: Door, prompt: Embeddings) -> Folded:
    """The same through the whole model, with what the last virtual tokens predict; only the body if it has no words."""
    if door.base.get_output_embeddings() is None:
        return Folded(fold(door, prompt))
    kv, logits = fold_with_logits(door, prompt, 1)
    lengths = prompt.lengths
    return Folded(kv, logits[:, -1], None if lengths is None or all(lengths) else tuple(map(bool, lengths)))


def fold_with_logits(door: Door, prompt: Embeddings, keep: int | Tensor) -> tuple[KV, Tensor]:
    """The same with the logits `[N, m, V]` of the last `keep` virtual tokens, or of those in the columns `[m]`."""
    recording, inputs = Recording(), _inputs(door, prompt)
    if door.keeps_logits:
        inputs["logits_to_keep"] = keep
    with at_hand(door.base), door.open(None, recording):
        logits = door.base(**inputs, use_cache=False, return_dict=True).logits
    gather_for(door.base, recording.modules, recording.layers)
    kv = KV(tuple(recording.layers), rows=prompt.rows, lengths=prompt.lengths)
    return kv, logits if door.keeps_logits else logits[:, slice(-keep, None) if isinstance(keep, int) else keep]


def _inputs(door: Door, prompt: Embeddings) -> dict[str, Any]:
    vectors = prompt.vectors.to(word_table(door.base))
    inputs: dict[str, Any] = {"inputs_embeds": vectors}
    positions = torch.arange(prompt.length, device=vectors.device)[None]
    if prompt.lengths is not None:  # shorter prompts have their padding in front
        padding = prompt.length - torch.tensor(prompt.lengths, device=vectors.device)[:, None]
        inputs["attention_mask"] = (positions >= padding).long()
        positions = (positions - padding).clamp(min=0)
    if door.takes_positions:
        inputs["position_ids"] = positions + door.position_offset
    return inputs
