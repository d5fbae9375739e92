"""Whole models whose rows share a prompt give what each row gives with the prompt concatenated: training to beams.

Every registered method, before queries that share key-value heads in all three ways, over both backends, with padding
on either side, on both, and none.
"""

from __future__ import annotations

import copy
from typing import Any

import conformance
import hf_cache
import naive
import pytest
import tiny
import torch
from conformance import Cell, Row
from torch import Tensor

from softprompt import METHODS, SoftPromptModel, get_peft_model

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "MHA": ("llama", {"num_key_value_heads": 4}),
    "GQA": ("llama", {}),
    "MQA": ("llama", {"num_key_value_heads": 1}),
}
LENGTHS = (3, 9, 6, 5)
PADDINGS = ("left", "right", "both")  # in front of a row, behind it, one column in front and the rest behind


def make(shape: str, backend: str, method: str) -> tuple[Cell, SoftPromptModel]:
    family, options = SHAPES[shape]
    cell = Cell(method, family, "CAUSAL_LM")
    base = tiny.build(family, attn_implementation=backend, **options)
    torch.manual_seed(1)
    return cell, get_peft_model(base, cell.config()).eval()


def rows_of(cell: Cell, lengths: tuple[int, ...] = LENGTHS) -> list[Row]:
    """Rows with a label for almost every token; of several tasks they take turns, so that none has neighbours."""
    random, found = torch.Generator().manual_seed(0), []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, tiny.VOCAB - 8, (length,), generator=random)
        target = ids.clone()
        target[[0, 2] if number == 1 else [1]] = -100
        found.append(Row(ids, target, task_ids=torch.tensor([number % cell.tasks]) if cell.tasks else None))
    return found


def padded(some: list[Row], padding: str) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels` `[B, T]`, and `task_ids` `[B]` where rows have tasks."""
    width = max(len(row.ids) for row in some) + (padding == "both")
    shape = len(some), width
    batch = {"input_ids": torch.full(shape, tiny.PAD), "attention_mask": torch.zeros(shape, dtype=torch.long),
             "labels": torch.full(shape, -100)}  # fmt: skip
    for number, row in enumerate(some):
        begin = {"left": width - len(row.ids), "right": 0, "both": 1}[padding]
        at = number, slice(begin, begin + len(row.ids))
        batch["input_ids"][at], batch["attention_mask"][at], batch["labels"][at] = row.ids, 1, row.target
    tasks = [row.task_ids for row in some if row.task_ids is not None]
    return batch | ({"task_ids": torch.cat(tasks)} if tasks else {})


def batches(cell: Cell) -> list[tuple[str, list[Row], dict[str, Tensor]]]:
    """Rows of different lengths in every padding, and rows of one length, with and without a mask of ones."""
    ragged, even = rows_of(cell), rows_of(cell, (6, 6, 6, 6))
    found = [(padding, ragged, padded(ragged, padding)) for padding in PADDINGS]
    full = padded(even, "left")
    bare = {name: value for name, value in full.items() if name != "attention_mask"}
    return [*found, ("mask of ones", even, full), ("no mask", even, bare)]


def close(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4, msg=lambda text: f"{what}: {text}")


matrix = pytest.mark.parametrize(
    ("shape", "backend", "method"),
    [(shape, backend, method) for shape in SHAPES for backend in ("sdpa", "eager") for method in METHODS],
)


@pytest.mark.pairwise
@matrix
def test_training_step(shape: str, backend: str, method: str) -> None:
    """Logits of real tokens, the loss, and the gradient of everything that trains."""
    cell, model = make(shape, backend, method)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    expected: dict[int, Any] = {}
    for padding, some, batch in batches(cell):
        if id(some) not in expected:
            alone = [conformance.alone(cell, model, row) for row in some]
            loss = conformance.loss(cell, alone, some)
            by = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            expected[id(some)] = some, alone, loss, by
        _, alone, loss, by = expected[id(some)]
        output = model.train()(**batch)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for number, mine in enumerate(alone):
            close(output.logits[number][real[number]], mine["logits"], f"{padding}, row {number}")
        close(output.loss, loss, f"{padding}, loss")
        found = torch.autograd.grad(output.loss, list(parameters.values()), materialize_grads=True)
        assert any(each.abs().max() > 1e-4 for each in by)
        for name, got, wanted in zip(parameters, found, by, strict=True):
            close(got, wanted, f"{padding}, gradient of {name}")
        model.eval()


@pytest.mark.pairwise
@matrix
def test_prefill_and_decoding(shape: str, backend: str, method: str) -> None:
    """A prefill, then two tokens at once, then one at a time; the cache holds real tokens only."""
    cell, model = make(shape, backend, method)
    for padding, some, batch in batches(cell):
        more = torch.randint(3, tiny.VOCAB - 8, (len(some), 4), generator=torch.Generator().manual_seed(9))
        whole = [naive_logits(model, row, torch.cat([row.ids, rest])) for row, rest in zip(some, more, strict=True)]
        for number, (got, real) in enumerate(decoded(model, batch, more)):
            expected = whole[number]
            close(got[real], expected, f"{padding}, row {number}")


def naive_logits(model: SoftPromptModel, row: Row, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return naive.logits(model, ids[None], **row.of_task)[0][0]


@torch.no_grad()
def decoded(model: SoftPromptModel, batch: dict[str, Tensor], more: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Logits `[T + n, V]` of each row when `more` `[B, n]` follow it, and which of them are of real tokens."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    mask = given.pop("attention_mask", None)
    ids, of_task = given["input_ids"], {name: value for name, value in given.items() if name == "task_ids"}
    output = model(**given, **({} if mask is None else {"attention_mask": mask}), use_cache=True)
    found, cache, ones = [output.logits], hf_cache.of(output), torch.ones_like(ids)
    seen, begin = ones if mask is None else mask, 0
    for count in (2, 1, 1):
        assert cache.get_seq_length() == ids.shape[1] + begin
        step = more[:, begin : begin + count]
        seen, begin = torch.cat([seen, torch.ones_like(step)], dim=1), begin + count
        masked = {} if mask is None else {"attention_mask": seen}
        output = model(input_ids=step, **hf_cache.given(model, cache), **masked, **of_task)
        found.append(output.logits)
    return list(zip(torch.cat(found, dim=1), seen.bool(), strict=True))


@pytest.mark.pairwise
@matrix
def test_greedy_generation_and_beams(shape: str, backend: str, method: str) -> None:
    cell, model = make(shape, backend, method)
    some = rows_of(cell)
    batch = padded(some, "left")
    del batch["labels"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
    greedy = model.generate(**batch, **options)[:, -4:]
    best = model.generate(**batch, **options, num_beams=3, num_return_sequences=3)[:, -4:].view(len(some), 3, 4)
    for row, one, three in zip(some, greedy, best, strict=True):
        with torch.no_grad():
            assert torch.equal(one[None], naive.greedy(model, row.ids[None], 4, **row.of_task))
            assert torch.equal(three, naive.beams(model, row.ids[None], 4, 3, **row.of_task))


# ---- bfloat16 ----------------------------------------------------------------------------------------------------


def error(got: list[Tensor], right: list[Tensor]) -> float:
    """The norm of all differences, relative to that of what is right."""
    off = sum((one.double() - other.double()).square().sum() for one, other in zip(got, right, strict=True))
    size = sum(other.double().square().sum() for other in right)
    return float((torch.as_tensor(off) / size).sqrt())


@pytest.mark.pairwise
@matrix
def test_bfloat16_is_as_exact_as_the_naive_way(shape: str, backend: str, method: str) -> None:
    """A bfloat16 model and a float32 prompt, beside the same weights in float64: training and decoding."""
    cell, model = make(shape, backend, method)
    model.get_base_model().to(torch.bfloat16)
    exact = copy.deepcopy(model)
    exact.get_base_model().to(torch.float64)
    some = rows_of(cell)
    (truth, true_by), (plain, plain_by) = (naively(cell, each, some) for each in (exact, model))
    for padding in ("left", "right"):
        batch = padded(some, padding)
        output = model(**batch)
        got = [logits[real] for logits, real in zip(output.logits, batch["attention_mask"].bool(), strict=True)]
        by = torch.autograd.grad(output.loss, trained(model), materialize_grads=True)
        assert output.logits.dtype is torch.bfloat16 and all(each.dtype is torch.float32 for each in by)
        for what, mine, theirs, right in (("logits", got, plain, truth), ("gradients", by, plain_by, true_by)):
            ours, bare = error([each.detach() for each in mine], right), error(theirs, right)
            # one and the same on average over seeds; a single draw of a gradient's rounding may be 1.7 times another
            assert ours < 2 * bare < 0.2, f"{what}, {padding}: {ours:.1e}, the naive way's {bare:.1e}"


def trained(model: SoftPromptModel) -> list[Tensor]:
    return [each for each in model.parameters() if each.requires_grad]


def naively(cell: Cell, model: SoftPromptModel, some: list[Row]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of each row, and the loss's gradient of everything that trains."""
    alone = [conformance.alone(cell, model, row) for row in some]
    by = torch.autograd.grad(conformance.loss(cell, alone, some), trained(model), materialize_grads=True)
    return [each["logits"].detach() for each in alone], list(by)
