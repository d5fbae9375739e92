"""pyproject.toml declares what the package imports, no more and no less; importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BENEATH = {"markupsafe", "pydantic-core", "starlette"}  # parts of jinja2, pydantic and fastapi with names of their own


def normal(requirement: str) -> str:
    """The name of a requirement as package indexes write it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!\[; ]", requirement)[0]).lower()


def imported() -> set[str]:
    """The distributions that the package's own files import, wherever in the file."""
    names = set()
    for path in (ROOT / "softprompt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    distributions = packages_distributions()
    outside = names - sys.stdlib_module_names - {"softprompt"}
    return {normal(distributions.get(name, [name])[0]) for name in outside}


def test_requirements_are_the_imports() -> None:
    extras = PROJECT["optional-dependencies"]
    main = {normal(requirement) for requirement in PROJECT["dependencies"]}
    optional = {normal(requirement) for name in extras if name not in ("dev", "loops") for requirement in extras[name]}
    used = imported()
    assert used - main - optional - BENEATH == set(), "imported, but not declared"
    assert (main | optional) - used - BENEATH == set(), "declared, but not imported"


def test_floor_file_pins_the_lower_bounds() -> None:
    lines = (ROOT / "constraints-floor.txt").read_text(encoding="utf-8").splitlines()
    pins = {normal(line): line.split("==")[1] for line in lines if "==" in line and not line.startswith("#")}
    for requirement in PROJECT["dependencies"]:
        name, bound = normal(requirement), requirement.split(">=")[1]
        if name != "torch":  # its floor is older than its oldest build without CUDA; see constraints-floor.txt
            assert pins[name].startswith(bound), f"{requirement}, but the floor file tests {pins[name]}"


@pytest.mark.slow
def test_import_is_light() -> None:
    """Beyond what transformers itself loads, importing the package loads nothing that only some commands need."""
    heavy = {"matplotlib", "datasets", "pandas", "pyarrow", "sacrebleu", "sklearn", "peft", "accelerate", "typer"}
    code = (
        "import sys, torch; from transformers import PreTrainedModel, DynamicCache; before = set(sys.modules)\n"
        "import softprompt, softprompt.methods; print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "softprompt" in loaded.stdout.split()
    assert heavy & set(loaded.stdout.split()) == set()
