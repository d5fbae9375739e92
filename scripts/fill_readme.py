"""Fill the generated parts of README.md and docs/scaling.md: result tables, goals, methods, the file tree.

    python scripts/fill_readme.py            write the pages
    python scripts/fill_readme.py --check    exit 1, naming the part, where a page is out of date

A part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. ``results:e2e`` is benchmarks/results/e2e.md;
``goals`` says which goals for speed and memory the numbers in benchmarks/results/speed_*.json meet;
``methods`` comes from the registry; ``tree`` from the first sentence of each module's docstring.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/scaling.md", "docs/serving.md")
PART = re.compile(r"<!-- (?P<name>[a-z][\w:-]*) -->\n(?P<body>.*?)<!-- /(?P=name) -->", re.DOTALL)
FOLDERS = {
    "softprompt": "the package",
    "benchmarks": "one question, one table per file; results/ holds what they printed",
    "examples": "recipes to copy from",
    "findings": "what surprised us in other libraries, one script each; not part of the tests",
    "tests": "mirrors the package; offline, on tiny models",
    "tests_vllm": "what needs vLLM, in an environment of its own",
    "scripts": "what made the embedded model, and what makes the generated documents",
    "docs": "support.md: what runs on what; data, templates, prompts-together, peft; first-run.md",
}


def results(name: str) -> str:
    """The markdown table that a benchmark left in benchmarks/results."""
    path = ROOT / "benchmarks" / "results" / f"{name}.md"
    return path.read_text(encoding="utf-8").strip() + "\n" if path.exists() else "Not measured yet.\n"


def goals() -> str:
    """The goals of benchmarks/goals.py beside what was measured."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("goals").scoreboard()
    finally:
        sys.path.remove(folder)


def methods() -> str:
    """One row per registered method: name, configuration class, paper."""
    from softprompt.methods import METHODS

    lines = ["| method | configuration | paper |", "|---|---|---|"]
    for name, method in sorted(METHODS.items()):
        text = sys.modules[method.__module__].__doc__ or ""
        title, url = text.splitlines()[0].split(", https://")
        lines.append(f"| `{name}` | `{method.config_class.__name__}` | [{title}](https://{url.rstrip('.')}) |")
    return "\n".join(lines) + "\n"


def tree() -> str:
    """The folders, and each module of the package with the first sentence of its docstring."""
    lines = []
    for folder, meaning in FOLDERS.items():
        if (ROOT / folder).is_dir():
            lines.append(f"{folder + '/':<24}{meaning}")
            lines += modules(ROOT / folder, "  ") if folder == "softprompt" else []
    return "```text\n" + "\n".join(lines) + "\n```\n"


def modules(folder: Path, indent: str) -> list[str]:
    """The lines of one package folder: its own modules, then its sub-packages."""
    lines = []
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            lines.append(f"{indent + path.name:<24}{summary(path)}")
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            lines.append(f"{indent + path.name + '/':<24}{summary(path / '__init__.py')}")
            lines += modules(path, indent + "  ")
    return lines


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, without its URL; a long one ends at its last clause that fits."""
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(document.split("\n\n")[0].split()).split(", https://")[0].split(". ")[0].rstrip(".")
    if len(sentence) <= 94:
        return sentence
    ends = [found.start() for found in re.finditer(r"[,;:] | – | [(]", sentence[:94])]
    return sentence[: ends[-1]] if ends else sentence[:94].rsplit(" ", 1)[0] + " …"


def part(name: str) -> str:
    kind, _, argument = name.partition(":")
    makers = {"results": lambda: results(argument), "goals": goals, "methods": methods, "tree": tree}
    if kind not in makers:
        raise SystemExit(f"a page has a part {name!r}, but only {', '.join(makers)} are known")
    return makers[kind]()


def filled(text: str) -> str:
    """``text`` with every part replaced by what it should be."""
    return PART.sub(lambda found: f"<!-- {found['name']} -->\n{part(found['name'])}<!-- /{found['name']} -->", text)


def stale(text: str) -> list[str]:
    """The names of the parts that are not what they should be."""
    return [found["name"] for found in PART.finditer(text) if found["body"] != part(found["name"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a part is out of date")
    arguments = parser.parse_args()
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        old = stale(text)
        if old and arguments.check:
            raise SystemExit(f"{page} is out of date in: {', '.join(old)}; run python scripts/fill_readme.py")
        if old:
            temporary = (ROOT / page).with_name(".filled.tmp")
            temporary.write_text(filled(text), encoding="utf-8")
            os.replace(temporary, ROOT / page)


if __name__ == "__main__":
    main()
