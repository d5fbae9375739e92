"""What the serving benchmarks serve: a base model in a folder, and folders of prompts that give different answers."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from shapes import wrap
from torch import nn

EMBEDDED = "embedded"
KINDS = ("prefix", "prompt tuning", "P-tuning MLP")
LOUD = 2.0  # so far apart are the values of a prompt, that its answers are its own
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_base(base: Any, folder: Path) -> Path:
    """The model, with the tokenizer of the package's own, which has as many words as the small shapes."""
    from softprompt.embedded import PATH

    base.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(PATH / name, folder / name)
    _without_end(folder / "generation_config.json")
    return folder


def _without_end(path: Path) -> None:
    """Every answer is as long as it is asked to be."""
    config = json.loads(path.read_text())
    config.pop("eos_token_id", None)
    path.write_text(json.dumps(config))


def save_prompts(base: Any, folder: Path, count: int, lengths: Sequence[int], kinds: Sequence[str] = KINDS) -> None:
    """`count` prompts, saved as `p0`, `p1`, …; their kinds and numbers of virtual tokens take turns."""
    import softprompt

    made: dict[tuple[str, int], Any] = {}
    for number in range(count):
        kind, length = kinds[number % len(kinds)], lengths[number // len(kinds) % len(lengths)]
        if (kind, length) not in made:
            made[kind, length] = wrap(softprompt, base, kind, length)
        write(made[kind, length], folder / f"p{number}", seed=number)


@torch.no_grad()
def write(model: Any, folder: Path, seed: int) -> None:
    """The model's prompt with random content."""
    torch.manual_seed(seed)
    for parameter in model.prompt_encoder.parameters():
        nn.init.normal_(parameter, std=LOUD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def texts(tokenizer: Any, count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """Different texts of so many tokens (about), cut from the held-out rows of the demo."""
    from softprompt.demo_data import HELD_OUT

    rows = [json.loads(line)["data"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    ids = [each for row in rows for each in tokenizer(row, add_special_tokens=False)["input_ids"]]
    lengths = torch.randint(shortest, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return list(_cut(tokenizer, ids, lengths))


def _cut(tokenizer: Any, ids: list[int], lengths: list[int]) -> Iterator[str]:
    begin = 0
    for length in lengths:
        if begin + length > len(ids):
            begin = (begin + 7) % length  # other pieces than before
        yield tokenizer.decode(ids[begin : begin + length])
        begin += length
