"""Models whose own `generate` takes no vectors write behind a prompt what they write behind its tokens."""

import anyfamily
import pytest
import torch
from trial import STEPS, Subject
from trial_tools import padded

NAMES = ["BambaForCausalLM", "FalconH1ForCausalLM", "Zamba2ForCausalLM", "NemotronHForCausalLM",
         "OpenAIGPTLMHeadModel"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_generation_from_vectors(name: str) -> None:
    """A row alone and rows padded on the left, by `max_new_tokens` and by `max_length`, and the same a second time."""
    subject = Subject(name, "causal")
    model = subject.wrapped("prompt_tuning")
    wanted = [subject._greedy(row) for row in subject.rows]
    options = {"do_sample": False, "num_beams": 1, "pad_token_id": anyfamily.PAD}
    for _ in range(2):
        for row, written in zip(subject.rows, wanted, strict=True):
            for length in ({"max_new_tokens": STEPS}, {"max_length": row.shape[1] + STEPS}):
                said = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **options, **length)
                assert torch.equal(said[0], torch.cat([row[0], written]))
        ids, mask, _ = padded(subject.rows, "left")
        said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, **options)
        assert torch.equal(said[:, : ids.shape[1]], ids)
        assert torch.equal(said[:, ids.shape[1] :], torch.stack(wanted))
    with model.disable_adapter():
        said = model.generate(input_ids=subject.rows[1], max_new_tokens=STEPS, **options)
    alone = subject.base.generate(subject.rows[1], max_new_tokens=STEPS, **options)
    assert torch.equal(said, alone)  # nothing of the prompt is left in the model
