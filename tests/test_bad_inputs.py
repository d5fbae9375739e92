"""What users get wrong, one row each: the command ends with status 2 and one line that names the cause.

Nothing may be left half-written: after each of these the output folder does not exist, or holds what it held before.
"""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import LABELLED, ROWS, Shell, save_base, save_prompt, write_rows
from safetensors.torch import load_file, save_file

from softprompt import PrefixTuningConfig, PromptTuningConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FLAGS = ("--template", "{mr} => {ref}", "--steps", 1, "--batch-size", 2, "--num-virtual-tokens", 4)


@dataclass(frozen=True)
class Bench:
    """What there is to spoil: a base model, another one, good data, a good prompt, and a place for the output."""

    base: Path
    other: Path
    rows: Path
    prompt: Path
    prefix: Path
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def train(self, *flags: Any, data: Path | None = None, out: Path | None = None) -> tuple[Any, ...]:
        return ("train", "--model", self.base, "--train", data or self.rows, "--out", out or self.out, *FLAGS, *flags)

    def generate(self, prompt: Path, *flags: Any) -> tuple[Any, ...]:
        return ("generate", "--model", self.base, "--prompt", prompt, *(flags or ("--input", "the cat")))

    def eval(self, data: Path, *flags: Any) -> tuple[Any, ...]:
        return ("eval", "--model", self.base, "--prompt", self.prompt, "--eval", data, *flags)

    def damaged(self) -> Path:
        """A copy of the base model whose weights are cut short."""
        copy = self.folder / "damaged"
        shutil.copytree(self.base, copy)
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-40])
        return copy

    def spoilt(self, change: Callable[[Path], None]) -> Path:
        """A copy of the good prompt with something wrong in it."""
        copy = self.folder / "spoilt"
        copy.mkdir()
        for path in self.prompt.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        change(copy)
        return copy


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-40])


def change_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        vectors = load_file(folder / WEIGHTS)["prompt_embeddings"]
        save_file({"prompt_embeddings": change(vectors)}, folder / WEIGHTS)

    return apply


def change_config(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **values}))

    return apply


class Code:
    """A pickle that would make a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"prompt_embeddings": Code(folder.parent / "pwned")}, folder / "adapter_model.bin")


LONG = {"mr": "name[cat]", "refs": ["the cat sat on the mat " * 40]}
CHAT = {"messages": [{"role": "user", "content": "the cat"}, {"role": "user", "content": "sat"}]}

# What is wrong, the command, and what its one line must say.
CASES: dict[str, tuple[Callable[[Bench], tuple[Any, ...]], tuple[str, ...]]] = {
    # training data
    "no such file": (lambda b: b.train(data=b.rows.with_name("row.jsonl")), ("no file", "did you mean", "rows.jsonl")),
    "no such folder": (lambda b: b.train(data=b.folder / "x" / "rows.jsonl"), ("no file", "does not exist either")),
    "missing column": (
        lambda b: b.train("--eval", b.rows, data=b.write("r.jsonl", '{"mr": "a", "text": "b"}\n')),
        ('no column "ref"', "mr, text", "r.jsonl line 1"),
    ),
    "control characters": (
        lambda b: b.train(data=b.write("r.jsonl", json.dumps({"\x1b[31m\nmr": "a"}) + "\n")),
        ("its columns are ?[31m mr",),
    ),
    "empty file": (lambda b: b.train(data=b.write("r.jsonl", "")), ("r.jsonl holds no rows",)),
    "broken JSON": (
        lambda b: b.train(data=b.write("r.jsonl", '{"mr": "a", "refs": ["b"]}\n{"mr": "a" "refs"\n')),
        ("r.jsonl line 2 is not valid JSON",),
    ),
    "not an object": (lambda b: b.train(data=b.write("r.jsonl", "[1, 2]\n")), ("line 1 holds a list",)),
    "wrong type": (lambda b: b.train(data=b.write("r.jsonl", '{"mr": {}, "ref": "b"}\n')), ('"mr" must be text',)),
    "blank target": (lambda b: b.train(data=b.write("r.jsonl", '{"mr": "a", "ref": ""}\n')), ("nothing to learn",)),
    "not UTF-8": (lambda b: b.train(data=b.write("r.jsonl", b'{"mr": "caf\xe9"}\n')), ("not UTF-8", "convert")),
    "ragged CSV": (
        lambda b: b.train(data=b.write("r.csv", "mr,ref\na,b\na,b,c\n")),
        ("line 3 has 3 fields", "mr, ref"),
    ),
    "Parquet that is not": (lambda b: b.train(data=b.write("r.parquet", "mr,ref\n")), ("not a readable Parquet file",)),
    "unknown format": (lambda b: b.train(data=b.write("r.docx", "x")), ("no known format", ".jsonl")),
    "target too long": (
        lambda b: b.train(data=write_rows(b.folder / "r.jsonl", [ROWS[0], LONG])),
        ("r.jsonl line 2 does not fit", "shorten"),
    ),
    "chat that does not end": (
        lambda b: ("train", "--model", b.base, "--train", write_rows(b.folder / "r.jsonl", [CHAT]), "--out", b.out),
        ("must be the assistant's", "user, user"),
    ),
    "label missing": (
        lambda b: ("train", "--model", b.base, "--task", "SEQ_CLS", "--train", b.rows, "--out", b.out),
        ('no column "label"', "mr, refs"),
    ),
    "unseen label": (
        lambda b: ("train", "--model", b.base, "--task", "SEQ_CLS", "--out", b.out,
                   "--train", write_rows(b.folder / "train.jsonl", LABELLED),
                   "--eval", write_rows(b.folder / "test.jsonl", [{"sentence": "x", "label": "odd"}])),
        ("'odd' is not one of bad, good, so",),
    ),
    "no such eval file": (lambda b: b.train("--eval", b.folder / "held.jsonl"), ("no file", "held.jsonl")),
    # settings
    "field of no column": (lambda b: b.train("--template", "{name} => {ref}"), ('no column "name"', "mr, refs")),
    "template without field": (lambda b: b.train("--template", "mr => ref"), ("names no column",)),
    "template cut short": (lambda b: b.train("--template", "{mr => {ref}"), ("template", "malformed")),
    "unknown method": (
        lambda b: b.train("--method", "prefix_tunning"),
        ("prefix_tunning", "did you mean", "prefix_tuning"),
    ),
    "option of another method": (
        lambda b: b.train("--method", "prompt_tuning", "--prefix-projection"),
        ("--prefix-projection is an option of prefix_tuning, not of prompt_tuning",),
    ),
    "negative learning rate": (
        lambda b: b.train("--learning-rate", "-0.1"),
        ("learning_rate is -0.1", "greater than 0"),
    ),
    "no virtual tokens": (lambda b: b.train("--num-virtual-tokens", 0), ("num_virtual_tokens is 0", "at least 1")),
    "a word for a number": (lambda b: b.train("--steps", "ten"), ("--steps", "integer", "--help")),
    "steps and epochs": (lambda b: b.train("--epochs", 1), ("both steps (1) and epochs (1)",)),
    "prompt longer than the context": (lambda b: b.train("--num-virtual-tokens", 160), ("160", "context")),
    "text too short": (
        lambda b: b.train("--method", "prefix_tuning", "--num-virtual-tokens", 20, "--init-text", "the cat"),
        ("20", "2", "text"),
    ),
    "no training data": (lambda b: ("train", "--model", b.base, "--out", b.out), ("no training data", "--train")),
    "unknown recipe key": (
        lambda b: ("train", b.write("r.yaml", "learning_rat: 0.1\n")), ("r.yaml", "learning_rat", "did you mean"),
    ),
    "recipe that is not YAML": (lambda b: ("train", b.write("r.yaml", "a: [1\n")), ("r.yaml is not valid YAML",)),
    "recipe of another type": (
        lambda b: ("train", b.write("r.yaml", "steps: ten\n")),
        ("steps is 'ten'", "whole number"),
    ),
    "no such recipe": (lambda b: ("train", b.folder / "r.yaml"), ("no recipe", "r.yaml")),
    "no such model": (lambda b: (*b.train(), "--model", b.folder / "model"), ("no model folder", "check")),
    "no such model on the hub": (lambda b: (*b.train(), "--model", "no/such"), ("no folder no/such", "hub name")),
    "folder without a model": (lambda b: (*b.train(), "--model", b.folder), ("holds no model", "config.json")),
    "a damaged model": (lambda b: (*b.train(), "--model", b.damaged()), ("the model in", "cannot be loaded")),
    "no such number format": (lambda b: (*b.generate(b.prompt), "--dtype", "int8"), ("dtype is 'int8'", "bfloat16")),
    "no such device": (lambda b: b.train("--device", "warp"), ("device 'warp' cannot be used", "auto")),
    # the run folder
    "out is a file": (lambda b: b.train(out=b.write("file", "x")), ("file is a file", "choose another")),
    "out inside a file": (lambda b: b.train(out=b.write("file", "x") / "run"), ("not writable", "choose another")),
    "out is not empty": (lambda b: b.train(out=b.prompt), ("not empty", "choose another")),
    "nothing to resume": (lambda b: ("train", "--resume", "--out", b.folder / "none"), ("no run in", "--train")),
    # a saved prompt
    "no such prompt": (lambda b: b.generate(b.folder / "prompt"), ("no folder", "prompt")),
    "prompt folder without config": (lambda b: b.generate(b.base), (CONFIG,)),
    "truncated": (lambda b: b.generate(b.spoilt(cut)), (WEIGHTS,)),
    "filled with NaN": (lambda b: b.generate(b.spoilt(change_tensor(lambda t: t * float("nan")))), (WEIGHTS, "NaN")),
    "whole numbers": (lambda b: b.generate(b.spoilt(change_tensor(lambda t: t.int()))), (WEIGHTS, "I32")),
    "fewer rows than its config": (lambda b: b.generate(b.spoilt(change_tensor(lambda t: t[1:]))), (WEIGHTS, "shape")),
    "a pickle with code": (lambda b: b.generate(b.spoilt(pickled)), ("adapter_model.bin",)),
    "another kind of adapter": (lambda b: b.generate(b.spoilt(change_config(peft_type="LORA"))), ("LORA", CONFIG)),
    "a config that is not JSON": (
        lambda b: b.generate(b.spoilt(lambda folder: (folder / CONFIG).write_text("{") and None)), (CONFIG, "JSON"),
    ),
    "made for another base model": (
        lambda b: ("generate", "--model", b.other, "--prompt", b.prompt, "--input", "x"),
        ("another base model", "32", "24"),
    ),
    # use
    "no input": (lambda b: b.generate(b.prompt, "--max-new-tokens", 4), ("--input", "--file")),
    "two inputs": (lambda b: b.generate(b.prompt, "--input", "a", "--file", b.rows), ("--input", "--file")),
    "empty input": (lambda b: b.generate(b.prompt, "--input", ""), ("the input is empty",)),
    "input too long": (lambda b: b.generate(b.prompt, "--input", "the cat " * 100), ("takes 201 tokens", "shorten")),
    "input file without the column": (lambda b: b.generate(b.prompt, "--file", b.rows), ('no column "input"',)),
    "fields as plain text": (
        lambda b: b.generate(b.prompt, "--input", "cat", "--template", "{a} {b} => {c}"),
        ("2 input fields", '"a"', "--raw"),
    ),
    "no tokens to write": (
        lambda b: b.generate(b.prompt, "--input", "a", "--max-new-tokens", 0),
        ("--max-new-tokens",),
    ),
    "no such held-out file": (lambda b: b.eval(b.folder / "e.jsonl"), ("no file", "e.jsonl")),
    "held-out data of another form": (lambda b: b.eval(b.rows), ('no column "input"', '"{mr} => {refs}"')),
    "a key-value file that is none": (lambda b: ("show", b.write("kv.safetensors", "x" * 50)), ("kv.safetensors",)),
    "nearest tokens of another model": (lambda b: ("show", b.prompt, "--model", b.other), ("width 32", "24")),
    "conversion to something unknown": (
        lambda b: ("convert", b.prompt, "--to", "peff", "--out", b.out),
        ("peff", "'peft'"),
    ),
    "a folder for a key-value file": (
        lambda b: ("convert", b.prefix, "--to", "kv", "--out", b.folder), ("is a folder", ".safetensors"),
    ),
    # the command itself
    "unknown flag": (lambda b: ("show", b.prompt, "--colour"), ("--colour", "softprompt show --help")),
    "unknown command": (lambda b: ("trian",), ("trian", "--help")),
    "missing flag": (lambda b: ("generate", "--input", "x"), ("--prompt",)),
}  # fmt: skip


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    return {
        "base": save_base(folder / "base"),
        "other": save_base(folder / "other", hidden_size=24),
        "rows": write_rows(folder / "rows.jsonl", ROWS),
        "prompt": save_prompt(folder / "prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        "prefix": save_prompt(folder / "prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    }


@pytest.fixture
def bench(parts: dict[str, Path], tmp_path: Path) -> Bench:
    return Bench(**parts, folder=tmp_path)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def everything(folder: Path) -> dict[str, bytes]:
    """Every file with its content, and every folder."""
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_with_one_line(name: str, bench: Bench, shell: Shell) -> None:
    make, fragments = CASES[name]
    command = make(bench)
    before = everything(bench.folder), everything(bench.prompt)
    status, out, err = shell.run(*command)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    for fragment in fragments:
        assert fragment in err
    assert (everything(bench.folder), everything(bench.prompt)) == before
    assert not (bench.folder / "pwned").exists()


def test_there_are_at_least_twenty() -> None:
    assert len(CASES) >= 20


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 1,500 bytes: the system itself refuses the write, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_disk_is_full_while_training_saves(bench: Bench, shell: Shell, small_disk: None) -> None:
    status, _, err = shell.run(*bench.train("--method", "prefix_tuning", "--num-virtual-tokens", 8))
    assert (status, len(err.splitlines())) == (2, 1)
    assert str(bench.out) in err
    assert "File too large" in err
    assert not [name for name in everything(bench.out) if name.startswith("adapter") or "tmp" in name or "new" in name]


def test_the_disk_is_full_while_converting(bench: Bench, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.out.mkdir()
    (bench.out / WEIGHTS).write_text("what was there before")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = shell.run("convert", bench.prompt, "--to", "peft", "--out", bench.out)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "No space left on device" in err
    assert "free some space" in err
    assert everything(bench.out) == {WEIGHTS: b"what was there before"}


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "not read-only"), (errno.EACCES, "you may")]
)
def test_any_system_error_names_cause_and_remedy(
    shell: Shell, bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("softprompt.cli.use.facts_of", failing)
    status, _, err = shell.run("show", bench.prompt)
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"some/file: {os.strerror(number)}" in err
    assert remedy in err
