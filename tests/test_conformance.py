"""Method × family × task: every registered method before every head of every family, end to end.

A cell is built, equals the plain formulation (`naive.py`: one row at a time, no padding) in outputs, loss and gradients
with padding on either side, trains, and generates for a batch what it generates for single rows. Of every method
before every head one gives the same outputs when another process loads it. A cell that cannot exist refuses to be
built and names what can.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import conformance
import naive
import pairs
import pytest
import tiny
import torch
from conformance import Cell
from safetensors.torch import load_file
from torch import Tensor

from softprompt import METHODS, SoftPromptModel, UnsupportedError

CELLS = list(conformance.cells())
Reload = Callable[[Cell, Path], dict[str, Tensor]]
RUNS, REFUSED = ([cell for cell in CELLS if (cell.refusal is None) is exists] for exists in (True, False))


ELSEWHERE = {str(each) for each in pairs.choose(RUNS, lambda cell: (cell.method, cell.task))}
"""What another process loads by default: every method before every head; with ``--full`` all."""


def axes(cell: Cell) -> tuple[tuple[str | None, str], ...]:
    """With the others, whose families have every head: a variant before every family, and before every head."""
    return (cell.variant, cell.family), (cell.variant, cell.task)


@pytest.fixture(scope="module")
def reload() -> Iterator[Reload]:
    """Has another process load a saved cell, and returns the outputs it got. One process serves all cells."""
    script = Path(__file__).with_name("reload_cell.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(cell: Cell, folder: Path) -> dict[str, Tensor]:
            assert process.stdin is not None and process.stdout is not None
            request = {"method": cell.method, "family": cell.family, "task": cell.task, "folder": str(folder)}
            process.stdin.write(json.dumps(request) + "\n")
            answer = process.stdout.readline().strip()
            assert answer == "done", f"the other process: {answer}"
            return load_file(folder / "outputs.safetensors")

        yield ask
        process.stdin.close()


@pytest.mark.pairwise(fast=2)
@pytest.mark.parametrize("cell", RUNS, ids=str)
def test_cell(cell: Cell, reload: Reload, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = cell.model()
    check_against_the_plain_formulation(cell, model)
    check_training(cell, model)
    if str(cell) in ELSEWHERE or request.config.getoption("--full"):
        check_loading(cell, model, reload, tmp_path)
    if cell.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        check_generation(cell, model)


@pytest.mark.parametrize("cell", pairs.default(conformance.variants(), axes, together=1), ids=str)
def test_variant(cell: Cell) -> None:
    model = cell.model()
    check_against_the_plain_formulation(cell, model)
    if cell.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        check_generation(cell, model)


@pytest.mark.pairwise
@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_a_cell_that_cannot_exist_names_what_can(cell: Cell) -> None:
    assert cell.refusal is not None
    with pytest.raises(UnsupportedError, match=cell.refusal) as caught:
        cell.model()
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message  # one sentence
    alternatives = [name for name in METHODS if Cell(name, cell.family, cell.task).refusal is None]
    assert any(name in message for name in alternatives)


def close(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4, msg=lambda text: f"{what}: {text}")


def check_against_the_plain_formulation(cell: Cell, model: SoftPromptModel) -> None:
    rows = conformance.rows(cell)
    alone = [conformance.alone(cell, model, row) for row in rows]
    expected_loss = conformance.loss(cell, alone, rows)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    expected = torch.autograd.grad(expected_loss, list(parameters.values()), materialize_grads=True)
    assert any(
        gradient.abs().max() > 1e-6 for name, gradient in zip(parameters, expected, strict=True) if "prompt" in name
    )
    for side in ("left", "right"):
        with torch.no_grad():
            output = model(**conformance.collate(cell, rows, side))
        for index, (got, wanted) in enumerate(zip(conformance.together(cell, output, rows, side), alone, strict=True)):
            for name, value in got.items():
                close(value, wanted[name], f"{name} of row {index}, padded on the {side}")
        loss = conformance.library_loss(cell, model, rows, side)
        close(loss, expected_loss, f"loss, padded on the {side}")
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for name, got, wanted in zip(parameters, gradients, expected, strict=True):
            close(got, wanted, f"gradient of {name}, padded on the {side}")
    if cell.task == "SEQ_CLS" and cell.kind in ("decoder", "hybrid"):  # whose heads find the last token by the ids
        batch = conformance.collate(cell, rows, "right")
        del batch["attention_mask"]
        with torch.no_grad():
            close(model(**batch).logits, torch.stack([each["logits"] for each in alone]), "logits without a mask")


def check_loading(cell: Cell, model: SoftPromptModel, reload: Reload, folder: Path) -> None:
    model.save_pretrained(folder)
    expected = conformance.flat_outputs(cell, model)
    found = reload(cell, folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)  # a frozen prompt is folded by itself


def check_training(cell: Cell, model: SoftPromptModel) -> None:
    rows = conformance.rows(cell)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = conformance.library_loss(cell, model, rows, "right")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(conformance.library_loss(cell, model, rows, "right").item())
    assert losses[-1] < losses[0], losses


def check_generation(cell: Cell, model: SoftPromptModel, steps: int = 4) -> None:
    """Greedy tokens of a padded batch, of single rows, and of the plain formulation that recomputes the whole row."""
    rows = conformance.rows(cell)
    side = "left" if cell.task == "CAUSAL_LM" else "right"
    options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
    batch = conformance.collate(cell, rows, side)
    batch.pop("labels", None)
    tokens = model.generate(**batch, **options)[:, -steps:]
    for row, got in zip(rows, tokens, strict=True):
        seen = torch.ones(1, len(row.ids), dtype=torch.long)
        single = model.generate(input_ids=row.ids[None], attention_mask=seen, **options, **row.of_task)
        assert torch.equal(got, single[0, -steps:])
        with torch.no_grad():
            plain = naive.decode if cell.decodes else naive.greedy
            assert torch.equal(got[None], plain(model, row.ids[None], steps, cell.first, **row.of_task))
