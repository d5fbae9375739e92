"""Damage everywhere: cut anywhere, any byte changed, any value in any field – one CheckpointError or finite numbers."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_checkpoint_hostile import NAMES, TABLE, adapter, edit, store

from softprompt.checkpoint import load_adapter, load_config
from softprompt.checkpoint.config_file import config_to_json
from softprompt.errors import CheckpointError
from softprompt.methods import PromptEncoderConfig

__all__ = ["adapter"]  # a fixture

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@given(name=st.sampled_from([each.name for each in fields(PromptEncoderConfig)]), value=JSON)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field(tmp_path: Path, name: str, value: Any) -> None:
    config = PromptEncoderConfig(num_virtual_tokens=2, token_dim=4, num_layers=2, encoder_hidden_size=3)
    (tmp_path / "adapter_config.json").write_text(config_to_json(config))
    edit(tmp_path, **{name: value})
    try:
        assert isinstance(load_config(tmp_path), PromptEncoderConfig)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017


# Damage everywhere ---------------------------------------------------------------------------------------------------


def finite_or_refused(folder: Path) -> bool:
    """Whether the adapter loads; then its numbers are finite. Any other exception fails the test."""
    try:
        saved = load_adapter(folder)
    except CheckpointError:
        return False
    assert all(torch.isfinite(tensor).all() for tensor in saved.tensors.values())
    return True


@pytest.mark.parametrize("name", [*NAMES, "adapter_model.bin"])
def test_every_truncation_is_refused(adapter: Path, name: str) -> None:
    if name == "adapter_model.bin":
        store(adapter, {"prompt_embeddings": TABLE}, "bin")
    data = (adapter / name).read_bytes()
    for length in range(0, len(data) - (1 if name.endswith("json") else 0), 1 if len(data) < 1000 else 7):
        (adapter / name).write_bytes(data[:length])
        assert not finite_or_refused(adapter), f"{name} cut to {length} of {len(data)} bytes"


@pytest.mark.parametrize("name", [*NAMES, "adapter_model.bin"])
@example(changes=[(0, 255)])
@given(changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes(adapter: Path, tmp_path: Path, name: str, changes: list[tuple[int, int]]) -> None:
    original = tmp_path / f"original.{name}"
    if not original.exists():  # the folder serves all examples
        if name == "adapter_model.bin":
            store(adapter, {"prompt_embeddings": TABLE}, "bin")
        shutil.copy(adapter / name, original)
    data = bytearray(original.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    (adapter / name).write_bytes(data)
    finite_or_refused(adapter)


def test_every_byte_of_the_header_flipped(adapter: Path) -> None:
    """Each bit of the length, and each byte of the JSON behind it."""
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    for place in range(len(data) - TABLE.numel() * 4):
        for flip in (2, 16, 128):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            finite_or_refused(adapter)
