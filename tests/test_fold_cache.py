"""Frozen prompts are folded once and kept; whatever changes the prompt or the base model drops them."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from softprompt import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptStore,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)

CONFIGS: dict[str, Any] = {
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "ffn": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    ),
    "multitask": MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=1),
}
IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


class Counted:
    """Calls of a model's encoder, and tokens through its first layer."""

    def __init__(self, model: SoftPromptModel) -> None:
        self.prompts, self.tokens = 0, 0
        layer = model.get_base_model().get_submodule("model.layers.0")
        layer.register_forward_pre_hook(self._count, with_kwargs=True)
        encoder = model.encoder()
        plain = encoder.prompt
        encoder.__dict__["prompt"] = lambda *args: self._prompt(plain, *args)

    def _count(self, _: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        self.tokens += states.shape[0] * states.shape[1]

    def _prompt(self, plain: Any, *args: Any) -> Any:
        self.prompts += 1
        return plain(*args)


def frozen(method: str, seed: int = 0) -> SoftPromptModel:
    torch.manual_seed(seed)
    model = get_peft_model(tiny.build("llama"), CONFIGS[method]).eval()
    return model.requires_grad_(False)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_frozen_prompt_is_made_and_folded_once(method: str) -> None:
    model = frozen(method)
    expected = model(input_ids=IDS, labels=IDS)
    count = Counted(model)
    for _ in range(3):
        again = model(input_ids=IDS, labels=IDS)
        assert torch.equal(again.logits, expected.logits) and torch.equal(again.loss, expected.loss)
        model.generate(input_ids=IDS, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert count.prompts == 0 and count.tokens == 6 * IDS.numel()


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_kept_equals_what_is_computed_anew(method: str) -> None:
    model = frozen(method)
    kept = model(input_ids=IDS, labels=IDS)
    model.prompt_encoder.requires_grad_(True)
    anew = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(kept.logits, anew.logits)
    torch.testing.assert_close(kept.loss, anew.loss)
    assert anew.loss.requires_grad and not kept.loss.requires_grad


def test_the_tasks_of_a_frozen_prompt_are_folded_once_each() -> None:
    torch.manual_seed(0)
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3)
    model = get_peft_model(tiny.build("llama"), config).eval()
    for parameter in model.prompt_encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    tasks = torch.tensor([2, 0])
    anew = model(input_ids=IDS, labels=IDS, task_ids=tasks)
    model.requires_grad_(False)
    assert torch.allclose(model(input_ids=IDS, task_ids=tasks).logits, anew.logits, atol=1e-5)
    count = Counted(model)
    again = model(input_ids=IDS, labels=IDS, task_ids=tasks)
    torch.testing.assert_close(again.loss, anew.loss)
    assert count.prompts == 0 and count.tokens == IDS.numel()
    model(input_ids=IDS, task_ids=torch.tensor([0, 1]))
    assert count.prompts == 1 and count.tokens == 2 * IDS.numel() + 4


def changes() -> dict[str, Any]:
    def step(model: SoftPromptModel, fused: bool) -> None:
        model.train().prompt_encoder.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.prompt_encoder.parameters(), lr=0.5, fused=fused)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.eval().requires_grad_(False)

    def in_place(module: torch.nn.Module) -> None:
        with torch.no_grad():
            next(module.parameters()).mul_(-2)

    def replaced(model: SoftPromptModel) -> None:
        head = model.get_base_model().get_submodule("model.layers.0.self_attn.k_proj")
        head.weight = torch.nn.Parameter(-head.weight.detach(), requires_grad=False)

    return {
        "fused optimizer": lambda model: step(model, True),
        "optimizer": lambda model: step(model, False),
        "prompt in place": lambda model: in_place(model.prompt_encoder),
        "base in place": lambda model: in_place(model.get_base_model().get_submodule("model.layers.0.self_attn")),
        "base replaced": replaced,
        "state": lambda model: model.load_state_dict(frozen("p_tuning", seed=3).state_dict()),
        "type": lambda model: model.double(),
    }


@pytest.mark.parametrize("change", changes())
def test_whatever_changes_is_seen(change: str) -> None:
    model = frozen("p_tuning")
    before = model(input_ids=IDS).logits
    changes()[change](model)
    after = model(input_ids=IDS).logits
    model.folds.clear()
    assert torch.equal(after, model(input_ids=IDS).logits)
    assert not torch.equal(after.float(), before)


def test_another_adapter_of_the_same_name() -> None:
    model = frozen("prompt_tuning")
    model.add_adapter("other", CONFIGS["ffn"])
    for config in (CONFIGS["prompt_tuning"], CONFIGS["p_tuning"]):
        torch.manual_seed(4)
        model.add_adapter("again", config)
        model.eval().requires_grad_(False)
        got = model(input_ids=IDS, adapter_names=["again", "other"]).logits
        model.folds.clear()
        assert torch.equal(got, model(input_ids=IDS, adapter_names=["again", "other"]).logits)
        model.delete_adapter("again")


def test_what_a_store_keeps_follows_the_base_model(tmp_path: Path) -> None:
    frozen("prompt_tuning", seed=1).save_pretrained(tmp_path / "one")
    model = frozen("ffn")
    model.attach(PromptStore(tmp_path))
    first = model(input_ids=IDS, adapter_names=["one", "one"]).logits
    count = Counted(model)
    assert torch.equal(model(input_ids=IDS, adapter_names=["one", "one"]).logits, first)
    assert count.tokens == IDS.numel()
    with torch.no_grad():
        model.get_base_model().get_submodule("model.layers.0.self_attn.v_proj").weight.mul_(-1)
    got = model(input_ids=IDS, adapter_names=["one", "one"]).logits
    fresh = SoftPromptModel.from_pretrained(model.get_base_model(), tmp_path / "one")
    torch.testing.assert_close(got, fresh(input_ids=IDS).logits)


@pytest.mark.parametrize("part", ["prompt", "base"])
def test_nothing_is_kept_while_a_part_is_in_training_mode(part: str) -> None:
    """Where dropout may be drawn anew in every call."""
    model = frozen("ffn" if part == "prompt" else "p_tuning")  # keys and values see no base model
    (model.prompt_encoder if part == "prompt" else model.get_base_model()).train()
    model(input_ids=IDS)
    assert not model.folds.kept
    model.eval()(input_ids=IDS)
    assert model.folds.kept


def test_what_autocast_has_folded_is_not_taken_for_more_exact() -> None:
    model = frozen("prompt_tuning")
    expected = model(input_ids=IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(input_ids=IDS).logits.float(), expected)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_models_that_share_a_store_fold_for_themselves(tmp_path: Path) -> None:
    """Their numbers for the state of the base model never meet, not even where one takes the other's place."""
    frozen("prompt_tuning", seed=1).save_pretrained(tmp_path / "one")
    store, epochs = PromptStore(tmp_path), set()
    for seed in range(3):
        model = get_peft_model(tiny.build("llama", seed=seed), CONFIGS["ffn"]).eval().requires_grad_(False)
        model.attach(store)
        got = model(input_ids=IDS, adapter_names=["one", "one"]).logits
        fresh = SoftPromptModel.from_pretrained(model.get_base_model(), tmp_path / "one")
        torch.testing.assert_close(got, fresh(input_ids=IDS).logits)
        epochs.add(model.folds.epoch(model.get_base_model()))
    assert len(epochs) == 3


def test_a_model_with_a_store_can_be_copied(tmp_path: Path) -> None:
    frozen("prompt_tuning", seed=1).save_pretrained(tmp_path / "one")
    model = frozen("ffn")
    model.attach(PromptStore(tmp_path, max_bytes=1 << 20))
    expected = model(input_ids=IDS, adapter_names=["one", "default"]).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert copied.store is not model.store and copied.store.max_bytes == 1 << 20
        assert torch.equal(copied(input_ids=IDS, adapter_names=["one", "default"]).logits, expected)
