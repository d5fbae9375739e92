"""`torch.export` with sizes that vary, and ONNX: what comes out at other sizes is what the model gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor, nn

from softprompt import PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model

FAMILIES = ("llama", "gpt2", "bert")
BOTH = [PromptTuningConfig, PrefixTuningConfig]
SHAPES = [((5, 9), "left"), ((3, 7, 12), "right"), ((4,), "left"), ((6, 2, 11, 3), "left")]


class Logits(nn.Module):
    """What is exported: tensors in, logits out."""

    def __init__(self, model: SoftPromptModel, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def made(family: str, config_class: Any, frozen: bool = True) -> Logits:
    task, options = ("SEQ_CLS", {}) if family == "bert" else ("CAUSAL_LM", {"use_cache": False})
    torch.manual_seed(0)
    model = get_peft_model(families.build(family, task), config_class(task_type=task, num_virtual_tokens=4)).eval()
    if frozen:
        model.requires_grad_(False)
    return Logits(model, **options).eval()


def check(family: str, wrapped: Logits, run: Any) -> None:
    for lengths, side in SHAPES:
        batch = tiny.ragged(lengths, side)
        got, want = run(batch["input_ids"], batch["attention_mask"]), wrapped(**batch)
        real = slice(None) if family == "bert" else batch["attention_mask"].bool()
        torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config_class", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_export_with_sizes_that_vary(family: str, config_class: Any) -> None:
    """A frozen prompt is exported folded; one that trains, as it was then."""
    frozen = family != "gpt2"
    wrapped, batch = made(family, config_class, frozen), tiny.ragged((5, 9), "left")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        wrapped, (batch["input_ids"], batch["attention_mask"]), dynamic_shapes=(sizes, sizes)
    )
    check(family, wrapped, exported.module())


@pytest.mark.filterwarnings("ignore")  # torch's and onnxscript's own
@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="needs onnxscript")
@pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="needs onnxruntime")
@pytest.mark.parametrize("config_class", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_onnx(family: str, config_class: Any, tmp_path: Path) -> None:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    wrapped, batch = made(family, config_class), tiny.ragged((5, 9), "left")
    sizes = {0: "batch", 1: "tokens"}
    inputs = batch["input_ids"], batch["attention_mask"]
    program = torch.onnx.export(wrapped, inputs, dynamo=True, dynamic_shapes=(sizes, sizes), verbose=False)
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*given: Tensor) -> Tensor:
        values = {name: value.numpy() for name, value in zip(names, given, strict=True)}
        return torch.from_numpy(session.run(None, values)[0])

    check(family, wrapped, run)
