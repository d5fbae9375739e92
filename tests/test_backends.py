"""Flex attention: what it gives is what the plain ways give, in whole models and alone.

torch refuses gradients of flex attention on the CPU, and transformers compiles it; `flexible` lifts both, so that the
code for other devices runs here, through torch's own unfused formula. Tests that need a GPU are skipped without one.
"""

from __future__ import annotations

from typing import Any

import families
import naive
import pytest
import shared_kit
import tiny
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from softprompt import KV, PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, UnsupportedError, get_peft_model
from softprompt.attention import flex, groups_of
from softprompt.attention.shared import Prefix, plain

CONFIGS = {"kv": PrefixTuningConfig, "embeddings": PromptTuningConfig}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def flexible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for devices that flex attention is made for, on the CPU."""
    from torch.nn.attention import flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    create = masking_utils.create_block_mask
    monkeypatch.setattr(flex, "available", lambda device: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *states: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **asked: create(**(asked | {"_compile": False})))

    def uncompiled(*states: Tensor, training: bool, **options: Any) -> Any:
        return flex_attention.flex_attention(*states, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)


def make(backend: str, kind: str, family: str = "llama", **overrides: Any) -> SoftPromptModel:
    """The backend is chosen last, for transformers compiles the bare model's flex attention on the CPU."""
    base = tiny.build(family, **overrides)
    torch.manual_seed(0)
    model = get_peft_model(base, CONFIGS[kind](num_virtual_tokens=6)).eval()
    base.set_attn_implementation(backend)
    assert base.config._attn_implementation == backend
    return model


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)


# ---- flex attention, whole models --------------------------------------------------------------------------------


def _equal_to_naive(kind: str, side: str, **overrides: Any) -> None:
    family = "mistral" if overrides else "llama"
    model, batch = make("flex_attention", kind, family, **overrides), tiny.ragged((3, 14, 5), side=side)
    plainer = make("eager", kind, family, **overrides)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    for row, got, mask in zip(naive.rows(batch), output.logits, batch["attention_mask"], strict=True):
        close(got[mask.bool()], naive.logits(plainer, row)[0][0])
    expected = naive.loss(plainer, batch, labels)
    close(output.loss, expected)
    grads = torch.autograd.grad(output.loss, list(model.prompt_encoder.parameters()))
    wanted = torch.autograd.grad(expected, list(plainer.prompt_encoder.parameters()))
    for got, true in zip(grads, wanted, strict=True):
        assert torch.count_nonzero(true)
        close(got, true)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_flex_equals_naive_logits_loss_and_gradients(flexible: None, kind: str, side: str) -> None:
    _equal_to_naive(kind, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_flex_with_a_sliding_window(flexible: None, kind: str, side: str) -> None:
    _equal_to_naive(kind, side, sliding_window=8)


@pytest.mark.parametrize("kind", CONFIGS)
def test_flex_on_the_cpu_trains_as_well(kind: str) -> None:
    """Where torch has no gradients of it, the prompt does not go through it."""
    _equal_to_naive(kind, "left")
    _equal_to_naive(kind, "right", sliding_window=8)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3", "bert", "bart", "t5"])
def test_flex_in_families_equals_eager(flexible: None, family: str) -> None:
    """Capped scores, sinks, values of another size, no causality, prefixes of three kinds, relative positions."""
    kind = families.FAMILIES[family].kind
    task = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}[kind]
    lengths = (9,) if family == "t5" else (3, 14, 5)  # transformers itself takes one row of it
    inputs = tiny.ragged(lengths)
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.randint(3, 50, (len(lengths), 4))
    found = []
    for backend in ("flex_attention", "eager"):
        base = families.build(family, task)
        torch.manual_seed(0)
        model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=6, task_type=task)).eval()
        base.set_attn_implementation(backend)
        logits = model(**inputs).logits
        seen = logits[inputs["attention_mask"].bool()] if kind == "decoder" else logits
        found.append((seen, *torch.autograd.grad(seen.sin().sum(), list(model.prompt_encoder.parameters()))))
    for got, expected in zip(*found, strict=True):
        assert torch.count_nonzero(expected)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_flex_generates_what_eager_does(flexible: None, kind: str, beams: int) -> None:
    """Not with a static cache, which transformers itself cannot combine with it."""
    batch = tiny.ragged((3, 7, 5), side="left")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
    options["num_beams"] = beams
    got, expected = (make(backend, kind).generate(**batch, **options) for backend in ("flex_attention", "eager"))
    assert torch.equal(got, expected)


def test_flex_gives_each_row_its_own_prompt(flexible: None) -> None:
    """Prompts of several lengths, given as keys and values; rows 0 and 3 share one."""
    model, other = make("flex_attention", "kv"), make("eager", "kv")
    shape, lengths, rows = (3, 2, 6, 8), (6, 2, 4), [1, 2, 0, 1]
    layers = tuple((torch.randn(shape), torch.randn(shape)) for _ in range(2))
    batch = tiny.ragged((3, 9, 5, 4), side="left")
    with torch.no_grad(), model.way.open(KV(layers, rows=torch.tensor(rows), lengths=lengths)):
        output = model.get_base_model()(**batch).logits
    for row, got, mask, prompt in zip(naive.rows(batch), output, batch["attention_mask"], rows, strict=True):
        alone = KV(tuple(tuple(part[prompt, None, :, 6 - lengths[prompt] :] for part in pair) for pair in layers))
        with torch.no_grad():
            close(got[mask.bool()], naive.run(other.get_base_model(), alone, row).logits[0])


def test_flex_has_no_dropout(flexible: None) -> None:
    model = make("flex_attention", "kv", attention_dropout=0.5).train()
    with pytest.raises(UnsupportedError, match=r"no dropout.*0\.5.*'sdpa'"):
        model(**tiny.ragged())


def test_backends_that_are_refused_name_those_that_are_not() -> None:
    model = make("eager", "kv")
    AttentionInterface.register("of_ones_own", sdpa_attention_forward)
    model.get_base_model().set_attn_implementation("of_ones_own")
    with pytest.raises(UnsupportedError, match=r"'of_ones_own'.*'flex_attention', 'sdpa' or 'eager'"):
        model(**tiny.ragged())


# ---- flex attention, the kernel ----------------------------------------------------------------------------------


def _through_flex(given: shared_kit.Batch, **options: Any) -> Tensor:
    return flex.attend(
        given.query,
        given.key,
        given.value,
        given.prefix,
        None,
        given.bias,
        flex.Options(scale=given.scale, **options),
    )


def _mask(rows: str, *shape: int) -> Tensor:
    """A mask that is added; every query sees something, of the row or of its prompt."""
    mask = shared_kit.hidden(shape, torch.float32)
    if "empty" in rows:
        mask[..., 0] = 0
    return mask


@pytest.mark.pairwise
@pytest.mark.parametrize("heads", shared_kit.HEADS)
@pytest.mark.parametrize("rows", shared_kit.ROWS)
def test_flex_and_its_gradients_equal_concatenation(flexible: None, rows: str, heads: str) -> None:
    given = shared_kit.batch(heads, "chunk", rows, bias=_mask(rows, 4, 1, 3, 7)).to(torch.float32)
    given, wanted = given.leaves(), given.to(torch.float64).leaves()
    got, expected = _through_flex(given), shared_kit.naive(wanted)
    close(got.double(), expected)
    pairs = zip(shared_kit.gradients(got, given), shared_kit.gradients(expected, wanted), strict=True)
    for mine, true in pairs:
        close(mine.double(), true)


def test_flex_with_softcap_and_sinks(flexible: None) -> None:
    """A sink is one more key of the same score for every query, whose value is nothing."""
    given, sinks = shared_kit.batch().to(torch.float32), torch.randn(4)
    got = _through_flex(given, softcap=1.5, sinks=sinks)
    for number in range(len(given.query)):
        key, value = shared_kit.in_front(given, number)
        scores = 1.5 * torch.tanh(given.query[number] @ key.mT * given.scale / 1.5)
        weights = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1).softmax(-1)
        close(got[number], weights[..., :-1] @ value)


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers' call of create_block_mask
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_models_on_a_gpu(kind: str, backend: str, side: str) -> None:
    model, plainer = (make(each, kind, head_dim=16) for each in (backend, "eager"))  # Triton wants 16 at least
    model.to("cuda")
    batch = tiny.ragged((3, 14, 5), side=side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    there = {name: each.to("cuda") for name, each in {**batch, "labels": labels}.items()}
    loss, expected = model(**there).loss, naive.loss(plainer, batch, labels)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-3, atol=1e-3)
    grads = torch.autograd.grad(loss, list(model.prompt_encoder.parameters()))
    wanted = torch.autograd.grad(expected, list(plainer.prompt_encoder.parameters()))
    for got, true in zip(grads, wanted, strict=True):
        assert float((got.cpu() - true).norm()) <= 1e-2 * float(true.norm())


@gpu
def test_flex_attention_on_a_gpu_equals_the_plain_formula() -> None:
    states = [torch.randn(4, heads, 40, 32, device="cuda") for heads in (4, 2, 2)]
    prefix = Prefix(
        *(torch.randn(1, 2, 19, 32, device="cuda") for _ in range(2)), groups_of(4, 19, None, None, states[0].device)
    )
    states = [each.requires_grad_() for each in (*states, prefix.key, prefix.value)]
    got = flex.attend(*states[:3], prefix, None, None, flex.Options(training=True))
    expected = plain(*states[:3], prefix)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    grads, wanted = (torch.autograd.grad(each.square().sum(), states) for each in (got, expected))
    for mine, true in zip(grads, wanted, strict=True):
        assert float((mine - true).norm()) <= 1e-2 * float(true.norm())
