"""Prompts on models that also see images: text behind a prompt, with and without an image in it."""

from typing import Any

import hf_cache
import pytest
import tiny
import torch
from families import build
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from softprompt import (
    KV,
    PrefixTuningConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)

IMAGE = tiny.VOCAB - 1
CONFIGS: dict[str, Any] = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def make(family: str, method: str) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(build(family, "CAUSAL_LM"), CONFIGS[method]()).eval()


def picture(family: str) -> tuple[dict[str, Tensor], int]:
    """Pixels of one image, and how many tokens it takes."""
    torch.manual_seed(1)
    if family == "llava":
        return {"pixel_values": torch.randn(1, 3, 8, 8)}, 4
    grid = torch.tensor([[1, 4, 4]])  # patches; a token is two by two of them
    return {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": grid}, 4


def row(family: str) -> dict[str, Tensor]:
    """Text, an image, text: `[1, 10]`."""
    extra, count = picture(family)
    ids = torch.tensor([[5, 6, 7, *[IMAGE] * count, 8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
    return inputs if family == "llava" else {**inputs, "mm_token_type_ids": (ids == IMAGE).int()}


def naive(model: SoftPromptModel, inputs: dict[str, Tensor]) -> Tensor:
    """The folded prompt in a cache, and the positions the model itself gives the row, moved behind it."""
    base: Any = model.get_base_model()
    prompt = model.fold()
    assert isinstance(prompt, KV)
    cache = DynamicCache(config=base.config.get_text_config())
    for index, (key, value) in enumerate(prompt.layers):
        cache.update(key, value, index)
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1])[None]
    if "image_grid_thw" in inputs:
        positions, _ = base.model.get_rope_index(
            ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
    mask = torch.ones(1, 3 + ids.shape[1], dtype=torch.long)
    pixels = {name: value for name, value in inputs.items() if name not in ("attention_mask", "input_ids")}
    return base(
        input_ids=ids, attention_mask=mask, position_ids=positions + 3, **hf_cache.given(base, cache), **pixels
    ).logits


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_row_with_an_image(family: str, method: str) -> None:
    model, inputs = make(family, method), row(family)
    expected = naive(model, inputs)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-3)
    labels = inputs["input_ids"].masked_fill(torch.arange(10)[None] < 7, -100)
    loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, cross_entropy(expected[0, 6:-1], labels[0, 7:]), atol=1e-5, rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_generation_from_an_image(family: str, method: str) -> None:
    model, inputs = make(family, method), row(family)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    for _ in range(3):
        following = naive(model, inputs)[:, -1:].argmax(-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], following], dim=1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    assert torch.equal(tokens, inputs["input_ids"])


def test_the_last_virtual_token_predicts_the_first_of_a_row_with_an_image() -> None:
    model, inputs = make("llava", "prompt_tuning"), row("llava")
    labels = inputs["input_ids"]
    virtual = model.get_base_model()(inputs_embeds=model.prompt_vectors()[None]).logits[:, -1:]
    logits = torch.cat([virtual.expand(len(labels), -1, -1), model(**inputs).logits[:, :-1]], dim=1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected, atol=1e-5, rtol=1e-5)


def test_images_beside_a_prompt_inside_the_row_are_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, placement="after_bos")
    model, inputs = get_peft_model(build("llava", "CAUSAL_LM"), config).eval(), row("llava")
    for run in (model, model.generate):
        with pytest.raises(UnsupportedError, match=r"inside the rows of Llava.*use placement='front' or prefix_tuning"):
            run(**inputs)
