"""The tiny models are worth testing with: seeded, padded rows equal single ones, logits neither flat nor saturated."""

from __future__ import annotations

import pytest
import tiny
import torch


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_logits_are_not_degenerate(family: str) -> None:
    model, batch = tiny.build(family), tiny.ragged()
    with torch.no_grad():
        logits = model(**batch).logits
        again = tiny.build(family)(**batch).logits
    assert torch.equal(logits, again)
    spread = logits.std(-1).mean().item()
    assert 0.05 < spread < 20


def test_copies_are_independent() -> None:
    first, second = tiny.build("llama"), tiny.build("llama")
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(second.parameters()).abs().sum() > 0


def test_overrides_reach_the_config() -> None:
    assert tiny.build("llama", num_hidden_layers=3).config.num_hidden_layers == 3


def test_tokenizer_round_trip_and_chat() -> None:
    tokenizer = tiny.tokenizer()
    assert len(tokenizer) <= tiny.VOCAB
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (tiny.PAD, tiny.BOS, tiny.EOS)
    text = "The Mill => a café by the river"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<user>hi</s><assistant>"


def test_ragged_pads_on_the_side_asked_for() -> None:
    left, right = tiny.ragged((2, 4), "left"), tiny.ragged((2, 4), "right")
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert right["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(left["input_ids"][0, 2:], right["input_ids"][0, :2])
