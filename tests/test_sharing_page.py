"""docs/sharing.md: its Python runs."""

import re
from pathlib import Path

import pytest


def test_the_page_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (root / "docs" / "sharing.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"<!-- run: python -->\n```python\n(.*?)```", page, re.DOTALL)
    exec(body, {})  # noqa: S102 – our own page
    assert "torch.Size([2, " in capsys.readouterr().out
