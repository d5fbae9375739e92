"""Encoder-decoders whose rows have prompts of different lengths: each row gets what it gets alone."""

from dataclasses import replace
from typing import Any

import pytest
import ragged_kit as kit
import tiny
import torch
from ragged_kit import PLAIN, ROWS, TOKENS, Model
from torch import Tensor

from softprompt.call import Call
from softprompt.config import Placement
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.prompt import KV, Embeddings

FAMILIES = ("t5", "bart", "mbart", "pegasus", "blenderbot")
KINDS = ("vectors", "keys", "both")
TARGETS = (4, 2, 5, 3, 5, 1)


def targets() -> Tensor:
    """Labels `[B, 5]`, −100 behind the end of each row's."""
    batch = tiny.ragged(TARGETS, seed=1)
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(family: str, kind: str, side: str) -> None:
    model = Model(family, "SEQ_2_SEQ_LM")
    leaves, joined, single = model.prompts(kind)
    batch, labels = tiny.ragged(TOKENS, side=side), targets()
    got = model.run(joined).forward(Call.of({**batch, "labels": labels}))
    total = torch.zeros(())
    for row, ids in enumerate(kit.each_row(batch)):
        own = labels[row][labels[row] >= 0][None]
        expected = model.forward_alone(single[row], input_ids=ids, labels=own)
        kit.close(got.logits[row, : own.shape[1]], expected.logits[0])
        total = total + own.shape[1] * expected.loss
    kit.close(got.loss, total / sum(TARGETS))
    kit.same_gradients(got.loss, total / sum(TARGETS), leaves)


@pytest.mark.parametrize("part", ["layers", "cross", "encoder"])
@pytest.mark.parametrize("family", ["t5", "bart", "pegasus"])
def test_each_part_of_a_prefix_by_itself(family: str, part: str) -> None:
    model = Model(family, "SEQ_2_SEQ_LM")
    _, joined, single = model.prompts("keys")
    batch, written = tiny.ragged(TOKENS, side="left"), torch.randint(3, tiny.VOCAB, (len(ROWS), 4))

    def alone(kv: KV) -> KV:
        return replace(kv, **{name: () for name in ("layers", "cross", "encoder") if name != part})

    with torch.no_grad():
        got = model.run(alone(joined)).forward(Call.of({**batch, "decoder_input_ids": written})).logits
        for row, ids in enumerate(kit.each_row(batch)):
            prompt = None if single[row] is None else alone(single[row])
            expected = model.forward_alone(prompt, input_ids=ids, decoder_input_ids=written[row : row + 1])
            kit.close(got[row], expected.logits[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_without_a_mask(family: str, kind: str) -> None:
    model = Model(family, "SEQ_2_SEQ_LM")
    _, joined, single = model.prompts(kind)
    ids, written = (torch.randint(3, tiny.VOCAB, (len(ROWS), length)) for length in (5, 3))
    with torch.no_grad():
        got = model.run(joined).forward(Call.of({"input_ids": ids, "decoder_input_ids": written})).logits
        for row in range(len(ROWS)):
            own: dict[str, Any] = {"input_ids": ids[row : row + 1], "decoder_input_ids": written[row : row + 1]}
            kit.close(got[row], model.forward_alone(single[row], **own).logits[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["t5", "bart", "pegasus"])
def test_vectors_for_the_decoders_words(family: str, kind: str) -> None:
    model = Model(family, "SEQ_2_SEQ_LM")
    _, joined, _ = model.prompts(kind)
    batch, written = tiny.ragged(TOKENS), torch.randint(3, tiny.VOCAB, (len(ROWS), 3))
    words = model.base.get_decoder().get_input_embeddings()(written)
    with torch.no_grad():
        expected = model.run(joined).forward(Call.of({**batch, "decoder_input_ids": written}))
        got = model.run(joined).forward(Call.of({**batch, "decoder_inputs_embeds": words}))
    kit.close(got.logits, expected.logits)


@pytest.mark.parametrize("placement", [Placement.FRONT, Placement.AFTER_BOS])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_comes_back_covers_real_tokens_only(family: str, placement: Placement) -> None:
    model = Model(family, "SEQ_2_SEQ_LM")
    _, joined, single = model.prompts("vectors")
    batch, written = tiny.ragged(TOKENS, side="left"), torch.randint(3, tiny.VOCAB, (len(ROWS), 3))
    more: dict[str, Any] = {"output_hidden_states": True}
    with torch.no_grad():
        got = model.run(joined, placement).forward(Call.of({**batch, "decoder_input_ids": written, **more}))
        assert got.encoder_last_hidden_state.shape[:2] == batch["input_ids"].shape
        for row, ids in enumerate(kit.each_row(batch)):
            own = {"input_ids": ids, "decoder_input_ids": written[row : row + 1], **more}
            expected, real = model.forward_alone(single[row], placement, **own), batch["attention_mask"][row].bool()
            kit.close(got.logits[row], expected.logits[0])
            kit.close(got.encoder_last_hidden_state[row][real], expected.encoder_last_hidden_state[0])
            for mine, theirs in zip(got.encoder_hidden_states, expected.encoder_hidden_states, strict=True):
                kit.close(mine[row][real], theirs[0])


@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["t5", "bart", "pegasus"])
def test_generate(family: str, kind: str, beams: int) -> None:
    model = Model(family, "SEQ_2_SEQ_LM")
    _, joined, single = model.prompts(kind)
    batch, options = tiny.ragged(TOKENS), {**PLAIN, "num_beams": beams}
    with torch.no_grad():
        got = model.run(joined).generate(**batch, **options)
        for row, ids in enumerate(kit.each_row(batch)):
            run: Any = model.base if single[row] is None else model.run(single[row])
            expected = run.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            assert torch.equal(got[row], expected[0]), row


@pytest.mark.parametrize("kind", ["vectors", "keys"])
def test_generate_with_a_static_cache(kind: str) -> None:
    model = Model("bart", "SEQ_2_SEQ_LM")
    _, joined, _ = model.prompts(kind)
    batch = tiny.ragged(TOKENS)
    with torch.no_grad():
        expected = model.run(joined).generate(**batch, **PLAIN)
        got = model.run(joined).generate(**batch, **PLAIN, cache_implementation="static")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "task"), [("t5", "TOKEN_CLS"), ("t5", "SEQ_CLS"), ("bart", "SEQ_CLS")])
def test_heads(family: str, task: str, kind: str) -> None:
    model = Model(family, task)
    _, joined, single = model.prompts(kind)
    batch = tiny.ragged(TOKENS, side="left")
    batch["input_ids"][:, -1] = tiny.EOS  # where a sequence classifier reads
    with torch.no_grad():
        got = model.run(joined).forward(Call.of(dict(batch))).logits
        for row, ids in enumerate(kit.each_row(batch)):
            expected = model.forward_alone(single[row], input_ids=ids).logits[0]
            real = batch["attention_mask"][row].bool()
            kit.close(got[row][real] if task == "TOKEN_CLS" else got[row], expected)


def test_a_prompt_of_the_decoder_too_is_refused() -> None:
    model = Model("t5", "SEQ_2_SEQ_LM")
    prompt = replace(model.embeddings(model.vectors()), decoder=torch.zeros(4, 2, 32))
    with pytest.raises(UnsupportedError, match="num_transformer_submodules=1"):
        model.run(prompt).forward(Call.of({**tiny.ragged(TOKENS), "labels": targets()}))


def test_outputs_of_an_encoder_that_saw_no_prompt_are_refused() -> None:
    model = Model("t5", "SEQ_2_SEQ_LM")
    prompt = model.embeddings(model.vectors())
    ids = torch.randint(3, tiny.VOCAB, (len(ROWS), 9))
    encoded = model.base.get_encoder()(input_ids=ids)
    for more in ({"attention_mask": torch.ones_like(ids)}, {}):
        for each in (prompt, Embeddings(prompt.vectors[:1])):
            with pytest.raises(ConfigError, match="without the prompt"):
                model.run(each).forward(Call.of({"encoder_outputs": encoded, "decoder_input_ids": ids[:, :2], **more}))
