"""What `softprompt serve --engine vllm` makes of its options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from softprompt.errors import ConfigError
from softprompt.serve.options import ServeOptions
from softprompt.serve.vllm.launch import command
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


def test_copies_are_temporary_where_no_folder_is_given(options: ServeOptions) -> None:
    arguments, _ = command(replace(options, objects=None))
    config = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    settings = Settings.of(SimpleNamespace(**config))
    assert settings.sole and settings.objects.is_dir()
    settings.objects.rmdir()


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"max_cache_tokens": 100}, {"log_prompts": True}])
def test_options_that_vllm_has_no_word_for(options: ServeOptions, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        command(replace(options, **change))


def test_a_server_without_the_connector() -> None:
    with pytest.raises(ConfigError, match="SoftPromptConnector"):
        Settings.of(None)
    with pytest.raises(ConfigError, match="prompts"):
        Settings.of(SimpleNamespace(kv_connector="SoftPromptConnector", kv_connector_extra_config={"objects": "x"}))
