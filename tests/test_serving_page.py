"""docs/serving.md: its table of sizes is what its Python prints, and its formulas are the sizes of real files."""

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from softprompt import PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model
from softprompt.checkpoint import WEIGHTS_NAME
from softprompt.serve.folded import KV_NAME, write_folded
from softprompt.serve.vllm.settings import Settings

LENGTH = 7


@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(page: str) -> tuple[dict[str, Any], str]:
    """What the page's Python defines, and what it prints."""
    (body,) = re.findall(r"<!-- run: sizes -->\n```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(body, names)  # noqa: S102 – our own page
    return names, printed.getvalue()


def test_the_table_is_what_the_python_prints(page: str, ran: tuple[dict[str, Any], str]) -> None:
    (table,) = re.findall(r"<!-- the sizes -->\n(.*?)<!-- /the sizes -->", page, re.DOTALL)
    rows = "".join(table.splitlines(keepends=True)[2:])  # behind the head and the line below it
    assert rows == ran[1] and len(rows.splitlines()) == 9


def test_vllms_own_command_has_what_the_plugin_reads(page: str) -> None:
    (text,) = re.findall(r"--kv-transfer-config '(.*?)'", page, re.DOTALL)
    found = json.loads(text)
    settings = Settings.of(SimpleNamespace(**found))
    made = settings.as_config()
    assert found["kv_connector_extra_config"].keys() <= made["kv_connector_extra_config"].keys()
    extra = "kv_connector_extra_config"
    assert {**found, extra: None} == {**made, extra: None}


def data_bytes(path: Path) -> int:
    """The bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # one with heads as wide as width / heads, one with wider ones
def test_the_formulas_are_the_sizes_of_files(family: str, ran: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    base = tiny.build(family)
    config = base.config
    model = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.hidden_size)
    vectors, prefix, folded, _ = ran[0]["sizes"](*model, LENGTH, number=4)
    for kind, expected in ((PromptTuningConfig, vectors), (PrefixTuningConfig, prefix)):
        get_peft_model(tiny.build(family), kind(num_virtual_tokens=LENGTH)).save_pretrained(tmp_path / kind.__name__)
        assert data_bytes(tmp_path / kind.__name__ / WEIGHTS_NAME) == expected
    prompted = SoftPromptModel.from_pretrained(base, tmp_path / "PromptTuningConfig")
    write_folded(tmp_path, prompted.fold(), "0" * 64, "base")
    assert data_bytes(tmp_path / KV_NAME) == folded


def test_blocks_are_whole(ran: tuple[dict[str, Any], str]) -> None:
    sizes = ran[0]["sizes"]
    one = sizes(2, 3, 8, 99, 16)[3]
    assert one == sizes(2, 3, 8, 99, 16)[2]
    assert [sizes(2, 3, 8, 99, p)[3] for p in (1, 17, 32, 33)] == [one, 2 * one, 2 * one, 3 * one]
