"""Configs: what users decide, PEFT's spelling of it, and one clear sentence for everything that means nothing."""

import enum
import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import peft
import pytest

import softprompt
from softprompt import (
    METHODS,
    ConfigError,
    PeftConfig,
    PrefixTuningConfig,
    PromptConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)

PAIRS = [
    (PromptTuningConfig, peft.PromptTuningConfig),
    (PrefixTuningConfig, peft.PrefixTuningConfig),
    (PromptEncoderConfig, peft.PromptEncoderConfig),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_field_of_peft_is_here_with_its_default(ours: type[PromptConfig], theirs: Any) -> None:
    mine = {field.name: field.default for field in fields(ours)}
    for field in fields(theirs):
        assert field.name in mine, field.name
        if field.name not in ("num_virtual_tokens", "peft_version", "inference_mode"):
            assert mine[field.name] == field.default, field.name
    assert ours(num_virtual_tokens=3).peft_type == theirs(num_virtual_tokens=3).peft_type.value


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_json_is_plain_and_comes_back(ours: type[PromptConfig], theirs: Any) -> None:
    config = ours(task_type="CAUSAL_LM", num_virtual_tokens=5, modules_to_save=["lm_head"])
    values = json.loads(json.dumps(config.to_dict()))
    assert ours.from_dict(values) == config
    for name, value in theirs(task_type="CAUSAL_LM", num_virtual_tokens=5).to_dict().items():
        if name not in ("modules_to_save", "peft_version", "encoder_hidden_size"):
            assert values[name] == (value.value if isinstance(value, enum.Enum) else value), name


def test_enums_are_their_strings() -> None:
    for given in ("MLP", "mlp", PromptEncoderReparameterizationType.MLP, peft.PromptEncoderReparameterizationType.MLP):
        config = PromptEncoderConfig(encoder_reparameterization_type=given)
        assert config.encoder_reparameterization_type is PromptEncoderReparameterizationType.MLP
    for given in ("SEQ_CLS", "seq_cls", TaskType.SEQ_CLS, peft.TaskType.SEQ_CLS):
        assert PrefixTuningConfig(task_type=given).task_type is TaskType.SEQ_CLS
    assert PrefixTuningConfig(peft_type=peft.PeftType.PREFIX_TUNING).peft_type == "PREFIX_TUNING"
    for member in (*TaskType, *PromptTuningInit, *PromptEncoderReparameterizationType):
        assert str(member) == member.value == member
        assert json.dumps(member) == f'"{member.value}"'


def test_a_config_does_not_change_in_place() -> None:
    config = PromptTuningConfig(num_virtual_tokens=3)
    with pytest.raises(FrozenInstanceError):
        config.num_virtual_tokens = 4  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(config, num_virtual_tokens=4).num_virtual_tokens == 4
    assert config.num_virtual_tokens == 3


@pytest.mark.parametrize("config_class", [pair[0] for pair in PAIRS])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0.*at least 1"),
        ({"num_virtual_tokens": -3}, "num_virtual_tokens=-3"),
        ({"num_virtual_tokens": 2.0}, "num_virtual_tokens=2.0"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens=True"),
        ({"num_virtual_tokens": "20"}, "num_virtual_tokens='20'"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None"),
        ({"token_dim": 0}, "token_dim=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4'"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules=3"),
        ({"task_type": "SEQ_CLASS"}, "task_type='SEQ_CLASS'.*SEQ_CLS"),
        ({"peft_type": "LORA"}, "peft_type='LORA'"),
    ],
)
def test_values_that_mean_nothing(config_class: type[PromptConfig], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_class(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (PrefixTuningConfig, {"prefix_dropout": 1.0}, "prefix_dropout=1.0"),
        (PrefixTuningConfig, {"prefix_dropout": -0.1}, "prefix_dropout=-0.1"),
        (PrefixTuningConfig, {"prefix_dropout": "a"}, "prefix_dropout='a'"),
        (PrefixTuningConfig, {"prefix_dropout": float("nan")}, "prefix_dropout=nan"),
        (PrefixTuningConfig, {"init_weights": "ones"}, "init_weights='ones'.*'zero'"),
        (PrefixTuningConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size=0"),
        (PromptEncoderConfig, {"encoder_hidden_size": 1.5}, "encoder_hidden_size=1.5"),
        (PromptEncoderConfig, {"encoder_num_layers": 0}, "encoder_num_layers=0"),
        (PromptEncoderConfig, {"encoder_num_layers": None}, "encoder_num_layers=None"),
        (PromptEncoderConfig, {"encoder_dropout": 1}, "encoder_dropout=1"),
        (PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, "GRU.*MLP, LSTM"),
    ],
)
def test_method_values_that_mean_nothing(config_class: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_class(**options)


def test_unknown_fields_of_a_file_are_refused() -> None:
    with pytest.raises(ConfigError, match="PrefixTuningConfig has no field 'rank'"):
        PrefixTuningConfig.from_dict({"rank": 8})


@pytest.mark.parametrize("config_class", [pair[0] for pair in PAIRS])
def test_saved_and_read_again(config_class: Any, tmp_path: Path) -> None:
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=8, num_layers=2, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    for reader in (PeftConfig, config_class):
        again = reader.from_pretrained(tmp_path)
        assert type(again) is config_class
        assert again.num_virtual_tokens == 3
        assert again.task_type is TaskType.CAUSAL_LM
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).num_virtual_tokens == 3


def test_reading_another_method_says_which(tmp_path: Path) -> None:
    PromptTuningConfig(num_virtual_tokens=3, token_dim=8).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"PROMPT_TUNING.*PREFIX_TUNING"):
        PrefixTuningConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_a_method_adds_explains_itself(method: str) -> None:
    inherited = {field.name for field in fields(PromptConfig)}
    for field in fields(METHODS[method].config_class):
        if field.name not in inherited | {"tokenizer_kwargs", "template", "layer_shapes", "task_names"}:  # filled in
            assert field.metadata.get("help"), field.name


def test_is_prompt_learning_and_table_size() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, num_transformer_submodules=2)
    assert config.is_prompt_learning
    assert config.total_virtual_tokens == 6
    assert "PrefixTuningConfig" in str(config)


def test_the_public_names_are_there_and_pefts_classes_per_head_mean_one_class() -> None:
    assert all(getattr(softprompt, name) is not None for name in softprompt.__all__)
    heads = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "FeatureExtraction")
    for head in heads:
        assert hasattr(peft, f"PeftModelFor{head}")
        assert getattr(softprompt, f"PeftModelFor{head}") is softprompt.SoftPromptModel
