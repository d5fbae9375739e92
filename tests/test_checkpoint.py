"""What is saved is what is loaded, in PEFT's layout, whole or not at all; and an adapter says what it was made for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from softprompt.checkpoint import (
    SavedAdapter,
    check_adapter_name,
    check_fits,
    load_adapter,
    load_config,
    save_adapter,
    write_config,
)
from softprompt.config import PromptConfig
from softprompt.errors import CheckpointError
from softprompt.facts import Facts, LayerShape
from softprompt.methods import PrefixEncoder, PrefixTuningConfig, PromptEncoder, PromptEncoderConfig, PromptTuningConfig

SIZES: dict[str, Any] = {"num_virtual_tokens": 3, "token_dim": 8, "num_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, PromptConfig] = {
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", **SIZES),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", **SIZES),
    "prefix_ffn": PrefixTuningConfig(task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=5, **SIZES),
    "p_tuning_mlp": PromptEncoderConfig(task_type="CAUSAL_LM", encoder_hidden_size=5, **SIZES),
    "p_tuning_lstm": PromptEncoderConfig(
        task_type="CAUSAL_LM", encoder_hidden_size=5, encoder_reparameterization_type="LSTM", **SIZES
    ),
}
SHAPES = {name: (3, 32) if name.startswith("prefix") else (3, 8) for name in CONFIGS}


def prompt(name: str = "prompt_tuning") -> dict[str, Tensor]:
    return {"prompt_embeddings": torch.randn(SHAPES[name])}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    tensors = prompt(name)
    save_adapter(tmp_path / "new" / "folder", CONFIGS[name], tensors)
    saved = load_adapter(tmp_path / "new" / "folder")
    assert saved.config == replace(CONFIGS[name], inference_mode=True)
    assert saved.encoder is None
    assert list(saved.tensors) == ["prompt_embeddings"]
    assert torch.equal(saved.tensors["prompt_embeddings"], tensors["prompt_embeddings"])
    assert listing(tmp_path / "new" / "folder") == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_config(str(tmp_path / "new" / "folder")) == saved.config


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_type_is_kept_and_views_are_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(8, 6).to(dtype)
    save_adapter(tmp_path, CONFIGS["prompt_tuning"], {"prompt_embeddings": table.T[:3].requires_grad_()})
    loaded = load_adapter(tmp_path).tensors["prompt_embeddings"]
    assert loaded.dtype is dtype
    assert loaded.is_contiguous()
    assert not loaded.requires_grad
    assert torch.equal(loaded, table.T[:3])


def test_heads_travel_with_the_prompt(tmp_path: Path) -> None:
    weight = torch.randn(4, 8)
    heads = {
        "base_model.classifier.weight": weight,
        "base_model.classifier.tied": weight,
        "base_model.classifier.norm.num_batches_tracked": torch.tensor(7),
    }
    config = replace(CONFIGS["prompt_tuning"], task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    save_adapter(tmp_path, config, prompt() | heads)
    loaded = load_adapter(tmp_path)
    assert loaded.config.modules_to_save == ["classifier", "score"]
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in heads.items())


def test_an_encoder_decoder_has_two_tables(tmp_path: Path) -> None:
    config = replace(CONFIGS["prompt_tuning"], task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2)
    save_adapter(tmp_path, config, {"prompt_embeddings": torch.randn(6, 8)})
    assert load_adapter(tmp_path).tensors["prompt_embeddings"].shape == (6, 8)


def test_a_file_of_torch_save_is_read(tmp_path: Path) -> None:
    tensors = prompt()
    write_config(tmp_path, CONFIGS["prompt_tuning"])
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert torch.equal(load_adapter(tmp_path).tensors["prompt_embeddings"], tensors["prompt_embeddings"])


def test_a_named_adapter_lies_in_a_subfolder(tmp_path: Path) -> None:
    save_adapter(tmp_path / "fr", CONFIGS["prompt_tuning"], prompt())
    assert load_adapter(tmp_path, subfolder="fr").config == load_adapter(tmp_path / "fr").config
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json; it has adapters in fr, so name one"):
        load_adapter(tmp_path)


# Fields --------------------------------------------------------------------------------------------------------------


def test_only_fields_that_peft_knows_are_written_at_their_default(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIGS["prefix"])
    plain = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "prefix_dropout" not in plain
    assert plain["inference_mode"] is True
    assert plain["peft_type"] == "PREFIX_TUNING"
    write_config(tmp_path, replace(CONFIGS["prefix"], prefix_dropout=0.25))  # pyright: ignore[reportCallIssue]
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == plain | {"prefix_dropout": 0.25}
    assert load_config(tmp_path).prefix_dropout == 0.25  # pyright: ignore[reportAttributeAccessIssue]


def test_class_labels_are_kept(tmp_path: Path) -> None:
    config = PromptTuningConfig(
        prompt_tuning_init="CLASS_LABELS", class_labels=["yes", "no"], tokenizer_name_or_path="gpt2", **SIZES
    )
    save_adapter(tmp_path, config, prompt())
    assert load_adapter(tmp_path).config == replace(config, inference_mode=True)


# The kept encoder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prefix_ffn", "p_tuning_mlp", "p_tuning_lstm"])
def test_an_encoder_can_be_kept(tmp_path: Path, name: str) -> None:
    method = PrefixEncoder if name == "prefix_ffn" else PromptEncoder
    encoder = method(CONFIGS[name])  # pyright: ignore[reportArgumentType]
    tensors = {"prompt_embeddings": encoder.saved_vectors()}
    save_adapter(tmp_path, CONFIGS[name], tensors, encoder.state_dict())
    assert listing(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "encoder.safetensors"]
    kept = load_adapter(tmp_path).encoder
    assert kept is not None
    fresh = method(CONFIGS[name])  # pyright: ignore[reportArgumentType]
    fresh.load_state_dict(kept)
    assert torch.equal(fresh.saved_vectors(), tensors["prompt_embeddings"])
    save_adapter(tmp_path, CONFIGS[name], tensors)
    assert load_adapter(tmp_path).encoder is None, "an encoder of an earlier save must not stay behind"


def test_a_table_has_no_encoder_to_keep(tmp_path: Path) -> None:
    encoder = PrefixEncoder(PrefixTuningConfig(**SIZES))
    save_adapter(tmp_path, encoder.config, {"prompt_embeddings": encoder.saved_vectors()}, encoder.state_dict())
    assert listing(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_encoder_of_another_save_is_refused(tmp_path: Path) -> None:
    encoder = PromptEncoder(CONFIGS["p_tuning_mlp"])  # pyright: ignore[reportArgumentType]
    for folder in ("one", "two"):
        save_adapter(tmp_path / folder, CONFIGS["p_tuning_mlp"], prompt(), encoder.state_dict())
    (tmp_path / "one" / "encoder.safetensors").replace(tmp_path / "two" / "encoder.safetensors")
    with pytest.raises(CheckpointError, match="not saved together with the prompt"):
        load_adapter(tmp_path / "two")


def test_an_encoder_of_other_sizes_is_refused(tmp_path: Path) -> None:
    encoder = PromptEncoder(CONFIGS["p_tuning_mlp"])  # pyright: ignore[reportArgumentType]
    save_adapter(tmp_path, CONFIGS["p_tuning_mlp"], prompt(), encoder.state_dict())
    config = replace(CONFIGS["p_tuning_mlp"], encoder_hidden_size=6)  # pyright: ignore[reportCallIssue]
    write_config(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors: mlp_head.* has shape"):
        load_adapter(tmp_path)


# The base model it was made for --------------------------------------------------------------------------------------


def facts(layers: int = 2, heads: int = 2, head_size: int = 4, width: int = 8) -> Facts:
    shape = LayerShape(heads, head_size, head_size)
    return Facts(
        layers=(shape,) * layers,
        hidden_size=width,
        query_heads=heads,
        causal=True,
        context=64,
        learned_positions=True,
        position_offset=0,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_sizes_fit(name: str) -> None:
    check_fits(SavedAdapter(CONFIGS[name], prompt(name)), facts())


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("prompt_tuning", facts(width=16), "width 8 in the adapter, 16 here"),
        ("p_tuning_mlp", facts(layers=5), "layers 2 in the adapter, 5 here"),
        ("prompt_tuning", facts(heads=4), "attention heads 2 in the adapter, 4 here"),
        ("prefix", facts(layers=5), "layers 2 in the adapter, 5 here"),
        ("prefix", facts(heads=1), "key-value heads 2 in the adapter, 1 here"),
        ("prefix_ffn", facts(head_size=64), "head size 4 in the adapter, 64 here"),
        ("prefix", facts(layers=3, heads=1), "layers 2 in the adapter, 3 here; key-value heads 2 in the adapter, 1"),
    ],
)
def test_other_sizes_are_named(name: str, other: Facts, message: str) -> None:
    config = replace(CONFIGS[name], base_model_name_or_path="gpt2")
    with pytest.raises(CheckpointError, match=rf"here was made for another base model \(gpt2\): .*{message}"):
        check_fits(SavedAdapter(config, prompt(name), source="here"), other)


# Names and the hub ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "task-1", "fr_FR", "überall", "a b"])
def test_good_adapter_names(name: str) -> None:
    assert check_adapter_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a.b",
        "a/b",
        "a\\b",
        "/etc",
        "C:x",
        "a\0b",
        "a\nb",
        " a",
        "x" * 101,
        "__base__",
        "keys",
        "train",
        7,
    ],
)
def test_bad_adapter_names(name: Any) -> None:
    with pytest.raises(CheckpointError, match="adapter name"):
        check_adapter_name(name)


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """The hub's cache as its client leaves it: links into a folder of blobs."""
    save_adapter(tmp_path / "made", CONFIGS["prefix"], prompt("prefix"))
    repository = tmp_path / "cache" / "models--someone--poet"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted((tmp_path / "made").iterdir())):
        path.replace(repository / "blobs" / str(number))
        (repository / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{number}")
    return tmp_path / "cache"


def test_an_adapter_from_the_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_adapter("someone/poet", cache_dir=hub_cache)
    assert saved.config == replace(CONFIGS["prefix"], inference_mode=True)
    snapshot = next(hub_cache.glob("models--someone--poet/snapshots/*"))
    with pytest.raises(CheckpointError, match="link out of its folder"):
        load_adapter(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    assert torch.equal(load_adapter(snapshot).tensors["prompt_embeddings"], saved.tensors["prompt_embeddings"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("someone/poet", r"no folder 'someone/poet' here, and the hub could not be reached .*hf download someone/poet"),
        ("not/a/name", "no folder 'not/a/name' here, and the hub gave no such adapter"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all; check the path"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("", "is not the path of an adapter"),
        ("a\0b", "is not the path of an adapter"),
    ],
)
def test_nothing_there(asked: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(asked, cache_dir=tmp_path / "cache")
