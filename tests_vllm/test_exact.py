"""vLLM with a prompt answers what transformers answers with it: tokens and log-probabilities, one way and another."""

from __future__ import annotations

import kit
import pytest
from kit import assert_same
from vllm.distributed.kv_transfer import get_kv_transfer_group

from softprompt.errors import UnsupportedError
from softprompt.serve.vllm.entered import PLACEHOLDER
from softprompt.serve.vllm.marks import salt_of


def test_every_method_in_one_batch_cold_and_cached(engine: kit.Engine) -> None:
    """Lengths that are and are not multiples of the block; texts that come in chunks; rows without a prompt between."""
    rows = [(name, ids) for name in engine.names() for ids in kit.texts(3)]
    assert len(engine.names()) > 6
    free = engine.free_blocks
    for _ in range(2):
        for (name, ids), found in zip(rows, engine.ask(rows), strict=True):
            assert_same(found, engine.expect(name, ids))
    assert engine.free_blocks == free


def test_one_at_a_time(engine: kit.Engine) -> None:
    """The prompts differ from each other and from none."""
    ids = kit.texts(1, (11,), seed=1)[0]
    found = {name: engine.ask([(name, ids)])[0] for name in engine.names()}
    for name, answer in found.items():
        assert_same(answer, engine.expect(name, ids))
    first = [tuple(sorted(answer.top[0].items())) for answer in found.values()]
    assert len(set(first)) == len(first)


def test_cached_blocks_are_used(engine: kit.Engine) -> None:
    """Requests with the same prompt share its blocks."""
    name, text = "prefix_tuning", kit.texts(1, (70,), seed=2)[0]
    engine.ask([(name, text)], 1)
    before = engine.metric("vllm:prefix_cache_hits")
    assert_same(engine.ask([(name, text)])[0], engine.expect(name, text))
    whole = (kit.LENGTHS[name] + len(text)) // engine.block * engine.block
    assert engine.metric("vllm:prefix_cache_hits") - before == whole
    assert whole == {32: 96, 64: 64}[engine.block]


def test_repetition_penalty_does_not_see_placeholders(engine: kit.Engine) -> None:
    """The placeholder is a word like any other in the vocabulary, here made the likeliest answer by a little."""
    name, ids = "prompt_tuning", kit.texts(1, (6,), seed=3)[0]
    assert PLACEHOLDER not in ids
    logits = engine.penalised(name, ids, 1.5)
    bias = {PLACEHOLDER: float(logits.max() - logits[PLACEHOLDER]) + 0.1}
    assert engine.ask([(name, ids)], 1, repetition_penalty=1.5)[0].ids == [int(logits.argmax())] != [PLACEHOLDER]
    assert engine.ask([(name, ids)], 1, repetition_penalty=1.5, logit_bias=bias)[0].ids == [PLACEHOLDER]


def test_a_file_that_cannot_be_read_fails_its_requests_only(engine: kit.Engine) -> None:
    """Damaged after the scheduler has looked at it, and not in the worker's memory any more."""
    name, ids = "cartridge", kit.texts(1, (8,), seed=5)[0]
    version, other = engine.library.get(name), engine.library.get("p_tuning")
    raw, beside = ((each.digest, each.length, salt_of(each.digest, "own"), ids) for each in (version, other))
    file = version.folder / "kv.safetensors"
    assert engine.raw([raw]) == ["length"]
    whole, free = file.read_bytes(), engine.free_blocks
    engine.forget()
    file.unlink()
    file.write_bytes(whole[: len(whole) // 2])
    assert engine.raw([beside, raw, beside, raw]) == ["length", "error"] * 2
    assert_same(engine.ask([("p_tuning", ids)])[0], engine.expect("p_tuning", ids))
    file.write_bytes(whole)
    assert engine.raw([raw]) == ["length"]
    assert_same(engine.ask([(name, ids)])[0], engine.expect(name, ids))
    assert engine.free_blocks == free


def test_backends_that_cannot_be_given_keys_and_values(engine: kit.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    connector = get_kv_transfer_group()
    layer = next(iter(engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()))
    connector.register_kv_caches({})
    monkeypatch.setattr(layer.attn_backend, "forward_includes_kv_cache_update", True)
    with pytest.raises(UnsupportedError, match="--attention-backend"):
        connector.register_kv_caches({})
