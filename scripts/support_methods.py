"""The second part of docs/support.md: which method runs on which family and head, and why not where it does not.

The cells are those of tests/test_conformance.py, which tests every one of them; the reasons are the errors they raise.
"""

from __future__ import annotations

import families
from conformance import Cell

from softprompt import METHODS, UnsupportedError

HEAD = """## Every method before every head

Every cell is a test (`tests/test_conformance.py`), on a tiny model of the family with random weights and for each head
that transformers has for it. A head that works has passed all of these: outputs, loss and gradients equal the plain
formulation, one row at a time without padding, for batches with padding on either side; five training steps lower the
loss; a saved prompt gives the same outputs in another process; and, for language models, a batch generates what its
rows generate alone. Equality and generation also hold, on every family, for a prompt behind the first token
(`placement="after_bos"`), and on encoder-decoders for a prefix on all three attentions.

✓ stands for all heads of the family; otherwise the heads that work are named. A dash means that the method cannot exist
there; the reasons are below the table. `MASKED_LM` is no task type of PEFT's: leave `task_type` unset for it.
"""


def reason(cell: Cell) -> str:
    """What a cell that cannot exist says."""
    try:
        cell.model()
    except UnsupportedError as error:
        return str(error)
    raise SystemExit(f"{cell} works, but is said not to; see Cell.refusal in tests/conformance.py")


def row(name: str) -> tuple[str, dict[str, str]]:
    """A family's line of the table, and the first reason of each method that has one."""
    family = families.FAMILIES[name]
    columns, reasons = [], {}
    for method in sorted(METHODS):
        cells = [Cell(method, name, task) for task in family.tasks]
        working = [cell.task for cell in cells if cell.refusal is None]
        refused = [cell for cell in cells if cell.refusal is not None]
        columns.append("✓" if not refused else ", ".join(working) or "–")
        if refused:
            reasons[method] = reason(refused[0])
    return f"| {name} | {family.kind} | {', '.join(family.tasks)} | {' | '.join(columns)} |", reasons


def document() -> str:
    lines = [HEAD]
    names = [f"`{method}`" for method in sorted(METHODS)]
    lines += [f"| family | kind | heads | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    why: dict[str, dict[str, list[str]]] = {}
    for name in families.FAMILIES:
        line, reasons = row(name)
        lines.append(line)
        for method, text in reasons.items():
            why.setdefault(text, {}).setdefault(method, []).append(name)
    lines += ["", "### Why not", ""]
    for text, where in why.items():
        found = next(iter(where.values()))
        lines.append(f"- {', '.join(f'`{method}`' for method in where)} on {', '.join(found)}: {text}")
    return "\n".join(lines) + "\n"
