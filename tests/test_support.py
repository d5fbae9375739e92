"""docs/support.md says what the library does: every tenth class is tried anew, and the part on methods is current."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import anyfamily
import families
import outcomes
import pytest
import transformers
import trial

SAMPLE = [(kind, name) for kind in anyfamily.KINDS for name in anyfamily.classes(kind)[::10]]
MARKS = {"✓": "right", "–": "refused", "?": "not tried"}


def script(root: Path, name: str) -> ModuleType:
    """One of the scripts, as a module."""
    sys.path.insert(0, str(root / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location(name, root / "scripts" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(root / "scripts"))


def page(root: Path) -> str:
    return (root / "docs" / "support.md").read_text(encoding="utf-8")


def pinned(root: Path) -> bool:
    """Whether this is the version that the page is about."""
    return f"Made with transformers {transformers.__version__} " in page(root)


def said(text: str, name: str) -> list[str] | None:
    """What the page says of a class, for each method; None if it could not be tried."""
    found = re.search(rf"^\| {name} \| (.*) \| (.*) \|$", text, re.MULTILINE)
    return None if found is None else ["partly" if " but " in cell else MARKS[cell[0]] for cell in found.groups()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), SAMPLE)
def test_a_class_is_right_or_refused_and_the_page_says_so(root: Path, kind: str, name: str) -> None:
    result = trial.trial(name, kind)
    found = [outcomes.outcome(result, method) for method in outcomes.METHODS]
    assert all(each.good for each in found), found
    if pinned(root):
        expected = None if result["problem"] else [each.word for each in found]
        assert said(page(root), name) == expected, "run make support"


def test_the_part_on_methods_is_current(root: Path) -> None:
    written = page(root)
    assert all(f"\n| {name} |" in written for name in families.FAMILIES)
    if pinned(root):  # another version may have other heads
        assert script(root, "support_methods").document() in written, "run python scripts/make_support.py --methods"
