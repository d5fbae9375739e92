"""Scores per token: TRL's own on the bare model, and plain arithmetic on logits with a prompt before them."""

from types import MethodType
from typing import Any

import families
import naive
import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt import ConfigError, PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model
from softprompt.call import Call
from softprompt.model import run_for
from softprompt.running.token_scores import WANTED, Asked, token_scores
from softprompt.transformers_api import pop_fused_scores

CASES: dict[str, tuple[str, Any]] = {
    "folded": ("llama", PromptTuningConfig(num_virtual_tokens=4)),
    "prefix": ("gpt2", PrefixTuningConfig(num_virtual_tokens=4)),
    "softcapped": ("gemma2", PromptTuningConfig(num_virtual_tokens=4)),
    "rows": ("llama", PromptTuningConfig(num_virtual_tokens=4, placement="after_bos")),
    "state": ("lfm2", PromptTuningConfig(num_virtual_tokens=4)),
}
cases = pytest.mark.parametrize("case", CASES)
sides = pytest.mark.parametrize("side", ["left", "right"])


def build(family: str) -> PreTrainedModel:
    return families.build(family, "CAUSAL_LM")


def prompted(case: str) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(build(CASES[case][0]), CASES[case][1]).eval()


def labelled(side: str) -> dict[str, Tensor]:
    """Rows in which a few tokens have no label, the last ones of a prompt for instance."""
    batch = tiny.ragged(side=side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    drawn = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    return {**batch, "labels": labels.masked_fill(drawn, -100)}


def scores_of(model: SoftPromptModel, batch: dict[str, Tensor], enabled: bool = True, **more: Any) -> Any:
    call = Call.of({**batch, "return_dict": True})
    run = run_for(model, None, None, None, labelled=True) if enabled else None
    return token_scores(model.base_model, run, call, **more)


def ahead_of(model: SoftPromptModel, ids: Tensor) -> list[Tensor | None]:
    """The logits `[V]` that predict each token of a row `[1, t]`, as far as anything does."""
    if getattr(model.active_peft_config, "placement", None) != "after_bos":
        logits, first = naive.logits(model, ids)
        return [first if first is None else first.reshape(-1), *logits[0]]
    prompt = naive.own_prompt(model)
    logits = naive.run(model.get_base_model(), prompt, ids, first=1).logits[0]
    return [None, *logits[prompt.length :]]


def plainly(logits: Tensor, label: int, temperature: float) -> dict[str, Tensor]:
    """All scores of a label that logits `[V]` predict."""
    scaled = logits.float() / temperature
    chances = scaled.softmax(-1)
    return {
        "log_probs": chances[label].log(),
        "entropy": -(chances * chances.log()).sum(),
        "log_sum_sq_probs": chances.square().sum().log(),
        "mean_logits": scaled.mean(),
        "is_top1": scaled.argmax() == label,
        "label_mask": torch.tensor(True),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@sides
@cases
def test_every_score_is_where_its_label_is(case: str, side: str, temperature: float) -> None:
    model, batch = prompted(case), labelled(side)
    with torch.no_grad():
        scores = scores_of(model, batch, temperature=temperature)
        found = {name: scores[name] for name in (*WANTED, "label_mask")}
        expected = {name: torch.zeros(batch["labels"].shape, dtype=each.dtype) for name, each in found.items()}
        for row, (ids, mask) in enumerate(zip(naive.rows(batch), batch["attention_mask"], strict=True)):
            ahead = ahead_of(model, ids)
            for place, column in enumerate(mask.nonzero()[:, 0].tolist()):
                label = int(batch["labels"][row, column])
                if label != -100 and ahead[place] is not None:
                    for name, value in plainly(ahead[place], label, temperature).items():
                        expected[name][row, column] = value
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4)


@cases
def test_what_is_asked_for_is_given_and_nothing_else(case: str) -> None:
    model, batch = prompted(case), labelled("right")
    everything = scores_of(model, batch)
    for wanted in (("log_probs",), ("log_probs", "mean_logits"), ("entropy", "is_top1"), WANTED):
        scores = scores_of(model, batch, wanted=wanted)
        given = {name for name in WANTED if getattr(scores, name) is not None}
        assert given == {*wanted, "log_probs"}  # which the loss is made of, as in TRL
        for name in given:
            assert torch.equal(scores[name], everything[name])
    with pytest.raises(ConfigError, match=r"no score 'perplexity'.*log_probs, entropy, log_sum_sq_probs"):
        scores_of(model, batch, wanted=("log_probs", "perplexity"))
    with pytest.raises(ConfigError, match="temperature=0 "):
        scores_of(model, batch, temperature=0)


@cases
def test_gradients_of_log_probabilities_and_entropy(case: str) -> None:
    model, batch = prompted(case), labelled("left")
    scores = scores_of(model, batch, temperature=0.7)
    assert not any(scores[name].requires_grad for name in WANTED[2:])
    parameters = [each for each in model.parameters() if each.requires_grad]
    logs = scores.log_probs.sum() + 0.3 * scores.entropy.sum()
    total = torch.zeros(())
    for row, ids in enumerate(naive.rows(batch)):
        columns = batch["attention_mask"][row].nonzero()[:, 0].tolist()
        ahead = ahead_of(model, ids)
        for place, column in enumerate(columns):
            label = int(batch["labels"][row, column])
            if label != -100 and ahead[place] is not None:
                parts = plainly(ahead[place], label, 0.7)
                total = total + parts["log_probs"] + 0.3 * parts["entropy"]
    torch.testing.assert_close(logs, total, atol=1e-4, rtol=1e-4)
    for got, wanted in zip(torch.autograd.grad(logs, parameters), torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


# ---- beside TRL --------------------------------------------------------------------------------------------------

FUSED: list[dict[str, Any]] = [
    {"outputs": ("log_probs", "entropy", "mean_logits", "is_top1")},  # DPO
    {"outputs": WANTED},  # DPO with WPO's weights
    {"outputs": ("log_probs", "entropy", "mean_logits")},  # KTO
    {"outputs": ("log_probs", "entropy"), "temperature": 0.7},  # GRPO
    {"outputs": ("log_probs", "entropy", "is_top1")},  # SFT
    {},
]


def asked_by_trl(model: Any, fused_lm_head: Any) -> Asked:
    asked = pop_fused_scores(model, {"fused_lm_head": fused_lm_head})
    assert asked is not None
    return Asked(**asked)


def fused() -> Any:
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("an earlier TRL")
    return utils.add_fused_lm_head


@pytest.mark.pairwise
@pytest.mark.parametrize("options", FUSED, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "lfm2", "mixtral"])
def test_trls_own_on_the_bare_model(family: str, options: dict[str, Any]) -> None:
    add, base = fused(), build(family)
    add(base, **options)
    model = get_peft_model(build(family), PromptTuningConfig(num_virtual_tokens=4)).eval()
    add(model, **options)
    asked = asked_by_trl(model, True)
    for side in ("left", "right"):
        batch = labelled(side)
        theirs = base(**batch, fused_lm_head=True)
        ours = scores_of(model, batch, enabled=False, wanted=asked.wanted, temperature=asked.temperature)
        for name in (*WANTED, "label_mask", "loss"):
            given = theirs.get(name)
            if given is None:
                assert getattr(ours, name) is None
            else:
                torch.testing.assert_close(ours[name], given, atol=2e-5, rtol=1e-4)


def test_what_trl_notes_down_is_found() -> None:
    add = fused()
    model = prompted("folded")
    assert asked_by_trl(model, True) == Asked()
    assert asked_by_trl(model, ("log_probs", "mean_logits")) == Asked(("log_probs", "mean_logits"))
    add(model, outputs=("log_probs", "entropy"), temperature=0.7)
    assert asked_by_trl(model, True) == Asked(("log_probs", "entropy"), 0.7)
    mixed = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward.__func__)  # what accelerate makes of it
    model.forward = MethodType(mixed, model)
    assert asked_by_trl(model, True) == Asked(("log_probs", "entropy"), 0.7)
    with pytest.raises(ConfigError, match="no score 'loss'"):
        asked_by_trl(model, ("loss",))


@pytest.mark.parametrize("options", FUSED, ids=str)
def test_a_model_as_trl_calls_it(options: dict[str, Any]) -> None:
    add, model, batch = fused(), prompted("folded"), labelled("right")
    expected = scores_of(model, batch, wanted=options.get("outputs", ("log_probs",)),
                         temperature=options.get("temperature", 1.0))  # fmt: skip
    add(model, **options)
    scores = model(**batch, fused_lm_head=True)
    for name in (*WANTED, "label_mask", "loss"):
        if getattr(expected, name) is None:
            assert getattr(scores, name) is None
        else:
            torch.testing.assert_close(scores[name], expected[name])
