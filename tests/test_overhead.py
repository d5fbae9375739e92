"""What a prompt adds to a step beside the bare model's own work, counted: operations, signatures read, encoder runs."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import hf_cache
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from softprompt import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, SoftPromptModel, get_peft_model

LAYERS = 2
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
METHODS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4),
    "prompt_tuning": lambda: PromptTuningConfig(num_virtual_tokens=4),
    "p_tuning": lambda: PromptEncoderConfig(num_virtual_tokens=4),
}
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
NEVER = ("aten.cat", "aten._to_copy", "aten.copy_", "aten._local_scalar_dense")  # longer keys, other devices, waiting


class Operations(TorchDispatchMode):
    """Counts what reaches torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def make(family: str, method: str) -> SoftPromptModel:
    torch.manual_seed(0)
    model = get_peft_model(tiny.build(family), METHODS[method]()).eval()
    model.set_adapter("default", inference_mode=True)
    return model


def of_a_step(model: PreTrainedModel | SoftPromptModel, ids: Tensor) -> Counter[str]:
    """The operations of one more token in `generate`."""
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, **GREEDY)  # folds once
    counted = []
    for tokens in (4, 5):
        with Operations() as operations:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **GREEDY)
        counted.append(operations.found)
    return counted[1] - counted[0]


@pytest.mark.pairwise
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_of_generate_adds_one_kernel_and_a_merge_per_layer(family: str, method: str, rows: int) -> None:
    model = make(family, method)
    ids = torch.randint(3, tiny.VOCAB, (rows, 6))
    added = of_a_step(model, ids) - of_a_step(model.get_base_model(), ids)
    assert added[FLASH] == LAYERS
    assert added["aten.lerp_.Tensor"] == added["aten.sigmoid_.default"] == added["aten.sub.Tensor"] == LAYERS
    assert added["aten.add.Tensor"] <= 1  # the positions
    if rows == 1 and family == "gpt2":
        assert sum(added.values()) <= 5 * LAYERS + 2
    assert not [name for name in added if name.startswith(NEVER)]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_by_hand_on_a_frozen_prompt_runs_no_encoder(method: str) -> None:
    model, ids = make("gpt2", method), torch.randint(3, tiny.VOCAB, (1, 6))
    found = []
    for call in (model.get_base_model(), model):
        cache = DynamicCache()
        with torch.no_grad():
            call(input_ids=ids, **hf_cache.given(call, cache), use_cache=True)
            with Operations() as operations:
                call(input_ids=ids[:, :1], **hf_cache.given(call, cache), use_cache=True)
        found.append(operations.found)
    added = found[1] - found[0]
    assert added[FLASH] == LAYERS
    assert not added["aten.addmm.default"]
    assert not added["aten.embedding.default"]
    assert sum(added.values()) <= 5 * LAYERS + 6


def count_calls(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    run = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: calls.append(kwargs) or run(*args, **kwargs))
    return calls


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_encoder_and_fold_run_once_per_generate(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("gpt2"), METHODS[method]()).eval()  # one that trains, of which nothing is kept
    encoder, body = (
        count_calls(model.encoder(), monkeypatch),
        count_calls(model.get_base_model().transformer, monkeypatch),
    )
    ids = torch.randint(3, tiny.VOCAB, (3, 6))
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=2, **GREEDY)
    assert len(encoder) == 1
    folds = [call["inputs_embeds"] for call in body if call.get("inputs_embeds") is not None]
    assert [tuple(each.shape[:2]) for each in folds] == [(1, 4)]
    assert len(body) == 1 + 6


@pytest.mark.parametrize("method", METHODS)
def test_no_signature_is_read_in_a_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("gpt2"), METHODS[method]()).train()
    batch = tiny.ragged()
    batch["labels"] = batch["input_ids"]
    read: list[Any] = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda *args, **kwargs: read.append(args) or signature(*args, **kwargs))

    def during(call: Callable[[], Any]) -> int:
        read.clear()
        call()
        return len(read)

    base, ids = model.get_base_model(), {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert during(lambda: model(**batch)) == during(lambda: base(**batch)) == 0
    ours = during(lambda: model.generate(**ids, max_new_tokens=4, **GREEDY))
    assert ours == during(lambda: base.generate(**ids, max_new_tokens=4, **GREEDY))


def test_a_step_registers_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2", "prefix")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a hook")

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", refuse)
    monkeypatch.setattr(nn.Module, "register_forward_hook", refuse)
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6]])).logits).all()
