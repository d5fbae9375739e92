"""The tasks of the sweep of the defaults, all made from *training* files, whose last rows are held out.

What other benchmarks report is measured on dev and test files, which are never read here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from common import ROOT, assets

TRAIN, HELD_OUT = 480, 48
LABELLED_HELD_OUT = 120
SHORT = 150  # characters of input and target, so that a run takes seconds
PHRASE = (20, 60)  # characters of a phrase of SST-2
ABOUT_CHILDREN = ("child", "kid", "famil", "adult")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def _e2e() -> list[dict[str, str]]:
    """One short reference per meaning representation, in the file's order."""
    rows = []
    for row in read(assets() / "data" / "e2e" / "train.jsonl"):
        short = [text for text in row["refs"] if len(row["mr"]) + len(text) < SHORT]
        rows += [{"mr": row["mr"], "text": short[0]}] if short else []
    return rows


def e2e() -> list[dict[str, str]]:
    """Data to text: `mr` → `text`."""
    return _e2e()


def cards() -> list[dict[str, str]]:
    """Data to text, of the package's demo: `data` → `text`."""
    return read(ROOT / "softprompt" / "demo_data" / "train.jsonl")


def family() -> list[dict[str, str]]:
    """Reading: does the text say that children are welcome? `text` → `label`, yes or no, as often."""
    found: dict[str, list[dict[str, str]]] = {"yes": [], "no": []}
    for row in read(assets() / "data" / "e2e" / "train.jsonl"):
        for label, texts in found.items():
            if f"familyFriendly[{label}]" in row["mr"]:
                said = [text for text in row["refs"] if any(word in text.lower() for word in ABOUT_CHILDREN)]
                texts += [{"text": text, "label": label} for text in said if len(text) < 100][:2]
    return [row for both in zip(found["yes"], found["no"], strict=False) for row in both]


def sentiment() -> list[dict[str, str]]:
    """Phrases of film reviews: `text` → `label`, good or bad."""
    rows = read(assets() / "data" / "sst2" / "train.jsonl")
    short = [row for row in rows if PHRASE[0] < len(row["sentence"]) < PHRASE[1]]
    return [{"text": row["sentence"].strip(), "label": "good" if row["label"] else "bad"} for row in short]


def names() -> list[dict[str, str]]:
    """Spelling: three to six Arabic consonants → the same in Latin letters with an a behind each, as names are read."""
    chance, letters = random.Random(0), dict(zip("بتدرزسفكلمنه", "btdrzsfklmnh", strict=True))
    words = dict.fromkeys("".join(chance.choices(list(letters), k=chance.randint(3, 6))) for _ in range(700))
    return [{"input": word, "target": "".join(f"{letters[each]}a" for each in word)} for word in words]


def kinds() -> list[dict[str, str]]:
    """Reading: what is a text of the demo about? `text` → `label`, one of four."""
    return [{"text": row["text"], "label": row["data"].split(":")[0]} for row in cards()]


TASKS = {"names": names, "E2E": e2e, "cards": cards, "kinds": kinds, "family": family, "sentiment": sentiment}


def write_task(name: str, folder: Path) -> tuple[Path, Path]:
    """A task's training and held-out rows as files; the last rows of the training file are held out."""
    rows = TASKS[name]()
    count = LABELLED_HELD_OUT if "label" in rows[0] else HELD_OUT
    parts = {"train": rows[: min(TRAIN, len(rows) - count)], "heldout": rows[-count:]}
    for part, chosen in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return folder / "train.jsonl", folder / "heldout.jsonl"


def texts_to_read() -> list[str]:
    """What the tiny model is trained on: stories, and the texts of the training rows without their labels."""
    stories: Iterable[dict[str, Any]] = read(assets() / "data" / "tinystories_sample" / "train.jsonl")
    texts = [row["text"] for row in stories]
    for make in (e2e, cards, family, sentiment):
        texts += [row["text"] for row in make()[:-LABELLED_HELD_OUT]]
    return texts
