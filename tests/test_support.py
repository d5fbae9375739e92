"""docs/support.md says what the conformance tests say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import families


def generator(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_support", root / "scripts" / "make_support.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_current(root: Path) -> None:
    written = (root / "docs" / "support.md").read_text(encoding="utf-8")
    assert written == generator(root).document(), "run python scripts/make_support.py"
    assert all(f"\n| {name} |" in written for name in families.FAMILIES)
