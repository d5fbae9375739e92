"""CUDA's kernels behind `attend`: what they are given, what happens where they are wrong, and, on a GPU, their results.

Without a GPU `stand_ins` take the kernels' places. Tests that need one are skipped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import cuda_stand_ins
import pytest
import shared_kit
import torch
from torch import Tensor

from softprompt.attention import attend, cpu, cuda, shared, trust

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)


def _mask(rows: str, *shape: int) -> Tensor:
    """A mask that is added; every query sees something, of the row or of its prompt."""
    mask = shared_kit.hidden(shape, torch.float32)
    if "empty" in rows:
        mask[..., 0] = 0
    return mask


# ---- what they are given, without a GPU -------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, Callable[..., Any]] = {
        "_FLASH": cuda_stand_ins.flash,
        "_FLASH_BACKWARD": cuda_stand_ins.flash_backward,
        "_EFFICIENT": cuda_stand_ins.efficient,
        "_EFFICIENT_BACKWARD": cuda_stand_ins.efficient_backward,
        "_has_flash": lambda device: True,
    }
    for name, function in named.items():
        monkeypatch.setattr(cuda, name, function)


@pytest.mark.pairwise
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("dtype", cuda.TYPES)
def test_what_the_cuda_kernels_are_given(stand_ins: None, dtype: torch.dtype, size: int, biased: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trust.agrees(shared._fast, shared._plain, torch.device("cpu"), dtype, size, biased)


def test_queries_of_a_short_prefix_are_cut(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has too few blocks of its keys otherwise; what comes out is the same, for several prompts as for one."""
    few, many = torch.empty(1, 8, 100, 64), torch.empty(1, 8, 16384, 64)
    assert cuda._parts(many, few) == 32
    assert cuda._parts(many, torch.empty(1, 8, 4097, 64)) == cuda._parts(few, few) == 1
    states = [torch.randn(2, 3, length, 8) for length in (130, 7, 7)]
    output, lse = cuda.forward(states[0], states[1], states[2], None, False, None)
    given = (torch.randn_like(output), *states, output, lse)
    cut = cuda.backward(*given, None, False, None)
    assert cuda._parts(states[0], states[1]) == 2
    monkeypatch.setattr(cuda, "_parts", lambda query, key: 1)
    for mine, true in zip(cut, cuda.backward(*given, None, False, None), strict=True):
        close(mine, true)


@pytest.mark.pairwise
@pytest.mark.parametrize("span", shared_kit.SPANS)
@pytest.mark.parametrize("heads", shared_kit.HEADS)
@pytest.mark.parametrize("rows", shared_kit.ROWS)
def test_cuda_kernels_in_batches_of_all_kinds(stand_ins: None, rows: str, heads: str, span: str) -> None:
    """With every kind of bias, and grouped queries that are causal."""
    base = shared_kit.batch(heads, span, rows)
    for before in (None if each is None else each.clamp(min=-1e38) for each in shared_kit.biases(base)):
        whole = span == "whole" and before is None
        bias = None if whole else _mask(rows, 4, 1, base.query.shape[2], base.key.shape[2])
        given = shared_kit.batch(heads, span, rows, bias=bias, before=before, causal=whole)
        single, wanted = given.to(torch.float32).leaves(), given.to(torch.float32).to(torch.float64).leaves()
        got, expected = _with(cuda, single), shared_kit.naive(wanted)
        close(got.double(), expected)
        pairs = zip(shared_kit.gradients(got, single), shared_kit.gradients(expected, wanted), strict=True)
        for mine, true in pairs:
            close(mine.double(), true)


def _with(kernel: Any, given: shared_kit.Batch) -> Any:
    return shared._Shared.apply(*given.states, given.prefix, given.bias, given.causal, given.scale, kernel)


@pytest.mark.pairwise
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [64, 12])
@pytest.mark.parametrize("dtype", cuda.TYPES)
def test_torch_takes_the_arguments(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, biased: bool, causal: bool
) -> None:
    """Torch's own operators, by their schemas and shape rules alone: on tensors without numbers."""
    monkeypatch.setattr(cuda, "_has_flash", lambda device: True)
    states = [torch.empty(2, heads, 37, size, dtype=dtype, device="meta") for heads in (4, 2, 2)]
    bias = torch.empty(2, 1, 37, 37, dtype=dtype, device="meta") if biased else None
    output, lse = cuda.forward(states[0], states[1], states[2], bias, causal, None)
    assert (output.shape, output.dtype, lse.shape, lse.dtype) == ((2, 4, 37, size), dtype, (2, 4, 37), torch.float32)
    grads = cuda.backward(output, states[0], states[1], states[2], output, lse, bias, causal, None)
    assert [(each.shape, each.dtype) for each in grads] == [(each.shape, dtype) for each in states]


# ---- a kernel that is not what it should be ----------------------------------------------------------------------


class Wrong:
    """The CPU's kernel with a log-sum-exp in base 2, as some kernels have it."""

    backward = staticmethod(cpu.backward)

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, Tensor]:
        output, lse = cpu.forward(*given)
        return output, lse / math.log(2)


class Refusing:
    @staticmethod
    def forward(*given: Any) -> Any:
        raise RuntimeError("no kernel found to launch!\nmore")


@pytest.mark.parametrize(("kernel", "why"), [(Wrong, "differ by"), (Refusing, r"no kernel found to launch!\)")])
def test_a_kernel_that_does_not_agree_is_named_once(monkeypatch: pytest.MonkeyPatch, kernel: Any, why: str) -> None:
    monkeypatch.setattr(shared, "cuda", kernel)
    monkeypatch.setattr(shared, "_TRUSTED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(trust.PlainAttentionWarning, match=f"cpu.*float32.*heads of 16.*{why}.*plain formula") as caught:
        assert not shared._trusted("cpu", torch.float32, 16, biased=False)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not shared._trusted("cpu", torch.float32, 16, biased=False)


def test_a_kernel_is_not_tried_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "cuda", cpu)
    monkeypatch.setattr(shared, "_TRUSTED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not shared._trusted("cpu", torch.float32, 16, biased=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert shared._trusted("cpu", torch.float32, 16, biased=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert shared._trusted("cpu", torch.float32, 16, biased=False)


def test_a_kernel_is_tried_outside_of_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "cuda", cpu)
    monkeypatch.setattr(shared, "_TRUSTED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    @torch.compile(backend="eager", fullgraph=True)
    def double(values: Tensor) -> Tensor:
        return values * 2 if shared._trusted("cpu", torch.float32, 16, True) else values

    before = torch.get_rng_state()
    with torch.inference_mode():
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert {("cpu", torch.float32, 16, biased): True for biased in (False, True)} == shared._TRUSTED
    assert torch.equal(torch.get_rng_state(), before)


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [12, 64, 128])
@pytest.mark.parametrize("dtype", cuda.TYPES)
def test_cuda_kernels_agree_with_the_plain_formula(dtype: torch.dtype, size: int, biased: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trust.agrees(shared._fast, shared._plain, torch.device("cuda", 0), dtype, size, biased)


@gpu
@pytest.mark.parametrize("span", shared_kit.SPANS)
@pytest.mark.parametrize("rows", shared_kit.ROWS)
@pytest.mark.parametrize("dtype", cuda.TYPES)
def test_attend_on_a_gpu(dtype: torch.dtype, rows: str, span: str) -> None:
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    base = shared_kit.batch("GQA", span, rows, causal=span == "whole")
    given, wanted = base.to(dtype).leaves(), base.to(dtype).to(torch.float64).leaves()
    there = given.with_states(*(each.to("cuda") for each in given.states))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = attend(*there.arguments).cpu()
    expected = shared_kit.naive(wanted)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    pairs = zip(shared_kit.gradients(got, given), shared_kit.gradients(expected, wanted), strict=True)
    for mine, true in pairs:
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)
