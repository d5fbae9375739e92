"""Engines with too little room for all requests, and in less exact numbers; a process has one at a time."""

from __future__ import annotations

from pathlib import Path

import kit
import pytest
from kit import assert_same


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_preempted_requests_get_their_prompt_again(family: str, tmp_path: Path) -> None:
    """Twelve requests in room for three: some lose their blocks midway, and start again from their prompts."""
    with kit.engine(family, tmp_path, num_gpu_blocks_override=20, max_num_batched_tokens=64) as engine:
        free, before = engine.free_blocks, engine.metric("vllm:num_preemptions")
        names = ["prefix_tuning", "p_tuning", None, "prompt_tuning"]
        rows = [(names[number % 4], ids) for number, ids in enumerate(kit.texts(12, (20, 33), seed=4))]
        for (name, ids), found in zip(rows, engine.ask(rows, 70), strict=True):
            assert_same(found, engine.expect(name, ids, 70))
        assert engine.metric("vllm:num_preemptions") > before
        assert engine.free_blocks == free


def test_bfloat16(tmp_path: Path) -> None:
    """Both compute with eight bits of mantissa, in another order."""
    with kit.engine("llama", tmp_path, dtype="bfloat16") as engine:
        for name in engine.names():
            for ids in kit.texts(2, (9, 40), seed=5):
                found, expected = engine.ask([(name, ids)], 1)[0], engine.expect(name, ids, 1)
                shared = set(found.top[0]) & set(expected.top[0])
                assert len(shared) >= 3
                assert max(abs(found.top[0][token] - expected.top[0][token]) for token in shared) < 0.15
