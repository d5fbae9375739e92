"""The plain formulation itself, with transformers alone: prompts of which the base model says what they must give.

A prompt of a text's own embeddings, or of the keys and values that a text left in a cache, is that text in front.
"""

from __future__ import annotations

import families
import hf_cache
import naive
import pytest
import torch
from transformers import PreTrainedModel

from softprompt import KV, Embeddings

DECODERS = [name for name, family in families.FAMILIES.items() if family.kind == "decoder"]
CACHED = [name for name in DECODERS if name != "deepseek_v3"]  # which caches what keys and values are made of
BY_HAND = {  # family: task, attentions of one forward pass, those of them that are causal
    "bert": ("MASKED_LM", 2, ()),
    "roberta": ("SEQ_CLS", 2, ()),
    "distilbert": ("TOKEN_CLS", 2, ()),
    "albert": ("MASKED_LM", 2, ()),
    "electra": ("FEATURE_EXTRACTION", 2, ()),
    "modernbert": ("MASKED_LM", 2, ()),
    "deepseek_v3": ("CAUSAL_LM", 2, (0, 1)),
    "t5": ("SEQ_2_SEQ_LM", 6, (2, 4)),
    "bart": ("SEQ_2_SEQ_LM", 6, (2, 4)),
}
TEXT = torch.tensor([[5, 60, 7, 80]])
ROW = torch.tensor([[9, 100, 11, 12, 2]])


def implementations(base: PreTrainedModel) -> list[str]:
    return [part.config._attn_implementation for part in base.modules() if isinstance(part, PreTrainedModel)]


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_prompt_of_embedded_words_is_those_words(family: str) -> None:
    base = families.build(family, "CAUSAL_LM")
    words = Embeddings(base.get_input_embeddings()(TEXT))
    whole = base(input_ids=torch.cat([TEXT, ROW], dim=1)).logits
    torch.testing.assert_close(naive.run(base, words, ROW).logits, whole, atol=1e-5, rtol=1e-5)
    after = base(input_ids=torch.cat([ROW[:, :1], TEXT, ROW[:, 1:]], dim=1)).logits
    torch.testing.assert_close(naive.run(base, words, ROW, first=1).logits, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CACHED)
@torch.no_grad()
def test_a_prefix_of_a_texts_cache_is_that_text(family: str) -> None:
    base = families.build(family, "CAUSAL_LM")
    whole = base(input_ids=torch.cat([TEXT, ROW], dim=1)).logits
    cache = hf_cache.of(base(input_ids=TEXT, use_cache=True))
    prefix = KV(tuple((layer.keys, layer.values) for layer in cache.layers))
    found = naive.run(base, prefix, ROW).logits
    torch.testing.assert_close(found, whole[:, TEXT.shape[1] :], atol=1e-5, rtol=1e-5)
    assert (found - base(input_ids=ROW).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", BY_HAND)
@torch.no_grad()
def test_attention_by_hand_is_the_models_own(family: str) -> None:
    task, count, causal = BY_HAND[family]
    base = families.build(family, task)
    inputs = {"input_ids": ROW} | ({"decoder_input_ids": TEXT} if task == "SEQ_2_SEQ_LM" else {})
    before, own = implementations(base), base(**inputs)[0]
    with naive.by_hand(base, [(None, at in causal) for at in range(count)]):
        assert set(implementations(base)) == {"naive"}
        found = base(**inputs)[0]
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    assert implementations(base) == before
