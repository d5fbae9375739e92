"""Adding a method is adding one file: two toy methods, one of each kind of prompt, dropped into a copy of the checkout.

Nothing else is edited there. They get flags, training, saving, generation, their rows in the documents, and the
conformance tests, which enumerate the registry.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VECTORS = '''"""Toy vectors: A method for a test, https://example.org/toy-vectors

Virtual tokens are P = tanh(E)·W + b with a table E ∈ R^{p×r}.
"""

from dataclasses import dataclass, field
from typing import final

from torch import Tensor, nn

from softprompt.config import EmbeddingConfig
from softprompt.prompt import EmbeddingPrompt, need_count


@dataclass(frozen=True, kw_only=True)
class ToyVectorsConfig(EmbeddingConfig):
    """`toy_rank` is r."""

    PEFT_TYPE = "TOY_VECTORS"

    toy_rank: int = field(default=3, metadata={"help": "width of the toy's table"})


@final
class ToyVectors(EmbeddingPrompt):
    """Indices `[B, n]` → vectors `[B, n, d]`. In `inference_mode` the table holds the result itself."""

    name = "toy_vectors"
    config_class = ToyVectorsConfig

    def __init__(self, config: ToyVectorsConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        need_count(config, "token_dim")
        self.config = config
        trains = not config.inference_mode
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.toy_rank if trains else config.token_dim)
        self.output = nn.Linear(config.toy_rank, config.token_dim) if trains else None

    def forward(self, indices: Tensor) -> Tensor:
        rows = self.embedding(indices)
        return rows if self.output is None else self.output(rows.tanh())

    def output_layer(self) -> nn.Linear | None:
        return self.output
'''
KEYS = '''"""Toy keys: Another method for a test, https://example.org/toy-keys

Keys and values are a table.
"""

from dataclasses import dataclass, field
from typing import final

from torch import Tensor, nn

from softprompt.config import KVConfig
from softprompt.prompt import KVPrompt, need_count


@dataclass(frozen=True, kw_only=True)
class ToyKeysConfig(KVConfig):
    """`toy_spread` is the deviation that the table starts with."""

    PEFT_TYPE = "TOY_KEYS"

    toy_spread: float = field(default=1.0, metadata={"help": "how far the toy's table starts from zero"})


@final
class ToyKeys(KVPrompt):
    """Indices `[B, n]` → `[B, n, Σ h·(k+v)]`."""

    name = "toy_keys"
    config_class = ToyKeysConfig

    def __init__(self, config: ToyKeysConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        need_count(config, "token_dim", "num_layers", "num_attention_heads")
        self.config = config
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.prefix_width)
        nn.init.normal_(self.embedding.weight, std=config.toy_spread)

    def forward(self, indices: Tensor) -> Tensor:
        return self.embedding(indices)

    def output_layer(self) -> None:
        return None
'''
TOYS = {"toy_vectors": VECTORS, "toy_keys": KEYS}
FLAGS = {"toy_vectors": ("--toy-rank", "5"), "toy_keys": ("--toy-spread", "0.5")}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, its tests and scripts, with one more file for each toy."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("softprompt", "tests", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("embedded", "__pycache__"))
    shutil.copytree(ROOT / "softprompt" / "embedded", folder / "softprompt" / "embedded", copy_function=os.symlink)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, source in TOYS.items():
        (folder / "softprompt" / "methods" / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def python(checkout: Path, *arguments: str | Path) -> str:
    """Standard output of a process in the copy, which must succeed."""
    paths = os.pathsep.join([str(checkout), str(checkout / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=checkout, env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_they_pass_the_conformance_tests(checkout: Path) -> None:
    cells = ("llama-CAUSAL_LM", "gpt2-SEQ_CLS", "bert-TOKEN_CLS", "t5-SEQ_2_SEQ_LM", "bloom-CAUSAL_LM")
    tests = [f"test_cell[{cell}-{toy}]" for cell in (*cells, "mamba-CAUSAL_LM") for toy in TOYS]
    tests[-1] = "test_a_cell_that_cannot_exist_names_what_can[mamba-CAUSAL_LM-toy_keys]"
    printed = python(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                     *(f"tests/test_conformance.py::{test}" for test in tests))  # fmt: skip
    assert f"{len(tests)} passed" in printed


COMMANDS = """
import sys
from pathlib import Path
import cli_kit
from softprompt.cli import main
folder = Path(sys.argv[1])
base, rows = cli_kit.save_base(folder / "base"), cli_kit.write_rows(folder / "rows.jsonl", cli_kit.ROWS)
commands = [["methods"], ["train", "--help"]]
for toy, flag, value in (arguments.split() for arguments in sys.argv[2:]):
    out = folder / toy
    commands += [
        ["train", "--model", base, "--method", toy, "--train", rows, "--template", "{mr} => {refs}", "--out", out,
         "--steps", 2, "--batch-size", 2, "--samples", 1, "--max-new-tokens", 2, "--num-virtual-tokens", 4,
         flag, value],
        ["generate", "--prompt", out, "--input", "name[cat]", "--max-new-tokens", 3],
        ["show", out],
        ["convert", out, "--to", "kv", "--out", folder / f"{toy}.safetensors"],
    ]
for command in commands:
    status = main([str(part) for part in command])
    assert not status, command
"""


def test_they_have_flags_and_train_save_and_generate(checkout: Path, tmp_path: Path) -> None:
    printed = python(checkout, "-c", COMMANDS, tmp_path, *(" ".join((toy, *flag)) for toy, flag in FLAGS.items()))
    for toy, (flag, value) in FLAGS.items():
        assert flag in printed
        assert f"{toy}  Toy" in printed  # in the list of methods
        assert f"{toy}/ (report.html)" in printed
        assert (tmp_path / f"{toy}.safetensors").is_file()
        config = json.loads((tmp_path / toy / "adapter_config.json").read_text(encoding="utf-8"))
        assert config[flag[2:].replace("-", "_")] == float(value)


def test_they_have_their_rows_in_the_documents(checkout: Path) -> None:
    script = "import sys; sys.path[:0] = ['scripts', 'tests']; import fill_readme, support_methods as support; "
    script += "print(fill_readme.methods()); print(support.row('llama')[0]); print(sorted(support.METHODS))"
    table = python(checkout, "-c", script)
    assert (
        "| `toy_vectors` | `ToyVectorsConfig` | [Toy vectors: A method for a test](https://example.org/toy-vectors)"
        in table
    )
    assert (
        "| `toy_keys` | `ToyKeysConfig` | [Toy keys: Another method for a test](https://example.org/toy-keys)" in table
    )
    line = next(line for line in table.splitlines() if line.startswith("| llama |"))
    columns = [column.strip() for column in line.strip("|").split("|")][3:]
    names = json.loads(table.splitlines()[-1].replace("'", '"'))
    assert [columns[names.index(toy)] for toy in TOYS] == ["✓", "✓"]
