"""Changes that leave no trace on parameters, inference mode, copies: what was kept of a folded prompt is not used."""

import copy
from collections.abc import Callable

import peft
import pytest
import tiny
import torch
from model_kit import TWO_KINDS, ids_of, make
from torch import Tensor

from softprompt import SoftPromptModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks


def frozen(model: SoftPromptModel) -> SoftPromptModel:
    return model.eval().requires_grad_(False)


def check_after(model: SoftPromptModel, change: Callable[[], object], changes: bool) -> None:
    """The logits are those of a model that has kept nothing, before and after the change."""
    ids, found = ids_of(5), []
    for step in (lambda: None, change):
        step()
        frozen(model)
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
            model.folds.clear()
            assert torch.equal(model(input_ids=ids).logits, found[-1])
    assert changes == (not torch.allclose(*found, atol=1e-3))


@pytest.mark.parametrize("change", ["off", "scaled", "merged"])
@pytest.mark.parametrize("method", TWO_KINDS)
def test_lora_beneath_may_be_switched(method: str, change: str) -> None:
    """PEFT switches, scales and merges its layers without touching a parameter in a way that shows."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    wrapper = peft.get_peft_model(tiny.build("llama"), config)
    model = get_peft_model(wrapper, make("llama", method).peft_config["default"])
    layers = [each for each in wrapper.modules() if isinstance(each, peft.tuners.lora.LoraLayer)]
    do = {
        "off": wrapper.base_model.disable_adapter_layers,
        "scaled": lambda: [layer.scale_layer(3.0) for layer in layers],
        "merged": wrapper.merge_adapter,
    }[change]
    check_after(model, do, changes=change != "merged")


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_fused_optimizer_may_have_trained_it(method: str) -> None:
    """Its steps do not count up a parameter's version."""
    model = make("llama", method)

    def train() -> None:
        model.set_adapter("default")
        optimizer = torch.optim.AdamW(model.encoder().parameters(), lr=1.0, fused=True)
        model(input_ids=ids_of(6), labels=ids_of(6)).loss.backward()
        optimizer.step()

    check_after(model, train, changes=True)


@pytest.mark.parametrize("method", TWO_KINDS)
def test_kept_in_inference_mode_and_used_with_gradients(method: str) -> None:
    """Autograd refuses what was computed in inference mode."""
    model, ids = frozen(make("llama", method)), ids_of(5)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    words = model.get_base_model().get_input_embeddings()(ids).requires_grad_()
    output = model(inputs_embeds=words).logits
    torch.testing.assert_close(output, expected.clone())
    output.sum().backward()
    assert isinstance(words.grad, Tensor) and words.grad.isfinite().all()


@torch.no_grad()
def test_a_copy_of_a_model_keeps_nothing_of_the_other() -> None:
    model, ids = frozen(make("llama", "prompt_tuning")), ids_of(5)
    before = model(input_ids=ids).logits
    other = copy.deepcopy(model)
    for each in other.encoder().parameters():
        each.add_(torch.randn_like(each))
    assert not torch.allclose(other(input_ids=ids).logits, before, atol=1e-3)
    assert torch.equal(model(input_ids=ids).logits, before)
