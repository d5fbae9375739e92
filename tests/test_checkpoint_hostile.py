"""Adapters from anyone: damaged or hostile files end in one CheckpointError that names the file and the reason.

No case may run code, open a file outside the folder, take much memory, or raise any other exception.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from softprompt.checkpoint import load_adapter, load_config, save_adapter
from softprompt.errors import CheckpointError
from softprompt.methods import PrefixTuningConfig, PromptTuningConfig

CONFIG = PrefixTuningConfig(
    task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=4, num_layers=2, num_attention_heads=2
)
TABLE = torch.linspace(-1, 1, 32).view(2, 16)
NAMES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    save_adapter(folder, CONFIG, {"prompt_embeddings": TABLE})
    return folder


def refused(folder: Path, message: str) -> str:
    """The error, which is one line, names something in the folder and says why."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    assert len(text) < 700
    return text


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "(gone)"}))


# The config ----------------------------------------------------------------------------------------------------------

TEXT_INIT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b", "tokenizer_name_or_path": "gpt2"}
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"num_virtual_tokens": "20"}, 'num_virtual_tokens is "20" but must be a whole number'),
    ({"num_virtual_tokens": -1}, "num_virtual_tokens is -1 but must be between"),
    ({"num_virtual_tokens": 0}, "num_virtual_tokens is missing or zero"),
    ({"num_virtual_tokens": 1e9}, "num_virtual_tokens is 1000000000.0 but must be a whole number"),
    ({"num_virtual_tokens": 10**9}, "num_virtual_tokens is 1000000000 but must be between"),
    ({"num_virtual_tokens": 2.0}, "num_virtual_tokens is 2.0 but must be a whole number"),
    ({"num_virtual_tokens": True}, "num_virtual_tokens is true but must be a whole number"),
    ({"num_virtual_tokens": None}, "num_virtual_tokens is null but must be a whole number"),
    ({"num_virtual_tokens": [20]}, r"num_virtual_tokens is \[20\] but must be a whole number"),
    ({"num_virtual_tokens": "(gone)"}, "num_virtual_tokens is missing"),
    ({"num_virtual_tokens": 3}, r"has shape \[2, 16\] but its config promises \[3, 16\]"),
    ({"token_dim": None}, "token_dim is missing"),
    ({"token_dim": 6}, r"promises \[2, 24\]"),
    ({"num_layers": 10**6}, "num_layers is 1000000 but must be between 0 and 10,000"),
    ({"num_layers": "(gone)"}, "num_layers is missing"),
    ({"num_attention_heads": 0}, "num_attention_heads is missing or zero"),
    ({"num_attention_heads": 3}, "token_dim 4 is not a multiple of num_attention_heads 3"),
    ({"num_transformer_submodules": 3}, "num_transformer_submodules=3"),
    ({"prefix_projection": 1}, "prefix_projection is 1 but must be true or false"),
    ({"init_weights": "ones"}, "init_weights='ones'"),
    ({"task_type": "WORLD_PEACE"}, "task_type='WORLD_PEACE'"),
    ({"task_type": 3}, "task_type is 3 but must be text or null"),
    (
        {"peft_type": "LORA"},
        r'peft_type "LORA" is no soft prompt known here \(.*P_TUNING.*\); use PEFT for it',
    ),
    ({"peft_type": None}, "does not say its 'peft_type'"),
    ({"peft_type": ["PREFIX_TUNING"]}, "is no soft prompt known here"),
    ({"peft_type": {}}, "is no soft prompt known here"),
    ({"brand_new": 1}, "the field 'brand_new' is unknown to PrefixTuningConfig"),
    ({"brand_new": ""}, "the field 'brand_new' is unknown"),
    ({"PEFT_TYPE": "x"}, "the field 'PEFT_TYPE' is unknown"),
    ({"__class__": "x"}, "the field '__class__' is unknown"),
    ({"encoder_num_layers": 2}, "the field 'encoder_num_layers' is unknown"),
    ({"modules_to_save": "classifier"}, "modules_to_save is .* but must be a list of text or null"),
    ({"modules_to_save": [1]}, "modules_to_save is .* but must be a list of text or null"),
    ({"modules_to_save": ["../../etc"]}, "which is not the name of a module"),
    ({"modules_to_save": [""]}, "which is not the name of a module"),
    ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7 but must be text or null"),
    ({"base_model_name_or_path": "a\0b"}, "which holds control characters"),
    ({"base_model_name_or_path": "\x1b[31mred"}, "which holds control characters"),
    ({"base_model_name_or_path": "\ud800"}, "not valid Unicode"),
    ({"revision": {}}, "revision is {} but must be text or null"),
    ({"auto_mapping": {"base_model_class": ["os"]}}, "only names belong there"),
    ({"inference_mode": "yes"}, 'inference_mode is "yes" but must be true or false'),
    ({"encoder_hidden_size": float("nan")}, "is not valid JSON"),
    ({"encoder_hidden_size": -5}, "encoder_hidden_size is -5"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[str(fields)[:40] for fields, _ in BAD_FIELDS])
def test_bad_fields(adapter: Path, fields: dict[str, Any], message: str) -> None:
    edit(adapter, **fields)
    refused(adapter, message)


def test_switches_of_a_newer_peft_that_are_off_are_no_trouble(adapter: Path) -> None:
    edit(adapter, brand_new=None, another_one=False)
    assert torch.equal(load_adapter(adapter).tensors["prompt_embeddings"], TABLE)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"trust_remote_code": True},
        {"trust_remote_code": 1},
        {"trust_remote_code": "no"},
        {"code_revision": "main"},
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
        {"vocab_file": "/etc/passwd"},
        {"cache_dir": "/tmp/x"},
        {"token": "secret"},
        {"use_fast": [True]},
    ],
)
def test_a_tokenizer_is_not_made_to_run_code(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, token_dim=4, **TEXT_INIT)
    save_adapter(tmp_path, config, {"prompt_embeddings": TABLE[:, :4]})
    edit(tmp_path, tokenizer_kwargs={"use_fast": True, "trust_remote_code": False})
    assert load_config(tmp_path).tokenizer_kwargs == {"use_fast": True}  # pyright: ignore[reportAttributeAccessIssue]
    edit(tmp_path, tokenizer_kwargs=kwargs)
    refused(tmp_path, "may not make a tokenizer run code or read other files|must be")


BAD_JSON: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", r"holds \[\] instead of a JSON object"),
    (b"null", "holds null instead of a JSON object"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"{}", "does not say its 'peft_type'"),
    (b"[" * 400_000, "nested too deeply"),
    (b'{"a":' * 150_000, "nested too deeply"),
    (b"[" * 500 + b"]" * 500, "nested too deeply"),
    (b'{"auto_mapping": ' + b"[" * 300 + b"]" * 300 + b"}", "nested too deeply"),
    (b'{"peft_type": "PREFIX_TUNING", "peft_type": "LORA"}', 'the field "peft_type" is given twice'),
    (b'{"auto_mapping": {"a": "1", "a": "2"}}', 'the field "a" is given twice'),
    (b'{"token_dim": NaN}', "NaN is not a number"),
    (b'{"token_dim": -Infinity}', "-Infinity is not a number"),
    (b'{"token_dim": 1e999}', "1e999 is out of range"),
    (b'{"token_dim": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b" " * 1_000_001, "larger than 1,000,000 bytes"),
]


@pytest.mark.parametrize(("data", "message"), BAD_JSON, ids=[str(data[:30]) for data, _ in BAD_JSON])
def test_bad_json(adapter: Path, data: bytes, message: str) -> None:
    (adapter / "adapter_config.json").write_bytes(data)
    refused(adapter, message)


# The tensors ---------------------------------------------------------------------------------------------------------

BAD_TENSORS: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"prompt_embeddings": torch.full((2, 16), float("nan"))}, "32 of the 32 numbers in 'prompt_embeddings' are NaN"),
    ({"prompt_embeddings": TABLE / 0}, "NaN or infinite"),
    ({"prompt_embeddings": torch.ones(2, 16, dtype=torch.int32)}, "has type"),
    ({"prompt_embeddings": torch.ones(2, 16, dtype=torch.int64)}, "has type"),
    ({"prompt_embeddings": torch.ones(2, 16, dtype=torch.bool)}, "has type"),
    ({"prompt_embeddings": torch.ones(2, 16, dtype=torch.complex64)}, "has type"),
    ({"prompt_embeddings": torch.ones(2, 16).to(torch.float8_e4m3fn)}, "has type"),
    ({"prompt_embeddings": torch.ones(32)}, r"has shape \[32\]"),
    ({"prompt_embeddings": torch.ones(1, 2, 16)}, r"has shape \[1, 2, 16\]"),
    ({"prompt_embeddings": torch.ones(16, 2)}, r"has shape \[16, 2\] but its config promises \[2, 16\]"),
    ({"prompt_embeddings": torch.ones(0, 16)}, r"has shape \[0, 16\]"),
    ({}, "has no tensor 'prompt_embeddings'; it holds nothing"),
    ({"prompt": TABLE}, "has no tensor 'prompt_embeddings'; it holds 'prompt'"),
    ({"prompt_embeddings": TABLE, "extra": TABLE}, "holds a tensor 'extra' that is neither the prompt nor part"),
    (
        {"prompt_embeddings": TABLE, "base_model.lm_head.weight": TABLE},
        "neither the prompt nor part of modules_to_save",
    ),
    ({"prompt_embeddings": TABLE, "base_model.score.w": torch.ones(2).int()}, "has type"),
    ({"prompt_embeddings": TABLE, "base_model.score.w": torch.tensor([float("inf")])}, "NaN or infinite"),
    ({"prompt_embeddings": TABLE, "base_model.xscore.w": TABLE}, "neither the prompt nor part of modules_to_save"),
    ({"prompt_embeddings": TABLE, "score.weight": TABLE}, "neither the prompt nor part of modules_to_save"),
    ({"prompt_embeddings": TABLE, "base_model.score.w": torch.ones((1,) * 9)}, "has 9 dimensions"),
]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(("tensors", "message"), BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_bad_tensors(adapter: Path, tensors: dict[str, torch.Tensor], message: str, form: str) -> None:
    edit(adapter, modules_to_save=["score"])
    store(adapter, tensors, form)
    refused(adapter, message)


def store(folder: Path, tensors: Any, form: str) -> None:
    (folder / "adapter_model.safetensors").unlink()
    if form == "safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")


def test_a_file_larger_than_promised_is_not_read(adapter: Path) -> None:
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room, but reading it would
    refused(adapter, "has 1,099,511,627,776 bytes but its config promises")


def test_bytes_behind_the_end(adapter: Path) -> None:
    with (adapter / "adapter_model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(adapter, "damaged, cut short or of another format")


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, b"\xff" * 8, b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{" * 16, b"PK\3\4"]
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_garbage(adapter: Path, data: bytes, form: str) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / f"adapter_model.{form}").write_bytes(data)
    refused(adapter, "damaged, cut short or of another format")


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_pickles_do_not_run(adapter: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (adapter / "adapter_model.safetensors").unlink()
    for value in (Trap(trap), {"prompt_embeddings": Trap(trap)}, {"prompt_embeddings": TABLE, "extra": [Trap(trap)]}):
        torch.save(value, adapter / "adapter_model.bin")
        refused(adapter, "holds pickled Python objects, which could run code and are never loaded")
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"prompt_embeddings": Trap(trap)}))
    refused(adapter, "damaged, cut short or of another format")
    torch.save({"prompt_embeddings": Trap(trap)}, adapter / "adapter_model.bin", _use_new_zipfile_serialization=False)
    refused(adapter, "damaged, cut short or of another format")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([TABLE], "holds a list, not tensors by name"),
        ({1: TABLE}, "holds a dict, not tensors by name"),
        ({"prompt_embeddings": [TABLE]}, "'prompt_embeddings' is not a plain tensor"),
        ({"prompt_embeddings": TABLE.to_sparse()}, "'prompt_embeddings' is not a plain tensor"),
        ({"prompt_embeddings": torch.empty(2, 16, device="meta")}, "'prompt_embeddings' is not a plain tensor"),
        ({"prompt_embeddings": torch.zeros(1).expand(2, 16)}, None),
        ({"prompt_embeddings": TABLE, "base_model.score.w": torch.zeros(1).expand(1 << 40)}, "claim more data than"),
    ],
)
def test_what_torch_save_can_hold_besides_tensors(adapter: Path, value: Any, message: str | None) -> None:
    edit(adapter, modules_to_save=["score"])
    store(adapter, value, "bin")
    if message is None:
        assert torch.equal(load_adapter(adapter).tensors["prompt_embeddings"], torch.zeros(2, 16))
    else:
        refused(adapter, message)


def test_a_compressed_file_is_not_unpacked(adapter: Path) -> None:
    store(adapter, {"prompt_embeddings": TABLE}, "bin")
    path = adapter / "adapter_model.bin"
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records.items():
            new.writestr(name, data)
    refused(adapter, "is compressed, which torch.save never does")


# The folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_links_out_of_the_folder(adapter: Path, tmp_path: Path, name: str) -> None:
    (adapter / name).replace(tmp_path / "elsewhere")
    (adapter / name).symlink_to("../elsewhere")
    refused(adapter, "is a link out of its folder")
    (adapter / name).unlink()
    (adapter / name).symlink_to(adapter / "nothing")
    refused(adapter, "is a link to nothing")
    (adapter / name).unlink()
    (adapter / name).symlink_to(name)
    refused(adapter, "cannot be read")


def test_links_inside_the_folder_are_fine(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").replace(adapter / "weights")
    (adapter / "adapter_model.safetensors").symlink_to("weights")
    assert torch.equal(load_adapter(adapter).tensors["prompt_embeddings"], TABLE)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    (adapter / name).mkdir()
    refused(adapter, "is not a regular file")
    (adapter / name).rmdir()
    os.mkfifo(adapter / name)  # reading it would wait for ever
    refused(adapter, "is not a regular file")


def test_missing_files(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, r"neither adapter_model\.safetensors nor adapter_model\.bin")
    (adapter / "adapter_config.json").unlink()
    refused(adapter, r"has no adapter_config\.json; give an adapter's folder")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load_adapter(Path(__file__))


@pytest.mark.parametrize("subfolder", ["..", "a/../../b", "/etc", "a\0b", "C:\\x", "..\\x", "\\\\host\\share"])
def test_subfolders_stay_inside(adapter: Path, subfolder: str) -> None:
    with pytest.raises(CheckpointError, match="leaves the adapter's folder"):
        load_adapter(adapter, subfolder=subfolder)


def test_a_subfolder_that_is_a_link_out(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "fr").symlink_to(adapter)
    with pytest.raises(CheckpointError, match="link out of its folder"):
        load_adapter(tmp_path / "hub", subfolder="fr")
