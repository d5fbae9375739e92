"""Writes four small tasks, each a .jsonl and a -heldout.jsonl of cards and sentences, out of the package's demo set.

python examples/mpt/make_tasks.py mpt-data
"""

import json
import sys
from pathlib import Path

from softprompt import demo_data

TASKS = {"pets": "name", "shops": "shop", "events": "event", "weather": "where"}  # name → the cards' first word


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, ending in (("train", ""), ("heldout", "-heldout")):
        lines = (Path(demo_data.__file__).parent / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        for task, word in TASKS.items():
            mine = [line for line in lines if json.loads(line)["data"].startswith(f"{word}:")]
            (folder / f"{task}{ending}.jsonl").write_text("\n".join(mine) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
