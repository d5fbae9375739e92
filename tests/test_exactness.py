"""Outputs, losses, gradients and generated tokens equal the plain formulation, whatever the padding."""

import families
import hf_cache
import naive
import pytest
import tiny
import torch

from softprompt import (
    CPTConfig,
    CPTEmbedding,
    Embeddings,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)

METHODS = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "one_token": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
    "p_tuning_mlp": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=16),
    "p_tuning_lstm": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_reparameterization_type="LSTM", encoder_hidden_size=16
    ),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "prefix_ffn": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=16
    ),
}


def make(family: str, method: str, **overrides: object) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.build(family, **overrides), METHODS[method]()).eval()


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.DECODERS + tiny.MORE_DECODERS)
def test_logits_loss_and_gradients_equal_naive(family: str, method: str, side: str) -> None:
    model = make(family, method)
    batch = tiny.ragged(side=side)
    out = model(**batch).logits
    assert out.shape[:2] == batch["input_ids"].shape
    for row, got, mask in zip(naive.rows(batch), out, batch["attention_mask"], strict=True):
        expected, _ = naive.logits(model, row)
        torch.testing.assert_close(got[mask.bool()], expected[0], atol=1e-5, rtol=1e-5)

    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_loss = naive.loss(model, batch, labels)
    expected_gradients = torch.autograd.grad(expected_loss, parameters)
    result = model(**batch, labels=labels)
    gradients = torch.autograd.grad(result.loss, parameters)
    torch.testing.assert_close(result.loss, expected_loss, atol=1e-5, rtol=1e-5)
    for got, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for got, expected, mask in zip(result.logits, out, batch["attention_mask"], strict=True):
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.pairwise
@pytest.mark.parametrize("keep", [0, 2, torch.tensor([1, 4])])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix", "cpt"])
@pytest.mark.parametrize("family", ["gpt2", "jamba", "bloom"])
def test_logits_to_keep_change_neither_loss_nor_logits(
    family: str, method: str, labelled: bool, keep: int | torch.Tensor
) -> None:
    """transformers refuses labels beside it; here the loss counts every label."""
    config = CPTConfig(**CPTEmbedding.example) if method == "cpt" else METHODS[method]()
    model = get_peft_model(families.build(family, "CAUSAL_LM"), config).eval()
    for side in ("left", "right"):
        batch = tiny.ragged(side=side)
        if labelled:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        whole, kept = model(**batch), model(**batch, logits_to_keep=keep)
        columns = slice(-keep, None) if isinstance(keep, int) else keep
        for got, expected, real in zip(kept.logits, whole.logits, batch["attention_mask"].bool(), strict=True):
            seen = real[columns]
            torch.testing.assert_close(got[seen], expected[columns][seen], atol=1e-5, rtol=1e-5)
        if labelled:
            torch.testing.assert_close(kept.loss, whole.loss)


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_greedy_generation_equals_naive(family: str, method: str) -> None:
    model = make(family, method)
    batch = tiny.ragged(side="left")
    width = batch["input_ids"].shape[1]
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, width:]
    for row, got in zip(naive.rows(batch), tokens, strict=True):
        assert torch.equal(got[None], naive.greedy(model, row, 8))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_sliding_window_counts_true_positions(method: str, backend: str) -> None:
    """With a window shorter than prompt and text, padding on the left must not change what a token sees."""
    model = make("mistral", method, sliding_window=5, attn_implementation=backend)
    for side in ("left", "right"):
        batch = tiny.ragged(side=side)
        out = model(**batch).logits
        for row, got, mask in zip(naive.rows(batch), out, batch["attention_mask"], strict=True):
            expected = naive_windowed(model, row)
            torch.testing.assert_close(got[mask.bool()], expected[0], atol=1e-5, rtol=1e-5)


def naive_windowed(model: SoftPromptModel, row: torch.Tensor) -> torch.Tensor:
    """The plain windowed model over prompt and row, with a hand-written mask where the prompt is in the cache."""
    prompt = model.encoder().prompt()
    if isinstance(prompt, Embeddings):
        return naive.logits(model, row)[0]
    base, length = model.get_base_model(), prompt.length
    cache = prompt.to_cache()  # without the model's config: a cache that keeps everything
    positions = torch.arange(row.shape[1])[None] + length
    distance = positions[0][:, None] - torch.arange(length + row.shape[1])
    visible = (distance >= 0) & (distance < base.config.sliding_window)
    mask = torch.zeros(1, 1, *visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return base(input_ids=row, attention_mask=mask, position_ids=positions, **hf_cache.given(base, cache)).logits
