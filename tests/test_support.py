"""docs/support.md says what the conformance tests say, on the versions in constraints.txt."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import families
import transformers


def generator(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_support", root / "scripts" / "make_support.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_current(root: Path) -> None:
    written = (root / "docs" / "support.md").read_text(encoding="utf-8")
    assert all(f"\n| {name} |" in written for name in families.FAMILIES)
    pinned = f"transformers=={transformers.__version__}" in (root / "constraints.txt").read_text(encoding="utf-8")
    if pinned:  # another version may have other heads
        assert written == generator(root).document(), "run python scripts/make_support.py"
