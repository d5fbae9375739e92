"""docs/prompts-together.md: its commands and its Python run, in its order."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from softprompt.checkpoint import load_adapter
from softprompt.cli import main

CODE = re.compile(r"<!-- run: (\w+) -->\n```\w+\n(.*?)```", re.DOTALL)
SMALL = {"train": ["--steps", "2", "--train-limit", "32", "--samples", "1", "--max-new-tokens", "2"]}


@pytest.mark.slow
def test_the_page_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "softprompt").symlink_to(root / "softprompt", target_is_directory=True)
    page = (root / "docs" / "prompts-together.md").read_text(encoding="utf-8")
    kinds = []
    for kind, body in CODE.findall(page):
        kinds.append(kind)
        if kind == "python":
            exec(body, {})  # noqa: S102 – our own page
            continue
        for command in body.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command)
            assert program == "softprompt"
            assert main([*arguments, *SMALL.get(arguments[0], [])]) == 0
    assert kinds == ["shell", "python", "python"]
    printed = capsys.readouterr().out
    assert "1.000" in printed  # the matrix of compare
    assert "name: Milo" in printed  # what the ensemble wrote
    one, both = (load_adapter(tmp_path / name).tensors["prompt_embeddings"] for name in ("cats", "both"))
    assert torch.equal(both[:8], one)
    assert len(both) == 16
