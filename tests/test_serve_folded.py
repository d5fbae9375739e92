"""Prompts as the files of keys and values that another engine reads, and the base model they are folded by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch
from library_kit import BASE, lent
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from softprompt import METHODS, PrefixTuningConfig, SoftPromptModel, get_peft_model
from softprompt.checkpoint import load_adapter
from softprompt.errors import CheckpointError, ConfigError, UnsupportedError
from softprompt.serve.base import Base, FolderBase, fingerprint_of
from softprompt.serve.folded import KV_NAME, read_folded
from softprompt.serve.library import PromptLibrary

TOKENS = 4
FAMILIES = ("gpt2", "llama")  # the second has fewer heads for keys than for queries


def prompted(family: str, method: str, **more: object) -> SoftPromptModel:
    """A tiny model with a random prompt."""
    options = {**METHODS[method].example, **more}
    config = METHODS[method].config_class(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **options)
    model = get_peft_model(tiny.build(family), config).eval()
    with torch.no_grad():
        for parameter in model.encoder().parameters():
            parameter.normal_()
    return model


def served(folder: Path, base: Base) -> PromptLibrary:
    library = PromptLibrary(folder / "prompts", base, folder / "objects", folded=True)
    changes = library.scan()
    assert not changes.refused
    return library


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_what_the_model_folds_to(tmp_path: Path, family: str, method: str) -> None:
    model = prompted(family, method)
    model.save_pretrained(tmp_path / "prompts" / "a")
    base = lent(family)
    library = served(tmp_path, base)
    model = SoftPromptModel.from_pretrained(tiny.build(family), tmp_path / "prompts" / "a")
    tasks = model.encoder().num_tasks
    for number in range(tasks):
        version = library.get("a" if tasks == 1 else f"a:{number}")
        assert (version.method, version.length, version.slots) == (method, TOKENS, False)
        expected = model.fold(task=None if tasks == 1 else number)
        found = read_folded(version.folder, version.digest)
        assert len(found) == len(expected.layers) == 2
        for (key, value), (wanted_key, wanted_value) in zip(found, expected.layers, strict=True):
            assert key.shape == ((2 if family == "llama" else 4), TOKENS, 8)
            assert torch.equal(key, wanted_key[0])
            assert torch.equal(value, wanted_value[0])
            assert key.dtype is value.dtype is torch.float32
        with safe_open(version.folder / KV_NAME, "pt") as file:
            told = file.metadata()
        assert told == {
            "digest": version.digest, "length": "4", "layers": "2", "dtype": "float32", "base": base.fingerprint,
            "format": "pt",
        }  # fmt: skip


@pytest.mark.parametrize("placement", [{"placement": "after_bos"}, {"template": "{a} [P] {b} [P*3]"}])
def test_a_prompt_inside_the_rows_has_no_such_file(tmp_path: Path, placement: dict[str, str]) -> None:
    prompted("llama", "p_tuning", **placement).save_pretrained(tmp_path / "prompts" / "a")
    version = served(tmp_path, lent("llama")).get("a")
    assert version.slots
    assert sorted(os.listdir(version.folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_adapter(version.folder).config == load_adapter(tmp_path / "prompts" / "a").config


def test_a_file_of_another_prompt_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        prompted("llama", "prefix_tuning").save_pretrained(tmp_path / "prompts" / name)
    library = served(tmp_path, lent("llama"))
    one, other = library.get("a"), library.get("b")
    data = (other.folder / KV_NAME).read_bytes()
    (one.folder / KV_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match="belongs to another prompt"):
        read_folded(one.folder, one.digest)
    (one.folder / KV_NAME).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="damaged, cut short"):
        read_folded(one.folder, one.digest)


def test_numbers_beyond_the_served_format_are_refused(tmp_path: Path) -> None:
    model = prompted("llama", "prefix_tuning")
    with torch.no_grad():
        next(model.encoder().parameters()).mul_(1e6)
    model.save_pretrained(tmp_path / "prompts" / "a")
    library = PromptLibrary(tmp_path / "prompts", lent("llama", torch.float16), tmp_path / "objects", folded=True)
    assert "beyond what float16 can hold" in library.scan().refused["a"]
    assert os.listdir(tmp_path / "objects") == []


def test_a_prefix_seen_from_beyond_a_window_is_refused(tmp_path: Path) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prefix_always_visible=True)
    model = get_peft_model(tiny.build("mistral"), config).eval()
    model.save_pretrained(tmp_path / "prompts" / "a")
    library = PromptLibrary(tmp_path / "prompts", lent("mistral"), tmp_path / "objects", folded=True)
    assert "prefix_always_visible" in library.scan().refused["a"]
    with pytest.raises(UnsupportedError):
        library.load("a")


# ---- a base model in a folder ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.build("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_a_folder_folds_the_same_and_is_let_go(tmp_path: Path, saved: Path, dtype: str) -> None:
    base = FolderBase(str(saved), BASE, dtype)
    prompted("llama", "prompt_tuning").save_pretrained(tmp_path / "prompts" / "a")
    library = served(tmp_path, base)
    version = library.get("a")
    again = AutoModelForCausalLM.from_pretrained(saved, dtype=getattr(torch, dtype))
    model = SoftPromptModel.from_pretrained(again, tmp_path / "prompts" / "a")
    for found, wanted in zip(read_folded(version.folder, version.digest), model.fold().layers, strict=True):
        assert all(torch.equal(one, other[0]) for one, other in zip(found, wanted, strict=True))
        assert found[0].dtype is getattr(torch, dtype)
    assert base._way is None
    assert base.facts == lent("llama").facts
    assert base._way is None  # which is known without the model
    assert torch.equal(base.words(), model.get_base_model().get_input_embeddings().weight)
    assert base._way is None
    assert len(library.nearest("a")) == TOKENS


def test_the_fingerprint_of_a_folder_changes_with_its_weights(saved: Path) -> None:
    before = fingerprint_of(str(saved))
    assert before == fingerprint_of(f"{saved}/.") == FolderBase(str(saved), BASE, "float32").fingerprint
    assert len(before) == 64
    path = saved / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, (1, 1))
    after = fingerprint_of(str(saved))
    (saved / "config.json").write_text((saved / "config.json").read_text() + "\n")
    assert len({before, after, fingerprint_of(str(saved))}) == 3


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    prompted("gpt2", "prompt_tuning").save_pretrained(tmp_path / "prompts" / "a")
    with pytest.raises(ConfigError, match="is no base model that can be read"):
        fingerprint_of(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="is not a number format"):
        FolderBase("embedded", BASE, "auto")
    library = PromptLibrary(
        tmp_path / "prompts", FolderBase(str(tmp_path / "nothing"), BASE, "float32"), tmp_path / "objects"
    )
    assert "nothing" in library.scan().refused["a"]
