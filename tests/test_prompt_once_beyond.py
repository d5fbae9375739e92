"""Beyond decoders without dropout: prefixes of encoders and encoder-decoders over both backends, and dropout."""

from __future__ import annotations

import copy
from typing import Any

import conformance
import families
import naive
import pytest
import tiny
import torch
from conformance import Cell
from test_conformance import check_against_the_plain_formulation, check_generation
from test_prompt_once import error
from torch import Tensor

from softprompt import PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model

CELLS = [
    *(Cell("prefix_tuning", "bert", task) for task in families.FAMILIES["bert"].tasks),
    Cell("prefix_tuning", "roberta", "SEQ_CLS"),
    Cell("prefix_tuning", "modernbert", "TOKEN_CLS"),  # some of its layers have a window, to both sides
    *(Cell("prefix_tuning", family, "SEQ_2_SEQ_LM", variant)
      for family in ("t5", "bart") for variant in (None, "three_prefixes")),
    *(Cell("prefix_tuning", family, "CAUSAL_LM") for family in ("mistral_window", "gemma2", "gemma3", "gpt_oss")),
]  # fmt: skip
NO_SDPA = ("gemma2", "gpt_oss")  # in transformers
matrix = pytest.mark.parametrize(
    ("cell", "backend"),
    [(cell, name) for cell in CELLS for name in ("sdpa", "eager") if name != "sdpa" or cell.family not in NO_SDPA],
    ids=str,
)


@pytest.mark.pairwise
@matrix
def test_prefixes_equal_the_plain_formulation(cell: Cell, backend: str) -> None:
    model = with_backend(cell, backend)
    check_against_the_plain_formulation(cell, model.train())
    if cell.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        check_generation(cell, model.eval())


def with_backend(cell: Cell, backend: str) -> SoftPromptModel:
    model = cell.model()
    model.get_base_model().set_attn_implementation(backend)
    return model


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_beams_of_encoder_decoders(family: str, backend: str) -> None:
    """Padded sources, three beams each: the rows that share the prefixes are three times as many."""
    cell = Cell("prefix_tuning", family, "SEQ_2_SEQ_LM", "three_prefixes")
    model, rows = with_backend(cell, backend), conformance.rows(cell)
    batch = conformance.collate(cell, rows, "left")
    del batch["labels"]
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    tokens = model.generate(**batch, **options)[:, 1:].view(len(rows), 3, 4)
    for row, three in zip(rows, tokens, strict=True):
        assert torch.equal(three, beams(model, row.ids[None], 4, 3))


@torch.no_grad()
def beams(model: SoftPromptModel, row: Tensor, steps: int, count: int) -> Tensor:
    """As `naive.beams`, of what a decoder writes."""
    base, prompt = model.get_base_model(), naive.own_prompt(model)
    found = [(0.0, torch.tensor([[base.config.decoder_start_token_id]]))]
    for _ in range(steps):
        longer = []
        for score, ids in found:
            chances = naive.run(base, prompt, row, decoder_input_ids=ids).logits[0, -1].log_softmax(-1)
            longer += [
                (score + float(chances[token]), torch.cat([ids, token.view(1, 1)], dim=1))
                for token in chances.topk(count).indices
            ]
        found = sorted(longer, key=lambda each: -each[0])[:count]
    return torch.cat([ids[:, 1:] for _, ids in found])


@pytest.mark.pairwise
@matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_naive_way(cell: Cell, backend: str, dtype: torch.dtype) -> None:
    """Outputs and gradients beside the same weights in float32, and the naive way's in half precision."""
    model: Any = with_backend(cell, backend)
    model.get_base_model().to(dtype)
    exact = copy.deepcopy(model)
    exact.get_base_model().to(torch.float32)
    rows = conformance.rows(cell)
    (truth, true_by), (plain, plain_by) = (naively(cell, each, rows) for each in (exact, model))
    trained = [each for each in model.parameters() if each.requires_grad]
    for side in ("left", "right"):
        outputs = conformance.together(cell, model(**conformance.collate(cell, rows, side)), rows, side)
        loss = conformance.loss(cell, [{n: v.float() for n, v in each.items()} for each in outputs], rows)
        by = torch.autograd.grad(loss, trained, materialize_grads=True)
        got = [value.detach() for each in outputs for value in each.values()]
        for what, mine, theirs, right in (("outputs", got, plain, truth), ("gradients", by, plain_by, true_by)):
            ours, bare = error(list(mine), right), error(theirs, right)
            assert ours < 2 * bare + torch.finfo(dtype).eps, f"{what}, {side}: {ours:.1e}, the naive way's {bare:.1e}"


def naively(cell: Cell, model: SoftPromptModel, rows: list[conformance.Row]) -> tuple[list[Tensor], list[Tensor]]:
    alone = [conformance.alone(cell, model, row) for row in rows]
    trained = [each for each in model.parameters() if each.requires_grad]
    upcast = [{n: v.float() if v.is_floating_point() else v for n, v in each.items()} for each in alone]
    by = torch.autograd.grad(conformance.loss(cell, upcast, rows), trained, materialize_grads=True)
    names = conformance.OUTPUTS.get(cell.task, ("logits",))
    return [each[name].detach() for each in alone for name in names], list(by)


# ---- dropout -----------------------------------------------------------------------------------------------------

DRAWS = 250
DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "llama": {"attention_dropout": 0.2},
}


@pytest.mark.slow
@pytest.mark.pairwise
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_does_to_a_row_what_it_does_to_it_alone(family: str, backend: str, method: str) -> None:
    """Mean and variance of a row's logits over many draws, the naive way beside ours.

    The virtual tokens of a call draw once for all its rows, so it is the calls that are independent. Means are told
    apart by five standard errors; the variances, averaged over all logits, by a tenth.
    """
    kind = {"prompt_tuning": PromptTuningConfig, "prefix_tuning": PrefixTuningConfig}[method]
    base = tiny.build(family, attn_implementation=backend, **DROPOUT[family])
    torch.manual_seed(1)
    model, ids = get_peft_model(base, kind(num_virtual_tokens=4)).train(), torch.randint(3, tiny.VOCAB, (1, 5))
    rows = tiny.ragged((5, 7), side="left")
    rows["input_ids"][0, -5:] = ids[0]
    ways: list[Any] = [lambda: model(**rows).logits[0, -5:], lambda: naive.logits(model, ids)[0][0]]
    with torch.no_grad():
        ours, alone = (torch.stack([way() for _ in range(DRAWS)]).double() for way in ways)
        quiet = model.eval()(**rows).logits[0, -5:]
    error = ((ours.var(0) + alone.var(0)) / DRAWS).sqrt()
    assert ((ours.mean(0) - alone.mean(0)).abs() < 5 * error).all()
    assert 0.9 < ours.var(0).sum() / alone.var(0).sum() < 1.1
    assert ours.std(0).min() > 0 and not torch.equal(quiet, ours[0].float())


def test_rows_of_a_call_draw_apart() -> None:
    """Two equal rows in a batch differ with dropout in the rows, also where only the prefix's weights are dropped."""
    base = tiny.build("llama", attention_dropout=0.3)
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=6)).train()
    ids = torch.full((2, 1), 7)  # a first token has no other own key: its own weight alone and the prefix's
    first, second = model(input_ids=ids).logits
    assert not torch.equal(first, second)
