"""Prompts of two parts on encoder-decoders: before the encoder's input, and before the decoder's.

The plain formulation concatenates both by hand, on one row without padding. PEFT's multitask prompts are such by
default: its `forward` is equal, its `generate` leaves the second part out.
"""

from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from peft_cells import TASKS, Cell, randomised, real
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt import MultitaskPromptTuningConfig, get_peft_model
from softprompt.errors import ConfigError, UnsupportedError

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
FAMILIES = ("t5", "bart", "mbart", "pegasus", "blenderbot")
OPTIONS: dict[str, Any] = {"num_virtual_tokens": 4, "num_tasks": 2, "num_ranks": 2, "num_transformer_submodules": 2}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str) -> Any:
    config = MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", **OPTIONS)
    return randomised(get_peft_model(families.build(family, "SEQ_2_SEQ_LM"), config))


def naive_logits(model: Any, source: Tensor, target: Tensor, task: Tensor) -> Tensor:
    """Logits `[1, t, V]` of one row: source `[1, s]` and decoder input `[1, t]`."""
    base, prompt = model.get_base_model(), model.encoder().prompt(task)
    assert prompt.decoder is not None
    embedded = torch.cat([prompt.vectors, base.get_encoder().get_input_embeddings()(source)], dim=1)
    decoded = torch.cat([prompt.decoder, base.get_decoder().get_input_embeddings()(target)], dim=1)
    return base(inputs_embeds=embedded, decoder_inputs_embeds=decoded, use_cache=False).logits[:, 4:]


def rows(batch: dict[str, Tensor]) -> list[Tensor]:
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [ids[mask][None] for ids, mask in pairs]


@every_family
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_loss_and_gradients_are_the_plain_formulation_s(family: str, side: str) -> None:
    model, batch = make(family), tiny.ragged(side=side)
    labels = tiny.ragged((4, 2, 3), seed=1)["input_ids"].masked_fill_(
        tiny.ragged((4, 2, 3))["attention_mask"] == 0, -100
    )
    decoder = torch.cat([torch.full((3, 1), tiny.EOS), labels[:, :-1].clamp(min=tiny.PAD)], dim=1)
    output = model(**batch, decoder_input_ids=decoder, labels=labels, task_ids=TASKS)
    table: Any = model.encoder().embedding.weight
    found = torch.autograd.grad(output.loss, table)[0]
    alone = [
        naive_logits(model, source, target[None], task[None])[0]
        for source, target, task in zip(rows(batch), decoder, TASKS, strict=True)
    ]
    torch.testing.assert_close(output.logits, torch.stack(alone), atol=1e-5, rtol=0)
    loss = cross_entropy(torch.cat(alone), labels.flatten())
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, torch.autograd.grad(loss, table)[0], atol=1e-4, rtol=1e-4)
    assert found[4:].abs().max() > 1e-4


@pytest.mark.pairwise
@every_family
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_generation_is_single_rows_and_greedy_is_the_plain_one(family: str, options: dict[str, Any]) -> None:
    model, batch = make(family), tiny.ragged()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **options}
    together = model.generate(**batch, task_ids=TASKS, **options)
    for row, source in enumerate(rows(batch)):
        alone = model.generate(source, task_ids=TASKS[row : row + 1], **options)
        assert torch.equal(alone[0], together[row])
        if "num_beams" not in options:
            target = alone[:, :1]
            with torch.no_grad():
                for _ in range(5):
                    logits = naive_logits(model, source, target, TASKS[row : row + 1])
                    target = torch.cat([target, logits[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(target, alone)


@every_family
def test_states_and_attentions_cover_real_tokens(family: str) -> None:
    model = make(family)
    model.get_base_model().set_attn_implementation("eager")
    ids = tiny.ragged((5, 5, 5))["input_ids"]
    target, task_ids = tiny.ragged((4, 4, 4), seed=1)["input_ids"], TASKS
    with torch.no_grad():
        output = model(
            ids, decoder_input_ids=target, task_ids=task_ids, output_hidden_states=True, output_attentions=True
        )
        masked = model(ids, decoder_input_ids=target, decoder_attention_mask=torch.ones_like(target), task_ids=TASKS)
    assert all(state.shape[:2] == (3, 4) for state in output.decoder_hidden_states)
    assert all(part.shape[2:] == (4, 4) for part in output.decoder_attentions)
    assert all(part.shape[2:] == (4, 5) for part in output.cross_attentions)
    torch.testing.assert_close(masked.logits, output.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_peft_s_checkpoints_of_two_parts(tmp_path: Path, family: str) -> None:
    cell = Cell("MULTITASK_PROMPT_TUNING", family, "SEQ_2_SEQ_LM")
    theirs = cell.theirs()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = cell.load_ours(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = cell.load_theirs(tmp_path / "ours")
    batch = cell.batch()
    with torch.no_grad():
        expected = theirs(**batch)
        for model in (ours, again):
            found = model(**batch)
            torch.testing.assert_close(real(cell, found, batch), real(cell, expected, batch), atol=1e-5, rtol=0)
            torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)
        one_part = cell.ours()
        one_part.encoder().embedding.weight.copy_(ours.encoder().embedding.weight[:4])
        one_part.encoder().prefix_task_cols.copy_(ours.encoder().prefix_task_cols[:, :4])
        one_part.encoder().prefix_task_rows.copy_(ours.encoder().prefix_task_rows)
    options = {**tiny.ragged((6,), seed=2), "max_new_tokens": 8, "do_sample": False, "task_ids": TASKS[:1]}
    assert torch.equal(theirs.generate(**options), one_part.generate(**options)), "PEFT leaves the second part out"


def test_what_cannot_be_with_a_part_before_the_decoder(tmp_path: Path) -> None:
    model, row = make("bart"), tiny.ragged((6,))
    for option in ({"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}):
        with pytest.raises(UnsupportedError, match=next(iter(option))):
            model.generate(**row, task_ids=TASKS[:1], **option)
    with pytest.raises(UnsupportedError, match="no ordinary prompt"):
        model.encoder().task_vectors(0)
    with pytest.raises(ConfigError, match="num_transformer_submodules=2"):
        get_peft_model(tiny.build("llama"), MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **OPTIONS))
