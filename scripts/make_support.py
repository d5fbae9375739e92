"""Write docs/support.md: what the library does on every language model class of the installed transformers.

    python scripts/make_support.py             try every class (minutes) and write the page
    python scripts/make_support.py --methods   write only its second part, from the conformance tests (seconds)
    python scripts/make_support.py --check     exit 1 where the second part is out of date

The trials are those of tests/trial.py, each in a process of its own. What came of each comparison goes to
runs/support.jsonl. The exit status is 1 if anything came out wrong, or ended in an exception that is no refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import outcomes  # noqa: E402
import support_classes  # noqa: E402
import support_methods  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

PATH, LOG = ROOT / "docs" / "support.md", ROOT / "runs" / "support.jsonl"
PART = re.compile(r"<!-- (?P<name>classes|methods) -->\n(?P<body>.*?)<!-- /(?P=name) -->\n", re.DOTALL)
HEAD = """# What runs on what

Written by `python scripts/make_support.py` (`make support`); not to be edited by hand.

"""


def page(parts: dict[str, str]) -> str:
    return HEAD + "\n".join(f"<!-- {name} -->\n{body}<!-- /{name} -->\n" for name, body in parts.items())


def written() -> dict[str, str]:
    """The parts of the page as it is."""
    text = PATH.read_text(encoding="utf-8") if PATH.exists() else ""
    return {"classes": "", "methods": ""} | {match["name"]: match["body"] for match in PART.finditer(text)}


def tried() -> list[dict[str, Any]]:
    """Every class tried, each result written down as it comes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    LOG.parent.mkdir(parents=True, exist_ok=True)
    results = []
    with LOG.open("w", encoding="utf-8") as log:
        for result in outcomes.walk():
            log.write(json.dumps(result) + "\n")
            log.flush()
            print(support_classes.line(result), flush=True)
            results.append(result)
    return results


def write(text: str) -> None:
    temporary = PATH.with_name(".support.md.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, PATH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", action="store_true", help="leave the part about classes as it is")
    parser.add_argument("--check", action="store_true", help="fail where the second part is out of date")
    parser.add_argument("--from-log", action="store_true", help="write the page from runs/support.jsonl")
    given = parser.parse_args()
    parts = written()
    if given.check:
        if parts["methods"] != support_methods.document():
            raise SystemExit("docs/support.md is out of date; run python scripts/make_support.py --methods")
        return
    parts["methods"] = support_methods.document()
    if given.methods:
        write(page(parts))
        return
    results = [json.loads(each) for each in LOG.read_text().splitlines()] if given.from_log else tried()
    parts["classes"] = support_classes.document(results)
    write(page(parts))
    if bad := support_classes.bad(results):
        raise SystemExit("\n".join(["not right, and not refused:", *bad]))


if __name__ == "__main__":
    main()
