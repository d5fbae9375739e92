"""Heads that are trained and saved with a prompt: one copy per adapter, the model's own kept."""

from pathlib import Path

import naive
import pytest
import tiny
import torch
from model_kit import METHODS, TWO_KINDS, close, ids_of, trainable
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from softprompt import (
    SoftPromptModel,
    get_peft_model,
)

# ---- heads -------------------------------------------------------------------------------------------------------


def classifier(family: str, seed: int = 0, labels: int = 3) -> PreTrainedModel:
    if family == "bert":
        return tiny.build(family, num_labels=labels) if labels != 3 else tiny.build(family)
    torch.manual_seed(seed)
    config = tiny.build(family).config
    config.num_labels = labels
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_classifiers_pool_the_right_token(family: str, method: str, side: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(classifier(family), METHODS[method](task_type="SEQ_CLS")).eval()
    batch, labels = tiny.ragged(side=side), torch.tensor([0, 2, 1])
    out = model(**batch, labels=labels)
    single = torch.cat([model(input_ids=row).logits for row in naive.rows(batch)])
    close(out.logits, single)
    close(out.loss, torch.nn.functional.cross_entropy(single, labels))
    out.loss.backward()
    head = "classifier" if family == "bert" else "score"
    assert torch.count_nonzero(getattr(model.get_base_model(), head).weight.grad)
    assert all(torch.count_nonzero(parameter.grad) for parameter in model.prompt_encoder.parameters())
    prefixes = ("prompt_encoder.default.", "heads.copies.default.", f"base_model.{head}.")
    assert all(name.startswith(prefixes) for name in trainable(model))


def test_classifier_of_a_causal_model_pools_behind_the_prompt() -> None:
    """Checked against the plain model's own body over prompt and row, and its head by hand."""
    model = get_peft_model(classifier("gpt2"), METHODS["prompt_tuning"](task_type="SEQ_CLS")).eval()
    base, ids = model.get_base_model(), ids_of(6)
    embedded = torch.cat([model.encoder().prompt().vectors, base.get_input_embeddings()(ids)], dim=1)
    states = base.transformer(inputs_embeds=embedded).last_hidden_state
    close(model(input_ids=ids).logits, base.score(states[:, -1]))


def test_a_head_per_adapter() -> None:
    base, batch = tiny.build("bert"), tiny.ragged()
    original = base.classifier
    model = get_peft_model(base, METHODS["prefix"](task_type="SEQ_CLS"), adapter_name="one").eval()
    model.add_adapter("two", METHODS["prompt_tuning"](task_type="SEQ_CLS"))
    model.add_adapter("none", METHODS["prompt_tuning"]())
    assert base.classifier is not original
    with torch.no_grad():
        base.classifier.weight.zero_()
    outputs = {}
    for name in ("one", "two", "none"):
        model.set_adapter(name)
        outputs[name] = model(**batch).logits
        trains = {key for key in trainable(model) if "classifier" in key}
        assert bool(trains) == (name != "none")
    assert torch.equal(outputs["one"], base.classifier.bias.expand(3, -1))
    assert base.classifier is original  # `none` asks for no head of its own
    assert not original.weight.requires_grad
    assert torch.count_nonzero(original.weight)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(model(**batch).logits, outputs["two"])


def test_heads_follow_to_another_type() -> None:
    """Also the base model's own head, which waits outside while an adapter's stands in."""
    model = get_peft_model(tiny.build("bert"), METHODS["prefix"](task_type="SEQ_CLS")).eval()
    model.to(torch.float64)
    batch = tiny.ragged()
    assert model(**batch).logits.dtype is torch.float64
    with model.disable_adapter():
        assert model(**batch).logits.dtype is torch.float64


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_module_to_save_of_ones_own(method: str, tmp_path: Path) -> None:
    base, ids = tiny.build("llama"), ids_of(6)
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
    before = tiny.build("llama").lm_head.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(base.lm_head.weight, before)
    expected = model.eval()(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(base.lm_head.weight, before)
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path)
    close(again(input_ids=ids).logits, expected)
