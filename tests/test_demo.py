"""The demo runs from start to end in a folder of its own, and replaces its own earlier run only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softprompt import demo


@pytest.mark.slow
def test_the_demo_trains_saves_loads_and_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert demo.main(["--out", "run", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"report.html", "adapter_model.safetensors"}
    assert "$ softprompt generate --prompt run --input " in printed
    assert "BLEU, all references" in printed
    assert str(tmp_path) not in printed
    assert not re.search(r"\x1b\[", printed)


def test_the_demo_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("train: mine.jsonl\n")
    (tmp_path / "mine" / "adapter_model.safetensors").write_text("precious")
    assert demo.main(["--out", str(tmp_path / "mine")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_text() == "precious"


def test_the_demo_replaces_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = tmp_path / "run"
    earlier.mkdir()
    (earlier / "recipe.yaml").write_text(f"train: /elsewhere/{'/'.join(demo.TRAIN.parts[-2:])}\n")
    (earlier / "metrics.jsonl").write_text("")
    demo._replace_own_run(earlier)
    assert not earlier.exists()
