"""What came of the trials of a class, in one word per method: what docs/support.md says, and is tested against."""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import anyfamily
import trial
import trial_tools

METHODS = ("prompt_tuning", "prefix_tuning")
KIND_OF_CHECK = {"vectors": "prompt_tuning", "prefix": "prefix_tuning"}
SECONDS, MEMORY = 120, 12 << 30  # what one class may take


@dataclass(frozen=True)
class Outcome:
    """`word`: right, partly (refused in places), refused, not tried, wrong, raw. `reasons`: sentences, of each once.

    `places` are the comparisons that were not right.
    """

    word: str
    reasons: tuple[str, ...] = ()
    places: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return self.word not in ("wrong", "raw")


def outcome(result: dict[str, Any], method: str) -> Outcome:
    """The outcome of one method for a class that could be tried."""
    rows = [row for row in result["rows"] if KIND_OF_CHECK.get(row["method"], row["method"]) == method]
    by_status: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_status.setdefault(row["status"], []).append(row)
    for bad in (trial.RAW, trial.WRONG, trial.REFUSED, trial.NOT_TRIED):
        some = by_status.get(bad)
        if not some or (bad == trial.NOT_TRIED and trial.RIGHT in by_status):
            continue
        word = "partly" if bad == trial.REFUSED and trial.RIGHT in by_status else bad
        reasons = (general(row["message"], result["class"]) for row in some)
        places = tuple(row["comparison"] for row in some)
        return Outcome(word, tuple(dict.fromkeys(filter(None, reasons))), places)
    return Outcome("right" if rows else trial.NOT_TRIED)


def general(sentence: str, name: str) -> str:
    """A sentence that may be about any class."""
    return sentence.replace(name, "this class")


def guarded(name: str, kind: str) -> dict[str, Any]:
    """The result of `trial.trial` from a process of its own, which may crash, hang or use up its memory."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(theirs, name, kind), daemon=True)
    process.start()
    theirs.close()
    try:
        text = ours.recv() if ours.poll(SECONDS) else ""
    except EOFError:
        text = ""
    if not text:
        process.kill()
    process.join()
    if text:
        return json.loads(text)
    reason = f"it ended with status {process.exitcode}, or took more than {SECONDS} seconds"
    return {"class": name, "kind": kind, "problem": reason, "facts": {}, "rows": []}


def _alone(pipe: Connection, name: str, kind: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send(json.dumps(trial.trial(name, kind)))
    pipe.close()


def walk(every: int = 1) -> Iterator[dict[str, Any]]:
    """The result of each class, kind by kind, or of every tenth, say."""
    for kind in anyfamily.KINDS:
        for name in anyfamily.classes(kind)[::every]:
            try:
                anyfamily.find(name)  # imported here, once for all processes
            except Exception as error:
                problem = trial_tools.first_line(error)
                yield {"class": name, "kind": kind, "problem": problem, "facts": {}, "rows": []}
                continue
            yield guarded(name, kind)
