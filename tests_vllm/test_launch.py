"""What `softprompt serve --engine vllm` makes of its options."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PretrainedConfig

from softprompt.errors import ConfigError, SoftPromptError
from softprompt.serve.options import ServeOptions
from softprompt.serve.vllm.launch import command
from softprompt.serve.vllm.same_model import check_same_model
from softprompt.serve.vllm.settings import Settings


@pytest.fixture
def options(tmp_path: Path) -> ServeOptions:
    return ServeOptions("some/base", tmp_path, name="base", admin_key="secret", objects=tmp_path / "objects")


def test_command(options: ServeOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    arguments, environment = command(replace(options, max_length=100), ["--enforce-eager"])
    assert arguments[0] == "-m" and arguments[3] == "some/base" and arguments[-1] == "--enforce-eager"
    given = dict(zip(arguments[4:-1:2], arguments[5:-1:2], strict=True))
    assert given["--served-model-name"] == "base" and given["--max-model-len"] == "100"
    assert environment["VLLM_PLUGINS"] == "other,softprompt"
    assert environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "1"
    assert environment["SOFTPROMPT_ADMIN_KEY"] == "secret" not in " ".join(arguments)
    config = json.loads(given["--kv-transfer-config"])
    assert Settings.of(SimpleNamespace(**config)) == Settings(options.prompts, options.prompts / "objects")


def test_other_plugins_are_loaded_as_before(options: ServeOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm.general_plugins": ["one"], "vllm.platform_plugins": ["two"]}
    found = {group: [SimpleNamespace(name=name) for name in names] for group, names in installed.items()}
    monkeypatch.setattr("softprompt.serve.vllm.launch.entry_points", lambda group: found.get(group, []))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert command(options)[1]["VLLM_PLUGINS"] == "one,two,softprompt"
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert command(options)[1]["VLLM_PLUGINS"] == "softprompt"


@pytest.mark.parametrize(
    ("changes", "rope", "error"),
    [
        ({}, {"rope_type": "llama3"}, None),
        ({"revision": "abc"}, {}, "--revision 'abc'"),
        ({"hf_overrides": {"a": 1}}, {}, "--hf-overrides"),
        ({"hf_config_path": "there"}, {}, "--hf-config-path"),
        ({}, {"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'"),
        ({}, {"rope_type": "longrope", "original_max_position_embeddings": 50}, "--max-model-len 50"),
        ({}, {"rope_type": "longrope", "original_max_position_embeddings": 100}, None),
    ],
)
def test_vllm_runs_the_model_that_prompts_are_folded_with(changes: Any, rope: Any, error: str | None) -> None:
    text = PretrainedConfig()
    text.rope_parameters = rope
    same = {"revision": None, "hf_overrides": {}, "hf_config_path": None, "max_model_len": 100, "hf_text_config": text}
    with nullcontext() if error is None else pytest.raises(SoftPromptError, match=error):
        check_same_model(SimpleNamespace(**{**same, **changes}))


def test_copies_are_temporary_where_no_folder_is_given(options: ServeOptions) -> None:
    arguments, _ = command(replace(options, objects=None))
    config = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    settings = Settings.of(SimpleNamespace(**config))
    assert settings.sole and settings.objects.is_dir()
    settings.objects.rmdir()


@pytest.mark.parametrize(
    "change",
    [{"device": "cuda"}, {"max_cache_tokens": 100}, {"log_prompts": True}, {"timeout": 5.0}, {"max_body": 5}],
)
def test_options_that_vllm_has_no_word_for(options: ServeOptions, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        command(replace(options, **change))


def test_a_server_without_the_connector() -> None:
    with pytest.raises(ConfigError, match="SoftPromptConnector"):
        Settings.of(None)
    with pytest.raises(ConfigError, match="prompts"):
        Settings.of(SimpleNamespace(kv_connector="SoftPromptConnector", kv_connector_extra_config={"objects": "x"}))
