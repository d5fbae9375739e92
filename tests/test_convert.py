"""What cannot be said in another form is refused with the reason, and nothing is written."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cli_kit import Shell
from families import build

from softprompt import (
    KV,
    METHODS,
    ConfigError,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)
from softprompt.cli.use import convert_prompt
from softprompt.config import EmbeddingConfig, KVConfig

BEYOND: dict[str, tuple[str, Any]] = {
    "placement=after_bos": ("bert", PromptTuningConfig(num_virtual_tokens=3, placement="after_bos")),
    "placement=template, template=": ("llama", PromptEncoderConfig(num_virtual_tokens=3, template="{text} [P*3]")),
    "cross_prefix=True, layer_shapes=": ("t5", PrefixTuningConfig(num_virtual_tokens=3, cross_prefix=True)),
    "encoder_prefix=True": ("bart", PrefixTuningConfig(num_virtual_tokens=3, encoder_prefix=True)),
    "decoder_prefix=False": (
        "t5", PrefixTuningConfig(num_virtual_tokens=3, decoder_prefix=False, encoder_prefix=True)
    ),
    "prefix_always_visible=True": (
        "mistral_window", PrefixTuningConfig(num_virtual_tokens=3, prefix_always_visible=True)
    ),
    "layer_shapes=": ("deepseek_v3", PrefixTuningConfig(num_virtual_tokens=3)),
}  # fmt: skip
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("reason", BEYOND)
def test_what_peft_cannot_express_is_refused(reason: str, tmp_path: Path) -> None:
    family, config = BEYOND[reason]
    get_peft_model(build(family, TASKS.get(family, "CAUSAL_LM")), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UnsupportedError, match=r"cannot become a prompt of PEFT's: it has .*use it here") as caught:
        convert_prompt(tmp_path / "prompt", "peft", tmp_path / "out", None)
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_program_says_so_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, placement="after_bos")
    get_peft_model(build("bert", "SEQ_CLS"), config).save_pretrained(tmp_path / "prompt")
    status, _, err = Shell(capsys).run("convert", tmp_path / "prompt", "--to", "peft", "--out", tmp_path / "out")
    assert status == 2 and "placement=after_bos" in err


def test_every_field_is_pefts_or_known_not_to_be() -> None:
    """A field that PEFT does not have is listed, or is a name, a start or for training, which PEFT need not know."""
    harmless = {"task_names", "class_labels", "common_vocab_size", "prefix_dropout"}
    for method in METHODS.values():
        config = method.config_class
        theirs = _names(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method.peft_type)])
        ours = _names(config) - harmless
        assert ours - theirs == set(config.NOT_IN_PEFT)
        base = EmbeddingConfig if issubclass(config, EmbeddingConfig) else KVConfig
        assert set(base.NOT_IN_PEFT) <= set(config.NOT_IN_PEFT)


def _names(config: Any) -> set[str]:
    return {each.name for each in fields(config)}


@pytest.mark.parametrize(
    ("family", "config"),
    [("t5", PrefixTuningConfig(num_virtual_tokens=3, cross_prefix=True)),
     ("mistral_window", PrefixTuningConfig(num_virtual_tokens=3, prefix_always_visible=True))],
)  # fmt: skip
def test_a_key_value_file_says_what_it_cannot_hold(family: str, config: Any, tmp_path: Path) -> None:
    model = get_peft_model(build(family, TASKS.get(family, "CAUSAL_LM")), config)
    with pytest.raises(ConfigError, match=r"a key-value file has no .*keep the folder"):
        model.fold().save(tmp_path / "prefix.safetensors")
    prompt = model.encoder().prompt()
    assert isinstance(prompt, KV)
    with pytest.raises(ConfigError, match="a key-value file"):
        prompt.save(tmp_path / "prefix.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt2"])
def test_a_prompt_of_layers_that_differ_becomes_a_prefix(family: str, tmp_path: Path) -> None:
    base = build(family, "CAUSAL_LM")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path / "prompt")
    model.fold().save(tmp_path / "prefix.safetensors")
    convert_prompt(tmp_path / "prefix.safetensors", "prefix", tmp_path / "prefix", None)
    loaded = SoftPromptModel.from_pretrained(build(family, "CAUSAL_LM"), tmp_path / "prefix")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
