"""Engines with too little room for all requests, and in less exact numbers; a process has one at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import kit
import pytest
from kit import assert_same


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_preempted_requests_get_their_prompt_again(family: str, tmp_path: Path) -> None:
    """Twelve requests in room for three: some lose their blocks midway, and start again from their prompts."""
    base, prompts = kit.build(family), tmp_path / "prompts"
    for seed, method in enumerate(("prefix_tuning", "p_tuning", "prompt_tuning")):
        kit.save_prompt(base, kit.config_of(method), prompts / method, seed)
    kit.save_prompt(base, kit.config_of("prompt_tuning", 20, placement="after_bos"), prompts / "behind", 3)
    options = {"num_gpu_blocks_override": 20, "max_num_batched_tokens": 64, "enable_prompt_embeds": family == "llama"}
    names = ["prefix_tuning", "p_tuning", None, "behind" if family == "llama" else "prompt_tuning"]
    with kit.engine(family, tmp_path, prompts, **options) as engine:
        free, before = engine.free_blocks, engine.metric("vllm:num_preemptions")
        rows = [(names[number % 4], ids) for number, ids in enumerate(kit.texts(12, (20, 33), seed=4))]
        with engine.loads() as loads:
            answers = engine.ask(rows, 70)
        for (name, ids), found in zip(rows, answers, strict=True):
            assert_same(found, engine.expect(name, ids, 70))
        assert engine.metric("vllm:num_preemptions") > before
        assert max(Counter(load.request_id for load in loads).values()) > 1
        assert engine.free_blocks == free


def test_bfloat16(tmp_path: Path) -> None:
    """Both compute with eight bits of mantissa, in another order; heads of keys are shared by heads of queries."""
    with kit.engine("llama", tmp_path, dtype="bfloat16") as engine:
        assert engine.base.config.num_key_value_heads < engine.base.config.num_attention_heads
        rows = [(name, ids) for name in engine.names() for ids in kit.texts(2, (9, 40), seed=5)]
        same = [
            kit.assert_alike(found, engine.expect(name, ids, 8), 0.15)
            for (name, ids), found in zip(rows, engine.ask(rows, 8), strict=True)
        ]
        assert sum(same) > 4 * len(rows)
