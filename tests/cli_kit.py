"""For the tests of the command line: tiny base models in folders, small data, saved prompts, and a way to run."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import PreTrainedTokenizerFast

from softprompt import PromptConfig, get_peft_model
from softprompt.cli import main

ROWS = [{"mr": f"name[{name}]", "refs": [f"{name} sat.", f"the {name} ran"]} for name in ("cat", "dog", "mat", "river")]
LABELLED = [{"sentence": f"the {word}", "label": label} for label, word in enumerate(("cat", "dog", "mat") * 3)]
LABELLED = [{**row, "label": ("bad", "good", "so")[place % 3]} for place, row in enumerate(LABELLED)]


def save_base(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A base model with its tokenizer, as `--model` takes it."""
    tiny.build(family, **overrides).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = tiny.tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


def save_prompt(folder: Path, config: PromptConfig, family: str = "llama", **overrides: Any) -> Path:
    """A prompt straight after construction; enough for everything but quality."""
    get_peft_model(tiny.build(family, **overrides), config).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Shell:
    """Runs `softprompt` in this process; `run` gives (exit status, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def run(self, *arguments: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return status, out, err

    def ok(self, *arguments: object) -> str:
        """stdout of a command that must succeed."""
        status, out, err = self.run(*arguments)
        assert status == 0, err
        return out
