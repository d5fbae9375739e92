"""`softprompt convert --to mlx`: mlx-lm answers with such a file as we do with the prompt, token for token.

mlx runs on Linux too (`pip install 'mlx-lm[cpu]>=0.32.1'`); without it the comparison is skipped, not the rest.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli_kit import Shell, save_base
from families import build
from safetensors import safe_open

from softprompt import (
    ConfigError,
    PrefixTuningConfig,
    PromptConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)
from softprompt.cli.use import convert_prompt
from softprompt.export.mlx import MODEL_TYPES

TOKENS = 24
WINDOW = 8
CONFIGS: dict[str, PromptConfig] = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "vectors": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "long": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2 * WINDOW + 3),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    # Embeddings are scaled by the root of the width, which mlx-lm rounds unless it is whole; tied ones repeat words.
    "gemma3": {"hidden_size": 64, "sliding_window": WINDOW, "tie_word_embeddings": False},
}


def save_model(folder: Path, family: str) -> Path:
    """The base model with its config in mlx-lm's words too, which transformers 5 does not write."""
    save_base(folder, family, **FAMILIES[family])
    if family == "gpt2":  # mlx-lm knows its weights by the names they have on the hub
        tiny.build(family).get_submodule("transformer").save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    more = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if family == "gpt2":
        more = {"n_ctx": config["n_positions"]}
    if family == "gemma3":
        more = {"rope_theta": rope["full_attention"]["rope_theta"], "sliding_window_pattern": 2}
        more["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    path.write_text(json.dumps({**config, **more}))
    return folder


def save_prompt(folder: Path, family: str, config: PromptConfig) -> Path:
    model = get_peft_model(tiny.build(family, **FAMILIES[family]), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def ours(base: Path, prompt: Path | None, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """The greedy answer, and the log-probabilities `[tokens, words]` at its places."""
    model: Any = tiny_model(base) if prompt is None else SoftPromptModel.from_pretrained(tiny_model(base), prompt)
    found = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return found.sequences[0, len(ids) :].tolist(), torch.cat(found.logits).log_softmax(-1)


def tiny_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_every_family_is_compared() -> None:
    types = {tiny.CONFIGS[family][0].model_type for family in FAMILIES}
    assert types == set(MODEL_TYPES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_mlx_lm_answers_the_same(family: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed; pip install 'mlx-lm[cpu]>=0.32.1'")
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import load_prompt_cache

    base = save_model(tmp_path / "base", family)
    prompt = save_prompt(tmp_path / "prompt", family, CONFIGS[kind])
    convert_prompt(prompt, "mlx", tmp_path / "cache.safetensors", str(base))
    model = load(str(base))[0]
    cache, metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert metadata["model"] == str(base)
    ids = [5, 17, 80, 211, 9]
    steps = list(generate_step(mx.array(ids), model, max_tokens=TOKENS, prompt_cache=cache))
    tokens, scores = ours(base, prompt, ids)
    assert [token for token, _ in steps] == tokens != ours(base, None, ids)[0]
    theirs = torch.tensor([each.tolist() for _, each in steps])
    torch.testing.assert_close(theirs, scores, atol=1e-3, rtol=1e-4)


def test_the_program_of_mlx_lm_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed; pip install 'mlx-lm[cpu]>=0.32.1'")
    base, cache = save_model(tmp_path / "base", "llama"), tmp_path / "cache.safetensors"
    prompt = save_prompt(tmp_path / "prompt", "llama", CONFIGS["prefix"])
    Shell(capsys).ok("convert", prompt, "--to", "mlx", "--out", cache, "--model", base)
    command = f"-m mlx_lm generate --prompt-cache-file {cache} --ignore-chat-template --max-tokens 12 --temp 0 --prompt"
    done = subprocess.run(
        [sys.executable, *command.split(), "the cat"], capture_output=True, text=True, check=True, timeout=120
    )
    ids = tiny.tokenizer()("the cat")["input_ids"]
    text = tiny.tokenizer().decode(ours(base, prompt, ids)[0][:12]).split("</s>")[0]
    assert text.strip() and text.strip() in done.stdout


def test_the_file_is_as_mlx_lm_lays_it_out(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    prompt = save_prompt(tmp_path / "prompt", "llama", CONFIGS["prefix"])
    out = tmp_path / "cache.safetensors"
    line = convert_prompt(prompt, "mlx", out, str(base))
    assert str(out) in line and "6 virtual tokens" in line
    kv = SoftPromptModel.from_pretrained(tiny_model(base), prompt).fold()
    with safe_open(out, "pt") as file:
        assert sorted(file.keys()) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
        for layer, pair in enumerate(kv.layers):
            assert file.get_tensor(f"{layer}.2").item() == kv.length == 6
            for part in (0, 1):
                assert torch.equal(file.get_tensor(f"{layer}.{part}"), pair[part])
        found = dict(file.metadata())
    assert found.pop("0.softprompt") and found == {
        "0.model": str(base), "0.tokenizer_config": "{}", "1.0": "KVCache", "1.1": "KVCache",
        "2.0": "", "2.1.0": "0.2", "2.1.1": "scalar", "2.2.0": "1.2", "2.2.1": "scalar",
    }  # fmt: skip


def test_the_cache_is_in_the_models_number_format(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    prompt = save_prompt(tmp_path / "prompt", "llama", CONFIGS["prefix"])
    convert_prompt(prompt, "mlx", tmp_path / "cache.safetensors", str(base))
    with safe_open(tmp_path / "cache.safetensors", "pt") as file:
        assert file.get_tensor("0.0").dtype == torch.bfloat16


def test_what_cannot_be_a_cache_of_theirs_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    prompt = save_prompt(tmp_path / "prompt", "llama", CONFIGS["prefix"])
    with pytest.raises(ConfigError, match=r"must end with \.safetensors"):
        convert_prompt(prompt, "mlx", tmp_path / "cache.npz", str(base))
    with pytest.raises(ConfigError, match="is a folder"):
        convert_prompt(prompt, "mlx", tmp_path, str(base))
    out = tmp_path / "cache.safetensors"
    convert_prompt(prompt, "kv", tmp_path / "kv.safetensors", str(base))
    with pytest.raises(ConfigError, match="does not say which base model"):
        convert_prompt(tmp_path / "kv.safetensors", "mlx", out, None)
    with pytest.raises(ConfigError, match="the prompt is for 2 layers and embedded has 6"):
        convert_prompt(tmp_path / "kv.safetensors", "mlx", out, "embedded")
    with pytest.raises(ConfigError, match="cannot be read"):
        convert_prompt(tmp_path / "kv.safetensors", "mlx", out, str(tmp_path / "nowhere"))
    other = build("gpt_neox", "CAUSAL_LM")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedError, match="is a gpt_neox; prompt caches of mlx-lm are written for gemma3_text"):
        convert_prompt(tmp_path / "kv.safetensors", "mlx", out, str(tmp_path / "other"))
    assert not out.exists()
