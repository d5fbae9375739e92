"""The first part of docs/support.md: every language model class of transformers, and what came of trying it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import anyfamily
import torch
import transformers
from outcomes import METHODS, Outcome, outcome

TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Sequence to sequence",
    "masked": "Masked language models",
    "sequence": "Classifiers of sequences",
    "token": "Classifiers of tokens",
}
WORDS = ("right", "partly", "refused", "not tried", "wrong", "raw")
MARKS = {"right": "✓", "partly": "✓", "refused": "–", "not tried": "?", "wrong": "**wrong**", "raw": "**error**"}
HEAD = """## Every class of transformers

Made with transformers {transformers} and torch {torch}. Every class that transformers maps to a language model, a
sequence classifier or a token classifier is built tiny from its own config, with random weights, and tried: a prompt
made of real tokens must do exactly what those tokens do in the row. The judge is the bare model on prompt and row
together, one row at a time and without padding. Compared are the logits of a row alone, with a mask and without, and of
a batch padded on either side, the loss of causal models and what they generate, alone and in a padded batch.

✓ is equal in all of it, ✓ with a note is equal except where the library refuses, a dash is a refusal (each with its
sentence below), and ? is what no bare model can judge. **wrong** and **error** are bugs.
"""


def line(result: dict[str, Any]) -> str:
    """One class in one line, for whoever watches."""
    if result["problem"]:
        return f"{result['kind']} {result['class']}: not built: {result['problem']}"
    return f"{result['kind']} {result['class']}: {', '.join(outcome(result, method).word for method in METHODS)}"


def bad(results: list[dict[str, Any]]) -> list[str]:
    found = []
    for result in results:
        for method in METHODS if not result["problem"] else ():
            came = outcome(result, method)
            if not came.good:
                why = " ".join(came.reasons)
                found.append(f"{result['class']} {method} {came.word}: {', '.join(came.places)} {why}")
    return found


class Notes:
    """Sentences with numbers, and what they are about."""

    def __init__(self) -> None:
        self.about: dict[str, list[str]] = {}

    def of(self, sentences: tuple[str, ...], subject: str) -> str:
        for sentence in sentences:
            subjects = self.about.setdefault(sentence, [])
            subjects += [] if subject in subjects else [subject]
        numbers = sorted(list(self.about).index(sentence) + 1 for sentence in sentences)
        return f" [{', '.join(map(str, numbers))}]" if numbers else ""


def document(results: list[dict[str, Any]]) -> str:
    notes = Notes()
    tables = [part for kind in anyfamily.KINDS for part in _table(results, kind, notes)]
    lines = [HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])]
    lines += [*_counts(results), "", *tables, *_notes(notes), *_not_built(results)]
    return "\n".join(lines) + "\n"


def _counts(results: list[dict[str, Any]]) -> list[str]:
    lines = [f"| kind | classes | built | method | {' | '.join(WORDS)} |", "|---" * (4 + len(WORDS)) + "|"]
    for kind, title in TITLES.items():
        of_kind = [result for result in results if result["kind"] == kind]
        built = [result for result in of_kind if not result["problem"]]
        for method in METHODS:
            count = Counter(outcome(result, method).word for result in built)
            numbers = " | ".join(str(count[word]) for word in WORDS)
            lines.append(f"| {title.lower()} | {len(of_kind)} | {len(built)} | `{method}` | {numbers} |")
    return lines


def _table(results: list[dict[str, Any]], kind: str, notes: Notes) -> list[str]:
    lines = [
        f"### {TITLES[kind]}",
        "",
        f"| class | {' | '.join(f'`{method}`' for method in METHODS)} |",
        "|---|---|---|",
    ]
    for result in results:
        if result["kind"] == kind and not result["problem"]:
            cells = [_cell(outcome(result, method), result["class"], method, notes) for method in METHODS]
            lines.append(f"| {result['class']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(came: Outcome, name: str, method: str, notes: Notes) -> str:
    subject = f"{name} (`{method}`)"
    mark = MARKS[came.word]
    if came.word in ("wrong", "raw"):
        return f"{mark}: {', '.join(came.places)}{notes.of(came.reasons, subject)}"
    if came.word == "partly":
        return f"{mark} but {', '.join(came.places)}{notes.of(came.reasons, subject)}"
    return mark + notes.of(came.reasons, subject)


def _notes(notes: Notes) -> list[str]:
    lines = ["### The sentences", ""]
    for number, (sentence, subjects) in enumerate(notes.about.items(), 1):
        lines.append(f"{number}. {sentence} ({len(subjects)}: {', '.join(_together(subjects))})")
    return [*lines, ""]


def _together(subjects: list[str]) -> list[str]:
    """`X (`a`)` and `X (`b`)` as X."""
    names = [subject.partition(" ")[0] for subject in subjects]
    both = {name for name, count in Counter(names).items() if count == len(METHODS)}
    return list(dict.fromkeys(n if n in both else subject for n, subject in zip(names, subjects, strict=True)))


def _not_built(results: list[dict[str, Any]]) -> list[str]:
    lines = ["### What could not be tried here", ""]
    for result in results:
        if result["problem"]:
            lines.append(f"- {result['class']} ({TITLES[result['kind']].lower()}): {result['problem'][:200]}")
    return [*lines, ""] if len(lines) > 2 else []
