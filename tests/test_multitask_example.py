"""The recipes in examples/mpt, as they are but with fewer steps, on the model in the package."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from cli_kit import Shell

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "mpt"


@pytest.mark.slow
def test_sources_then_a_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_tasks.py", "mpt-data"])
    runpy.run_path(str(EXAMPLE / "make_tasks.py"), run_name="__main__")
    assert len(list(Path("mpt-data").iterdir())) == 8
    text = (EXAMPLE / "sources.yaml").read_text(encoding="utf-8")
    assert "teacher: { steps: 60 }" in text
    Path("sources.yaml").write_text(text.replace("steps: 60", "steps: 2"), encoding="utf-8")
    small = ("--batch-size", 4, "--eval-limit", 6, "--samples", 0, "--device", "cpu")
    shell = Shell(capsys)
    shell.ok("train", "sources.yaml", "--out", "mpt-sources", "--steps", 3, *small)
    shell.ok("train", EXAMPLE / "target.yaml", "--out", "mpt-target", "--steps", 2, *small)
    held_out = Path("mpt-data") / "weather-heldout.jsonl"
    assert "prompt" in shell.ok(
        "eval", "--prompt", "mpt-target", "--eval", held_out, "--limit", 2, "--max-new-tokens", 4
    )
    shell.ok("convert", "mpt-sources", "--to", "prompt_tuning", "--task", "pets", "--out", "pets-prompt")
    shell.ok("show", "pets-prompt", "--nearest", 0)
