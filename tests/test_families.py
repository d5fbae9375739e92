"""The tiny families are worth testing with: seeded, quick, logits neither flat nor saturated, every head they claim."""

from __future__ import annotations

import families
import pytest
import tiny
import torch

CELLS = [(name, task) for name, family in families.FAMILIES.items() for task in family.tasks]


@pytest.mark.pairwise
@pytest.mark.parametrize(("family", "task"), CELLS)
def test_outputs_are_seeded_and_not_degenerate(family: str, task: str) -> None:
    batch = tiny.ragged((4, 6))
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][batch["attention_mask"].cumsum(1) == batch["attention_mask"].sum(1, keepdim=True)] = tiny.EOS
    batch["input_ids"][batch["attention_mask"] == 0] = tiny.PAD
    if families.FAMILIES[family].kind == "encoder-decoder" and task in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        batch["decoder_input_ids"] = tiny.ragged((3, 3), seed=1)["input_ids"]
    with torch.no_grad():
        first, again = (families.build(family, task)(**batch)[0] for _ in range(2))
        other = families.build(family, task, seed=1)(**batch)[0]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert 0.05 < first.float().std(-1).mean() < 20


def test_every_kind_and_task_is_there() -> None:
    kinds = {family.kind for family in families.FAMILIES.values()}
    assert kinds == {"decoder", "encoder", "encoder-decoder", "recurrent", "hybrid", "multimodal"}
    assert {task for _, task in CELLS} == set(families.HEADS)
