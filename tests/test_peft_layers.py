"""PEFT's prefixes where layers differ in heads or sizes, or use an earlier one's: equal logits, both ways."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import softprompt
from softprompt import (
    KV,
    CheckpointError,
    PrefixTuningConfig,
    PromptStore,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)
from softprompt.cli.use import convert_prompt
from softprompt.config import KVConfig
from softprompt.inspect_prompt import describe, saved_kv

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning"),
]

COUNT = 4
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {"vocab_size_per_layer_input": tiny.VOCAB, "hidden_size_per_layer_input": 0, "sliding_window": 8}
GEMMA3N = {
    "vocab_size_per_layer_input": tiny.VOCAB,
    "hidden_size_per_layer_input": 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [48] * 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "size": (hf.Gemma4TextConfig, {**GEMMA4, "global_head_dim": 16}),
    "one head": (hf.Gemma4TextConfig, {**GEMMA4, "global_head_dim": 16, "num_key_value_heads": 1}),
    "size and heads": (
        hf.Gemma4TextConfig,
        {**GEMMA4, "global_head_dim": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True},
    ),
    "narrower": (
        hf.Gemma4TextConfig,
        {**GEMMA4, "global_head_dim": 4, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    ),
    "sharing and size": (
        hf.Gemma4TextConfig,
        {**GEMMA4, "hidden_size_per_layer_input": 4, "global_head_dim": 16, "num_kv_shared_layers": 2},
    ),
    "sharing": (hf.Gemma3nTextConfig, {**GEMMA3N, "num_kv_shared_layers": 2, "sliding_window": 8}),
}
FEWER = {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
FAMILIES["fewer heads"] = (hf.Gemma4TextConfig, {**GEMMA4, **FEWER})
families = pytest.mark.parametrize("family", FAMILIES)
of_peft = pytest.mark.parametrize("family", [each for each in families.args[1] if each != "fewer heads"])


def build(family: str) -> PreTrainedModel:
    config_class, options = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        every = {**tiny.GQA, "num_hidden_layers": 4, "layer_types": TWO_KINDS, **options}
        model = hf.AutoModelForCausalLM.from_config(config_class(**every))
        tiny.perturb(model)
    return model.eval().double()  # their layers add up to numbers that float32 rounds visibly


def theirs_for(family: str, kind: str = "PrefixTuningConfig", **options: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, **options)
    model: Any = peft.get_peft_model(build(family), config)
    return model.eval()


def ours_for(family: str, kind: str = "PrefixTuningConfig", **options: Any) -> SoftPromptModel:
    torch.manual_seed(1)
    config = getattr(softprompt, kind)(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, **options)
    return get_peft_model(build(family), config).eval()


def ids_of(length: int = 12) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same(family: str, first: Any, *others: Any) -> None:
    """Equal logits over rows longer than the window, and the prompt matters for them."""
    expected = first(input_ids=ids_of()).logits
    assert (expected - build(family)(input_ids=ids_of()).logits).abs().max() > 0.05
    for other in others:
        torch.testing.assert_close(other(input_ids=ids_of()).logits, expected, atol=1e-6, rtol=0)


KINDS = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix_ffn": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 1}),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@of_peft
def test_from_peft(family: str, kind: str, tmp_path: Path) -> None:
    theirs = theirs_for(family, KINDS[kind][0], **KINDS[kind][1])
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = SoftPromptModel.from_pretrained(build(family), tmp_path / "theirs")
    assert_same(family, theirs, ours)
    ours.save_pretrained(tmp_path / "ours")
    assert_same(family, theirs, peft.PeftModel.from_pretrained(build(family), str(tmp_path / "ours")).eval())
    store, base = PromptStore(tmp_path), build(family)
    served = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2)).eval()
    served.attach(store)
    with torch.no_grad():
        got = served(input_ids=ids_of(), adapter_names=["theirs", "ours"]).logits
        torch.testing.assert_close(got, theirs(input_ids=ids_of()).logits, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@of_peft
def test_to_peft(family: str, kind: str, tmp_path: Path) -> None:
    ours = ours_for(family, KINDS[kind][0], **KINDS[kind][1])
    ours.save_pretrained(tmp_path / "ours", keep_encoder=True)
    theirs = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "ours")).eval()
    again = SoftPromptModel.from_pretrained(build(family), tmp_path / "ours")
    trained = SoftPromptModel.from_pretrained(build(family), tmp_path / "ours", is_trainable=True).eval()
    assert_same(family, ours, theirs, again, trained)
    convert_prompt(tmp_path / "ours", "peft", tmp_path / "plain", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        plain = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "plain")).eval()
    assert_same(family, ours, plain, SoftPromptModel.from_pretrained(build(family), tmp_path / "plain"))


@of_peft
def test_both_write_pairs_of_the_same_width(family: str, tmp_path: Path) -> None:
    ours_for(family).save_pretrained(tmp_path / "ours")
    theirs_for(family).save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    names = ("token_dim", "num_attention_heads", "num_transformer_submodules")
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    widths = [load_file(tmp_path / side / "adapter_model.safetensors")["prompt_embeddings"].shape[1] for side in
              ("ours", "theirs")]  # fmt: skip
    assert widths[0] * theirs["num_layers"] == widths[1] * ours["num_layers"]


@families
def test_what_needs_no_model_has_each_layers_own_shape(family: str, tmp_path: Path) -> None:
    ours = ours_for(family)
    ours.save_pretrained(tmp_path / "ours")
    saved, prompt = softprompt.checkpoint.load_adapter(tmp_path / "ours"), ours.encoder().prompt()
    kv = saved_kv(saved)
    assert kv is not None and isinstance(prompt, KV)
    assert torch.equal(kv.flat(), prompt.flat())
    assert describe(saved, tmp_path / "ours").shape == tuple(prompt.flat().shape)
    convert_prompt(tmp_path / "ours", "kv", tmp_path / "kv.safetensors", None)
    assert torch.equal(KV.load(tmp_path / "kv.safetensors").flat(), prompt.flat())
    convert_prompt(tmp_path / "kv.safetensors", "prefix", tmp_path / "again", None)
    assert_same(family, ours, SoftPromptModel.from_pretrained(build(family), tmp_path / "again"))


@pytest.mark.parametrize("family", ["size", "narrower"])
def test_cartridges_are_composed(family: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        config = softprompt.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, num_frozen_tokens=1)
        get_peft_model(build(family), config).save_pretrained(tmp_path / name)
    both = [tmp_path / "a", tmp_path / "b"]
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    softprompt.compose_cartridge_adapters(adapter_paths=both, output_path=plain, rerotate=False)
    softprompt.compose_cartridge_adapters(adapter_paths=both, output_path=turned, model=build(family))
    parts = [saved_kv(softprompt.checkpoint.load_adapter(each)) for each in (*both, plain, turned)]
    kvs = [each for each in parts if each is not None]
    assert torch.equal(kvs[2].flat(), torch.cat([kvs[0].flat(), kvs[1].flat()]))
    for layer in range(len(kvs[0].layers)):
        values = torch.cat([each.layers[layer][1] for each in kvs[:2]], dim=2)
        torch.testing.assert_close(kvs[3].layers[layer][1], values)
    SoftPromptModel.from_pretrained(build(family), turned)


def test_an_earlier_checkpoint_without_padding_is_read(tmp_path: Path) -> None:
    """Its heads and width are the first layer's, and its pairs stand one behind the other."""
    ours = ours_for("size")
    config, flat = ours.peft_config["default"], ours.encoder().saved_vectors()
    assert isinstance(config, KVConfig) and config.layer_shapes is not None
    heads, size, _ = config.layer_shapes[0]
    earlier = replace(config, num_attention_heads=heads, token_dim=heads * size)
    softprompt.checkpoint.save_adapter(tmp_path / "old", earlier, {"prompt_embeddings": flat})
    loaded = SoftPromptModel.from_pretrained(build("size"), tmp_path / "old")
    loaded.save_pretrained(tmp_path / "again")
    assert_same("size", ours, loaded, SoftPromptModel.from_pretrained(build("size"), tmp_path / "again"))


def test_layers_that_peft_leaves_without_a_prefix(tmp_path: Path) -> None:
    """Where the largest layers have the fewest heads; what is asked for instead, PEFT replaces by that."""
    for number, options in enumerate(({}, {"num_attention_heads": 2, "token_dim": 32})):
        theirs = theirs_for("fewer heads", **options)
        theirs.save_pretrained(str(tmp_path / str(number)))
        with pytest.raises(
            CheckpointError, match=r"1 key-value heads of size 16 .* layers 0, 2, .* train it again here"
        ):
            SoftPromptModel.from_pretrained(build("fewer heads"), tmp_path / str(number))
    ours = ours_for("fewer heads")
    ours.save_pretrained(tmp_path / "ours", keep_encoder=True)
    assert_same("fewer heads", ours, SoftPromptModel.from_pretrained(build("fewer heads"), tmp_path / "ours"))
    with pytest.raises(UnsupportedError, match="layer_shapes="):
        convert_prompt(tmp_path / "ours", "peft", tmp_path / "out", None)


@pytest.mark.parametrize("family", ["size", "size and heads"])
def test_a_prefix_for_other_layers_is_refused(family: str, tmp_path: Path) -> None:
    theirs_for("narrower").save_pretrained(str(tmp_path / "narrower"))
    with pytest.raises(CheckpointError, match="made for another base model"):
        SoftPromptModel.from_pretrained(build(family), tmp_path / "narrower")
    wide = ours_for(family)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="made for another base model"):
        SoftPromptModel.from_pretrained(build("narrower"), tmp_path / "wide")
