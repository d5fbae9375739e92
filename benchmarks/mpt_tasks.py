"""The tasks of quality_mpt.py: short texts to shorter answers, made from E2E, SST-2 and the package's own demo set."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt.demo_data import __file__ as demo

SLOTS = {"name": "name", "food": "food", "kind": "eatType", "price": "priceRange", "rating": "customer rating"}
SLOTS |= {"area": "area", "near": "near"}
SOURCES = ("name", "food", "kind", "price", "rating", "describe")
TARGETS = ("weather", "near", "area", "sentiment")
TEMPLATE = "{text} => {answer}"
ROWS, TEST, KEPT = 600, 100, 60  # training rows of a source task; test rows of any, at most; rows to choose settings by


def write_tasks(data: Path, folder: Path) -> dict[str, tuple[Path, Path, Path]]:
    """Task → (training, test, kept rows), files of rows `{text, answer}`; targets have many rows, to draw few from."""
    return {name: _write_task(name, data, folder) for name in (*SOURCES, *TARGETS)}


def _write_task(name: str, data: Path, folder: Path) -> tuple[Path, Path, Path]:
    train, test = list(_rows(name, data, "train")), list(_rows(name, data, "test"))
    for rows in (train, test):
        random.Random(0).shuffle(rows)
    count = ROWS if name in SOURCES else 4000
    parts = {"train": train[KEPT : KEPT + count], "test": test[:TEST], "kept": train[:KEPT]}
    files = []
    for part, rows in parts.items():
        files.append(folder / f"{name}.{part}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files[0], files[1], files[2]


def few(file: Path, count: int, draw: int) -> list[dict[str, str]]:
    """The `draw`-th sample of `count` rows."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return random.Random(1000 * count + draw).sample(rows, count)


def _rows(name: str, data: Path, part: str) -> Iterator[dict[str, str]]:
    if name in ("describe", "weather"):  # a forecast, or any other of the demo's cards, as sentences
        for row in _read(Path(demo).parent / ("train.jsonl" if part == "train" else "heldout.jsonl")):
            if row["data"].startswith("where:") != (name == "weather"):
                continue
            yield {"text": row["data"], "answer": row["text"] if isinstance(row["text"], str) else row["text"][0]}
    elif name == "sentiment":
        for row in _read(data / "sst2" / f"{part}.jsonl"):
            yield {"text": row["sentence"], "answer": "good" if row["label"] else "bad"}
    else:
        yield from _of_slot(SLOTS[name], data / "e2e" / f"{part}.jsonl")


def _of_slot(slot: str, file: Path) -> Iterator[dict[str, str]]:
    """One sentence of each meaning representation that has the slot, and the slot's value, which is in the sentence.

    Prices and ratings are said in many ways, so their values need not be in it.
    """
    for number, row in enumerate(_read(file)):
        found = re.search(rf"(?:^|, ){slot}\[([^\]]*)\]", row["mr"])
        if found is None:
            continue
        refs = [text for text in row["refs"] if slot in ("priceRange", "customer rating") or found[1] in text]
        if refs:
            yield {"text": refs[number % len(refs)], "answer": found[1]}


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
