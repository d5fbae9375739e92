"""A base model that is tuned along with its prompt: saved beside it, found again, resumed to the same bits."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import Shell, write_rows
from cloze_kit import ROWS, recipe, run
from rich.console import Console
from transformers import AutoModelForCausalLM

from softprompt.cli.prompted import open_prompted
from softprompt.errors import CheckpointError, ConfigError, RunInterrupted
from softprompt.recipe import Recipe
from softprompt.train.finish import generate_command


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def tuned(tmp_path: Path, data: Path, **changes: Any) -> Recipe:
    return recipe(tmp_path, data, base_learning_rate=0.003, base_dropout=False, save_steps=2, **changes)


@pytest.mark.slow
def test_a_tuned_base_is_saved_with_the_prompt_and_found_again(tmp_path: Path, data: Path, shell: Shell) -> None:
    settings = tuned(tmp_path, data, optimizer=None)
    result = run(settings)
    assert result.recipe.optimizer == "adamw"
    before = AutoModelForCausalLM.from_pretrained(settings.model)
    after = AutoModelForCausalLM.from_pretrained(result.folder / "base")
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved) or result.best_step == 0
    found = json.loads(shell.ok("eval", "--prompt", result.folder, "--eval", data, "--json", "--device", "cpu"))
    assert found == {"prompt": {name: pytest.approx(value, abs=1e-5) for name, value in result.best.items()}}
    assert result.best["loss"] < result.start["loss"]
    said = shell.ok("generate", "--prompt", result.folder, "--file", data).split()
    right = sum(word == str(row["label"]).lower() for word, row in zip(said, ROWS, strict=True)) / len(ROWS)
    assert right == pytest.approx(result.best["accuracy"])
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(result.folder / "base")
    assert json.loads((result.folder / "summary.json").read_text())["classifies"]  # nothing to compare with
    with pytest.raises(ConfigError, match=r"trained along with .*leave --model out"):
        open_prompted(result.folder, settings.model)
    shutil.rmtree(result.folder / "base")
    with pytest.raises(CheckpointError, match="trained along with its base model"):
        open_prompted(result.folder, None)


def test_the_two_learning_rates(tmp_path: Path, data: Path) -> None:
    from softprompt.train import Trainer
    from softprompt.train.run_folder import RunFolder

    settings = tuned(tmp_path, data).resolved()
    trainer = Trainer.load(settings, RunFolder.check_free(settings.out), None, Console(quiet=True))
    groups = {group["peak"]: sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups}
    base = trainer.model.get_base_model()
    assert groups[0.003] == sum(parameter.numel() for parameter in base.parameters())
    assert groups[0.02] == sum(parameter.numel() for parameter in trainer.model.prompt_encoder.parameters())
    assert len(groups) == 2


def test_the_command_that_is_shown_at_the_end_works(tmp_path: Path, data: Path, shell: Shell) -> None:
    for number, (settings, said) in enumerate([
        (recipe(tmp_path, data, template="{text} [P] {kind} : [MASK]", steps=1), '{"text": "a", "kind": "a"}'),
        (tuned(tmp_path, data, steps=1), "a"),
    ]):  # fmt: skip
        settings = settings.replace(out=str(tmp_path / f"shown{number}"))
        program, *arguments = shlex.split(generate_command(run(settings).recipe, "a"))
        assert program == "softprompt" and arguments[-1] == said
        assert shell.ok(*arguments, "--device", "cpu").strip() in ("true", "false")


@pytest.mark.slow
def test_a_resumed_run_with_a_tuned_base_ends_with_the_same_bits(tmp_path: Path, data: Path) -> None:
    whole = run(tuned(tmp_path, data))

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            import signal

            signal.raise_signal(signal.SIGINT)

    second = tuned(tmp_path, data, out=str(tmp_path / "again"))
    with pytest.raises(RunInterrupted):
        run(second, on_step=stop)
    resumed = run(second, resume=True)
    assert resumed.best == whole.best
    for name in ("base/model.safetensors", "adapter_model.safetensors"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes()
