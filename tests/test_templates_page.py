"""docs/templates.md: its commands and its Python run, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cli_kit import Shell, write_rows

CODE = re.compile(r"<!-- run: (?P<kind>\w+) -->\n```\w+\n(?P<body>.*?)```", re.DOTALL)
MOODS = [
    {"text": text, "label": label}
    for text, label in [("Tom lost his toy.", "bad"), ("Anna got a new ball.", "good"), ("The dog ran away.", "bad"),
                        ("They played all day.", "good")]
]  # fmt: skip


def test_what_the_page_says_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (root / "docs" / "templates.md").read_text(encoding="utf-8")
    blocks = {match["kind"]: match["body"] for match in CODE.finditer(page)}
    assert set(blocks) == {"shell", "python"}
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "moods.jsonl", MOODS)
    commands = [shlex.split(line) for line in blocks["shell"].replace("\\\n", " ").splitlines()]
    shell, said = Shell(capsys), ""
    for command in commands:
        assert command[0] == "softprompt"
        fewer = ["--steps", "2", "--samples", "0"] if command[1] == "train" else []
        said = shell.ok(*command[1:], *fewer)
    assert said.strip() in ("good", "bad")
    exec(blocks["python"], {})  # noqa: S102 – our own page
    assert "torch.Size([1, 2])" in capsys.readouterr().out
