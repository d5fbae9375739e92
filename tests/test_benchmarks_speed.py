"""The speed benchmarks: every script runs on a tiny model, counters count what a hand counts, tables show it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SCRIPTS = ("step", "growth", "generate", "prompts", "loading", "train", "cache_door")
BATCH, LENGTH = 2, 8


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)  # a limit would hold for all tests that follow


def load(name: str) -> Any:
    return importlib.import_module(name)


# ---- counting --------------------------------------------------------------------------------------------------------


def test_flops_of_a_matrix_product_and_its_gradients() -> None:
    left, right = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert load("counts").flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert load("counts").flops(lambda: (left @ right).sum().backward()) == 3 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_flops_of_attention_are_the_whole_rectangle_for_every_kernel(causal: bool, groups: int) -> None:
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    key, value = (torch.randn(2, 4 // groups, 16, 8, requires_grad=True) for _ in range(2))
    product = 2 * 2 * 4 * 16 * 16 * 8  # one batched product of 16 queries and 16 keys, 8 wide

    def forward() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=groups > 1)

    assert load("counts").flops(forward) == 2 * product
    assert load("counts").flops(lambda: forward().sum().backward()) == (2 + 5) * product


def test_flops_of_an_lstm() -> None:
    lstm, rows = nn.LSTM(6, 4, num_layers=1, bidirectional=True, batch_first=True), torch.randn(3, 5, 6)
    one_way = 2 * 3 * 5 * (6 * 16 + 4 * 16)  # tokens, from the input and from the step before, into four gates
    assert load("counts").flops(lambda: lstm(rows)) == 2 * one_way
    assert load("counts").flops(lambda: lstm(rows)[0].sum().backward()) == 3 * 2 * one_way


def test_flops_of_a_bare_step_by_hand() -> None:
    """GPT-2: 12 d² per token and layer, the vocabulary once; backward to the inputs repeats the weights' products."""
    shapes = load("shapes")
    base = shapes.build("tiny", "float32", "cpu")
    arm = shapes.bare_step(base, shapes.batch_of(base, BATCH, LENGTH))
    width, depth, words, tokens = 32, 2, base.config.vocab_size, BATCH * LENGTH
    weights = 2 * tokens * (12 * width * width * depth + width * words)
    product = 2 * BATCH * LENGTH * LENGTH * width * depth
    assert arm.count is not None
    assert arm.count()["flops"] == 2 * weights + 7 * product


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    layer = nn.Linear(4, 4, bias=False)
    rows = torch.randn(2, 4, requires_grad=True)

    def run() -> None:
        hidden = layer(rows)  # keeps rows and, for their gradient, the weight
        (hidden * hidden.view(8).view(2, 4)).sum().backward()  # keeps hidden twice

    assert load("counts").step_counts(run, layer)["saved"] == 2 * (2 * 4 * 4)


@pytest.mark.slow
def test_keys_held_are_those_of_the_cache_to_the_byte() -> None:
    """At the last token the bare model holds all tokens but that one; ours one prefix more, PEFT one per row."""
    shapes, generate, speed = load("shapes"), load("speed_generate"), load("speed")
    options = speed.Options(model="tiny", rounds=1)
    group = generate.generate_group(options, "tiny", "float32", "prefix", 5, 7, 3, 4)
    bench = speed.Bench(options)
    with speed.quiet():
        found = load("measure").compare(group.arms(bench), 1, "cpu")
    assert group.after is not None
    group.after(bench, found)
    one_token = 2 * 2 * 32 * 4  # keys and values of two layers, 32 wide, four bytes each
    assert found["bare"]["kv"] == 3 * (7 + 4 - 1) * one_token
    assert found["PEFT"]["kv"] >= 3 * (5 + 7 + 4 - 1) * one_token
    assert shapes.prefix_bytes(bench.base("tiny", "float32"), 5) == 5 * one_token
    assert found["ours"]["kv_beyond"] == 0


def test_peak_memory_sees_what_was_freed_again() -> None:
    peak = load("counts").Peak("cpu")
    torch.ones(25_000_000)
    found = peak.bytes()
    assert found is None or 90e6 < found < 200e6


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_arms_take_turns_and_a_failing_one_is_a_row() -> None:
    measure = load("measure")
    calls: list[str] = []

    def later_broken() -> None:
        calls.append("c")
        if calls.count("c") == 2:
            raise RuntimeError("cannot read /home/somebody/secret.txt, it is broken")

    def refused() -> Any:
        raise ValueError("does not exist there")

    makers = {
        "a": lambda: measure.Arm(lambda: calls.append("a")),
        "b": refused,
        "c": lambda: measure.Arm(later_broken),
        "d": lambda: measure.Arm(lambda: {"prefill": 1.0}, lambda: {"kv": 7}),
    }
    found = measure.compare(makers, 3, "cpu")
    assert calls == ["a", "c", "a", "c", "a", "a"]
    assert len(found["a"]["time"]) == 3
    assert found["b"] == {"error": "ValueError: does not exist there"}
    assert found["c"] == {"error": "RuntimeError: cannot read …, it is broken"}
    assert found["d"]["prefill"] == [1.0, 1.0, 1.0]
    assert found["d"]["kv"] == 7


def test_a_ratio_is_the_median_of_rounds() -> None:
    ratio = load("measure").ratio
    arms = {"bare": {"time": [1.0, 2.0, 10.0], "flops": 4}, "ours": {"time": [1.5, 2.2, 11.0], "flops": 5}}
    found = ratio(arms, "time", "ours", "bare")
    assert (found.value, found.low, found.high) == (1.1, 1.1, 1.5)
    assert str(ratio(arms, "flops", "ours", "bare")) == "1.25"
    assert ratio(arms, "time", "PEFT", "bare") is None


# ---- goals and tables ------------------------------------------------------------------------------------------------


def record(time: float) -> dict[str, Any]:
    setting = {"model": "gpt2", "dtype": "float32", "device": "cpu", "method": "prompt tuning"}
    arms = {
        "bare": {"time": [1.0, 1.0], "flops": 1000, "saved": 100},
        "ours": {"time": [time, time], "flops": 1091, "saved": 112},
        "PEFT": {"error": "out of memory"},
    }
    return {"setting": setting | {"p": 100, "T": 128, "B": 8, "padded": False}, "machine": "a machine", "arms": arms}


def test_goals_are_judged_without_rounding(tmp_path: Path) -> None:
    goals = load("goals")
    found = record(1.1)
    judged = {goal.quantity: goal.met(found["arms"]) for goal in goals.goals_of("speed_step", found["setting"])}
    assert judged == {"flops": False, "saved": True, "time": None}  # the last: PEFT ÷ ours, where PEFT did not run
    (tmp_path / "speed_step.json").write_text(json.dumps([record(1.05), record(1.3)]))
    board = goals.scoreboard(tmp_path)
    lines = [line for line in board.splitlines() if "training step: time ÷ bare" in line and "GPU" not in line]
    assert [line.split(" | ")[-1] for line in lines] == ["yes |", "**no** |"]
    assert all(goal.says in board for goal in goals.GOALS)
    assert "not measured" in board


def test_every_goal_belongs_to_a_table_and_a_case_of_it() -> None:
    goals, speed = load("goals"), load("speed")
    for goal in goals.GOALS:
        cuda = goal.where.get("device") == "cuda"
        cases = list(load(goal.table).groups(speed.Options(device="cuda" if cuda else "cpu")))
        methods = goal.where.get("method", ())
        for method in methods if isinstance(methods, tuple) else (methods,):
            assert any(goal.applies(case.setting) and case.setting["method"] == method for case in cases), goal.says
        assert any(goal.applies(case.setting) for case in cases), goal.says


def test_labels_are_the_names_of_cases() -> None:
    """A case that is measured again takes its old row's place, so no two may have one setting."""
    speed = load("speed")
    for script in SCRIPTS:
        for device in ("cpu", "cuda"):
            labels = [case.label for case in load(f"speed_{script}").groups(speed.Options(device=device))]
            assert len(labels) == len(set(labels))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quick cases on a tiny model; ours and the bare model run in all of them."""
    run = load(f"speed_{script}").run
    arguments = ["--model", "tiny", "--quick", "--threads", "1", "--results", str(tmp_path)]
    run(arguments)
    name = f"speed_{script}"
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found
    assert all("error" not in result for row in found for arm, result in row["arms"].items() if arm != "PEFT"), found
    assert all("threads" in row["machine"] and "2" in row["machine"] for row in found)
    page = (tmp_path / f"{name}.md").read_text()
    assert page.startswith("| case | by |")
    assert page in capsys.readouterr().out
    run([*arguments, "--only", "no such case"])
    assert json.loads((tmp_path / f"{name}.json").read_text()) == found


def test_a_case_that_is_measured_again_takes_its_old_place(tmp_path: Path) -> None:
    records = load("common").Records(tmp_path / "some.json")
    for value in (1, 2):
        for case in ("a", "b"):
            records.put({"setting": {"case": case}}, {"value": value})
        assert [(row["setting"]["case"], row["value"]) for row in records.rows] == [("a", value), ("b", value)]
