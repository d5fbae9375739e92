"""The README, the contributing guide and the recorded first run say what is so: their commands and code run."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cli_kit import Shell

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")}
CODE = re.compile(r"<!-- run: (?P<kind>\w+) -->\n```\w+\n(?P<body>.*?)```", re.DOTALL)


def block(page: str, kind: str) -> str:
    """The one code block of a page that is marked to be run."""
    found = [match["body"] for match in CODE.finditer(PAGES[page]) if match["kind"] == kind]
    assert len(found) == 1, f"{page} has {len(found)} blocks marked {kind!r}"
    return found[0]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(arguments: list[str], folder: Path) -> str:
    """Standard output of a process that must succeed, started where a reader would: in the checkout's folder."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "COLUMNS": "120"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("README.md", "python"), {})  # noqa: S102 – our own page
    assert capsys.readouterr().out.strip() == "name: Milo | kind: duck => Milo is a duck."
    assert {file.name for file in (tmp_path / "my-prompt").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_import_example_runs() -> None:
    names: dict[str, object] = {}
    exec(block("README.md", "import"), names)  # noqa: S102 – our own page
    assert callable(names["get_peft_model"])


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands in order, each as it stands, with fewer steps; all in this process."""
    small = {
        "train": ["--steps", "4", "--train-limit", "64", "--eval-limit", "16", "--samples", "1"],
        "eval": ["--max-new-tokens", "8"],
    }
    (tmp_path / "softprompt").symlink_to(ROOT / "softprompt", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    shell = Shell(capsys)
    commands = block("README.md", "shell").replace("\\\n", " ").splitlines()
    assert len(commands) >= 6
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "softprompt"
        settings = small.get(arguments[0], [])
        assert shell.ok(*arguments, *settings).strip()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = {name for page in PAGES.values() for name in re.findall(r"\bmake ([a-z][\w-]*)", page)}
    assert {"demo", "test", "test-floor"} <= asked & targets
    assert asked <= targets | {"them"}  # "makes them" is prose


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", PAGES[page])
    scripts = re.findall(r"\b((?:scripts|benchmarks|softprompt|tests|examples)/[\w./]+\.\w+)", PAGES[page])
    results = "benchmarks/results/NAME.md"  # a pattern, not a file
    missing = [name for name in {*links, *scripts} - {results} if not (ROOT / name).exists()]
    assert not missing


def test_generated_parts_are_current() -> None:
    script = load_script("fill_readme")
    assert {page: script.stale((ROOT / page).read_text(encoding="utf-8")) for page in script.PAGES} == {
        page: [] for page in script.PAGES
    }


def test_stale_parts_are_found() -> None:
    script = load_script("fill_readme")
    text = "<!-- results:no_such_benchmark -->\nold\n<!-- /results:no_such_benchmark -->\n"
    assert script.stale(text) == ["results:no_such_benchmark"]
    assert script.stale(script.filled(text)) == []


def test_every_folder_is_in_the_tree() -> None:
    tree = README.split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    assert all(f"{name}/" in tree for name in folders if not name.startswith("."))


def test_first_run_is_generated_and_its_commands_exist() -> None:
    from typer.main import get_command

    from softprompt.cli import app

    page = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
    assert page.startswith(load_script("record_first_run").MARKER)
    used = re.findall(r"^[ $]*(?:[\w./-]+/)?softprompt ([a-z]+)\b", page, re.MULTILINE)
    assert used, "the demo prints what to type next"
    assert set(used) <= set(getattr(get_command(app), "commands", {}))


@pytest.mark.slow
def test_contributing_adds_a_method_in_one_file(tmp_path: Path) -> None:
    """With the file of CONTRIBUTING.md in a copy of the package, and nothing else changed, the method works."""
    check = """
import tiny, torch
from softprompt import SoftPromptModel, get_peft_model
from softprompt.methods import METHODS
LowRankConfig = METHODS["low_rank"].config_class
model = get_peft_model(tiny.build("llama"), LowRankConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, rank=3))
batch = tiny.ragged()
before = model(**batch).logits
model(**batch, labels=batch["input_ids"]).loss.backward()
torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
after = model(**batch).logits
assert not torch.allclose(before, after)
model.save_pretrained("saved")
loaded = SoftPromptModel.from_pretrained(tiny.build("llama"), "saved")
assert torch.allclose(loaded(**batch).logits, after, atol=1e-5)
print("trained, saved, loaded")
"""
    package = tmp_path / "softprompt"
    shutil.copytree(ROOT / "softprompt", package, ignore=shutil.ignore_patterns("embedded", "__pycache__"))
    (package / "methods" / "low_rank.py").write_text(block("CONTRIBUTING.md", "method"), encoding="utf-8")
    script = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'tests')!r}]\n{check}"
    assert run([sys.executable, "-c", script], tmp_path).strip() == "trained, saved, loaded"
