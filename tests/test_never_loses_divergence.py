"""Losses that are no numbers or have exploded, in real runs: named, stopped, and the best prompt is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_train import StopAfter, recipe, rows_of, workplace, write_rows  # noqa: F401  (workplace is a fixture)

from softprompt.errors import RunInterrupted, TrainingError
from softprompt.train import train
from softprompt.train.divergence import LAST, OF_THEM, Watch
from softprompt.train.run_folder import RunFolder
from softprompt.train.run_result import Progress


def kept(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def poisoned(place: Path, word: str) -> str:
    """A base model that knows one word only as NaN."""
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    ids: Any = tokenizer(word, add_special_tokens=False)["input_ids"]
    model.get_input_embeddings().weight.data[ids[-1]] = math.nan
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def test_one_row_that_the_model_cannot_take(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"who": f"cat {n}", "said": "sat on the mat"} for n in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", [*rows[:29], {"who": "cat", "said": "~"}, *rows[29:]])
    fine = write_rows(tmp_path / "fine.jsonl", rows[:6])
    settings = recipe(
        workplace, tmp_path / "run", model=poisoned(tmp_path / "model", "~"), train=data, eval=fine, eval_steps=1,
        batch_size=2, steps=21, init="random", seed=1,
    )  # fmt: skip
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step (\d+); .* the best prompt so far, of step \d+, is"
    ):
        train(settings)
    rows_seen = rows_of(tmp_path / "run")
    assert len(rows_seen) > 2
    best = min(rows_seen, key=lambda row: row["eval_loss"])
    assert best["step"] > 0
    assert kept(tmp_path / "run").isfinite().all()


def test_a_held_out_loss_that_becomes_no_number(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    """One step of this size leaves finite numbers whose products are not."""
    settings = recipe(workplace, tmp_path / "run", learning_rate=1e38, clip=0, eval_steps=1, optimizer="adamw")
    with pytest.raises(
        TrainingError, match=r"the held-out loss is (nan|inf) at step 1; .* prompt so far, of step 0, is"
    ):
        train(settings)
    assert rows_of(tmp_path / "run")[-1]["eval_loss"] is None
    assert RunFolder(tmp_path / "run").load_state() is None
    assert kept(tmp_path / "run").abs().max() < 1e6


def test_a_last_step_into_infinity_keeps_the_last_good_state(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    """Without held-out data nothing measures what the last step did."""
    settings = recipe(workplace, tmp_path / "run", eval=None, learning_rate=1e38, schedule="constant", warmup=0.0,
                      clip=0, steps=1, optimizer="adamw", weight_decay=1e38, method="prompt_tuning")  # fmt: skip
    with pytest.raises(TrainingError, match=r"holds numbers that are not finite at step 1; .* of step 0, is kept"):
        train(settings)
    assert kept(tmp_path / "run").isfinite().all()
    assert RunFolder(tmp_path / "run").load_state() is None


def exploding(workplace: Path, out: Path) -> Any:  # noqa: F811
    """A classifier's head whose every step overshoots."""
    return recipe(workplace, out, task="SEQ_CLS", steps=80, head_learning_rate=300.0, learning_rate=1e-3, warmup=0.0,
                  schedule="constant", eval_steps=10, optimizer="adamw", head_init="given")  # fmt: skip


def test_an_exploded_loss_is_named_and_stopped(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(TrainingError, match=r"the loss has exploded: it is \d.* at step \d+ and was above") as told:
        train(exploding(workplace, tmp_path / "run"))
    losses = [row["loss"] for row in rows_of(tmp_path / "run")[1:]]
    assert len(losses) < 79
    assert sum(loss > 2 * math.log(tiny.VOCAB) for loss in losses[-LAST + 1 :]) == OF_THEM - 1
    assert "of step 0, is kept" in str(told.value)
    assert kept(tmp_path / "run").isfinite().all()


@pytest.mark.slow
def test_a_resumed_run_explodes_at_the_same_step(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(TrainingError) as straight:
        train(exploding(workplace, tmp_path / "run"))
    with pytest.raises(RunInterrupted):
        train(exploding(workplace, tmp_path / "again"), on_step=StopAfter(15))
    with pytest.raises(TrainingError) as resumed:
        train(exploding(workplace, tmp_path / "again"), resume=True)
    assert str(resumed.value).replace("again", "run") == str(straight.value)
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "run")


# ---- the rule --------------------------------------------------------------------------------------------------------


def steps_until_stopped(losses: list[float], vocabulary: int = 1000) -> int:
    watch, progress = Watch(0.1, Path("run"), vocabulary), Progress()
    for step, loss in enumerate(losses, 1):
        try:
            watch.loss(progress, loss, step)
        except TrainingError:
            return step
    return 0


def test_what_counts_as_exploded() -> None:
    line = 2 * math.log(1000)
    assert steps_until_stopped([3.0, *[line + 0.1] * 25]) == 26
    assert steps_until_stopped([3.0, *[line + 0.1, 0.0] * 25]) == 50
    assert steps_until_stopped([3.0, *[line + 0.1, 0.0, 0.0] * 500]) == 0
    assert steps_until_stopped([3.0, *[line - 0.1] * 500]) == 0
    assert steps_until_stopped([20.0, *[39.0] * 500]) == 0  # a bad start is the measure
    assert steps_until_stopped([20.0, *[41.0] * 25]) == 26
    assert steps_until_stopped([3.0, *[*[1e9] * 24, *[3.0] * 26] * 9]) == 0  # spikes, however high
    assert steps_until_stopped([0.1, *[2.0] * 500], vocabulary=2) == 26  # far above both
    assert steps_until_stopped([3.0, math.nan]) == 2
    assert steps_until_stopped([math.inf]) == 1
