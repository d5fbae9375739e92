"""vLLM with a prompt answers what transformers answers with it: tokens and log-probabilities, one way and another."""

from __future__ import annotations

import kit
import torch
from kit import assert_same

from softprompt.serve.vllm.entered import PLACEHOLDER


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
    assert engine.metric("vllm:prefix_cache_hits") - before == 96  # of 40 + 70 tokens, whole blocks


def test_repetition_penalty_does_not_see_placeholders(engine: kit.Engine) -> None:
    """The placeholder is a word like any other in the vocabulary, here made the likeliest answer by a little."""
    name, ids = "prompt_tuning", kit.texts(1, (6,), seed=3)[0]
    assert PLACEHOLDER not in ids
    logits = _penalised(engine, name, ids, 1.5)
    bias = {PLACEHOLDER: float(logits.max() - logits[PLACEHOLDER]) + 0.1}
    assert engine.ask([(name, ids)], 1, repetition_penalty=1.5)[0].ids == [int(logits.argmax())] != [PLACEHOLDER]
    assert engine.ask([(name, ids)], 1, repetition_penalty=1.5, logit_bias=bias)[0].ids == [PLACEHOLDER]


def _penalised(engine: kit.Engine, name: str, ids: list[int], penalty: float) -> torch.Tensor:
    """The next token's logits under the penalty, by its formula (1909.05858, section 4.1) over the real tokens."""
    from softprompt import SoftPromptModel

    model = SoftPromptModel.from_pretrained(engine.base, engine.prompts / name)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    seen = torch.tensor(sorted(set(ids)))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits
