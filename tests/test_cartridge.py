"""Cartridges: frozen tokens stay as they are, PEFT reads and writes the same files, composing moves what it must."""

import copy
import pickle
from pathlib import Path
from typing import Any

import families
import hf_cache
import peft
import pytest
import tiny
import torch
from torch import Tensor

import softprompt
from softprompt import (
    KV,
    CartridgeEncoder,
    ConfigError,
    SoftPromptModel,
    UnsupportedError,
    compose_cartridge_adapters,
    compose_prefixes,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from softprompt.base_model import find_way
from softprompt.checkpoint import load_adapter
from softprompt.facts import record

P, FROZEN = 6, 2
TEXT = "the cat sat on the mat and the dog ran to the red house by the river while it rained all night long"
MOVED = ("llama", "gpt_neox", "gemma3", "cohere2", "phi3", "qwen2_vl", "deepseek_v3", "gpt_oss", "mistral_window")
MOVED += ("gptj", "falcon_gqa", "qwen3_next")


def config(library: Any = softprompt, **options: Any) -> Any:
    return library.CartridgeConfig(
        **{"task_type": "CAUSAL_LM", "num_virtual_tokens": P, "num_frozen_tokens": FROZEN, **options}
    )


def train(model: Any, steps: int = 3, **options: Any) -> list[float]:
    batch = tiny.ragged()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05, **options)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_tokens_stay_and_the_others_train(family: str) -> None:
    model = get_peft_model(tiny.build(family), config())
    before = model.encoder().saved_vectors()
    losses = train(model, steps=5, weight_decay=0.5)
    after = model.encoder().saved_vectors()
    assert losses[-1] < losses[0]
    assert torch.equal(after[:FROZEN], before[:FROZEN])
    assert ((after - before)[FROZEN:].abs().amax(1) > 1e-3).all()


def test_what_trains_is_counted_and_survives_switching() -> None:
    model = get_peft_model(tiny.build("llama"), config())
    width = 2 * 2 * 2 * 8
    assert model.get_nb_trainable_parameters()[0] == (P - FROZEN) * width
    model.add_adapter("other", config(num_frozen_tokens=0))
    for name, rows in (("other", P), ("default", P - FROZEN)):
        model.set_adapter(name)
        assert [each.numel() for each in model.parameters() if each.requires_grad] == [rows * width]


def test_training_goes_on_from_a_saved_cartridge_with_frozen_tokens_still_frozen(tmp_path: Path) -> None:
    model = get_peft_model(tiny.build("llama"), config())
    train(model)
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path, is_trainable=True)
    assert torch.equal(again.encoder().saved_vectors(), model.encoder().saved_vectors())
    train(again, weight_decay=0.5)
    moved = (again.encoder().saved_vectors() - model.encoder().saved_vectors()).abs().amax(1)
    assert torch.equal(moved > 0, torch.arange(P) >= FROZEN)


@pytest.mark.parametrize("frozen", [0, P])
def test_none_or_all_may_be_frozen(frozen: int) -> None:
    model = get_peft_model(tiny.build("gpt2"), config(num_frozen_tokens=frozen))
    before = model.encoder().saved_vectors()
    train(model)
    assert torch.equal(model.encoder().saved_vectors(), before) == (frozen == P)
    assert (model.encoder().frozen_embedding is None) == (frozen == 0)


def test_its_state_is_one_table_that_can_be_copied_loaded_and_pickled() -> None:
    encoder = get_peft_model(tiny.build("gpt2"), config()).encoder()
    assert isinstance(encoder, CartridgeEncoder)
    assert list(encoder.state_dict()) == ["embedding.weight"]
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
        assert torch.equal(again.saved_vectors(), encoder.saved_vectors())
    other = get_peft_model(tiny.build("gpt2"), config()).encoder()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.saved_vectors(), encoder.saved_vectors())
    with pytest.raises(RuntimeError, match=r"Missing.*embedding\.weight"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected.*embedding\.frozen"):
        other.load_state_dict({**encoder.state_dict(), "embedding.frozen": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"embedding.weight": torch.zeros(2, 2)})
    with pytest.raises(ConfigError, match=r"Expected \(6, 128\), got \(2, 2\)"):
        other.load_prompt_embeddings(torch.zeros(2, 2))
    assert torch.equal(other.saved_vectors(), encoder.saved_vectors())


@pytest.mark.parametrize("frozen", [-1, P + 1, 1.5, True])
def test_a_number_of_frozen_tokens_that_cannot_be(frozen: Any) -> None:
    with pytest.raises(ConfigError, match="num_frozen_tokens"):
        config(num_frozen_tokens=frozen)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_from_a_text_it_is_that_text_in_context(family: str) -> None:
    base = tiny.build(family)
    model = get_peft_model(base, config()).eval()
    initialize_kv_prefix_from_text(model, tiny.tokenizer(), text=TEXT, use_chat_template=False)
    text, ids = torch.tensor([tiny.tokenizer()(TEXT)["input_ids"][:P]]), torch.arange(30, 42)[None]
    expected = base(input_ids=torch.cat([text, ids], dim=1)).logits[:, P:]
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


# ---- PEFT --------------------------------------------------------------------------------------------------------


def trained_by_peft(folder: Path, **options: Any) -> Any:
    model = peft.get_peft_model(tiny.build("llama"), config(peft, **options))
    train(model)
    model.save_pretrained(str(folder))
    return model.eval()


def real_logits(model: Any) -> Tensor:
    batch = tiny.ragged(seed=1)
    with torch.no_grad():
        return model(**batch).logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_files_of_peft_both_ways(tmp_path: Path) -> None:
    theirs = trained_by_peft(tmp_path / "theirs")
    ours = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "theirs")
    assert ours.peft_config["default"].num_frozen_tokens == FROZEN
    torch.testing.assert_close(real_logits(ours), real_logits(theirs), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(real_logits(back), real_logits(theirs), rtol=0, atol=1e-5)
    assert back.peft_config["default"].num_frozen_tokens == FROZEN


def test_names_and_shapes_of_peft() -> None:
    sizes = {"num_virtual_tokens": P, "token_dim": 8, "num_layers": 2, "num_attention_heads": 2}
    ours, theirs = CartridgeEncoder(config(**sizes)), peft.CartridgeEncoder(config(peft, **sizes))
    for name in ("frozen_embedding", "trainable_embedding", "weight"):
        assert getattr(ours, name).shape == getattr(theirs, name).shape
    assert ours.embedding.weight.shape == theirs.embedding.weight.shape
    assert (ours.num_frozen_tokens, ours.num_trainable_tokens) == (FROZEN, P - FROZEN)
    flat = torch.randn(P, 2 * 2 * 8)
    for encoder in (ours, theirs):
        encoder.load_prompt_embeddings(flat)
        assert torch.equal(encoder.weight, flat)


# ---- composing ---------------------------------------------------------------------------------------------------


def keys_at(base: Any, ids: Tensor, first: int) -> KV:
    """What the model makes of `ids` [1, t] standing alone at positions first, first+1, …"""
    way, _ = find_way(base)
    positions = torch.arange(first, first + ids.shape[1])[None] + way.position_offset
    with torch.no_grad():
        return KV(tuple(record(way, {"input_ids": ids, "position_ids": positions})[0].layers))


def texts() -> list[Tensor]:
    return [torch.randint(4, tiny.VOCAB, (1, length)) for length in (7, 5, 4)]


@pytest.mark.parametrize("family", MOVED)
def test_composed_prefixes_stand_where_their_positions_say(family: str) -> None:
    base, parts = families.build(family, "CAUSAL_LM"), texts()
    composed = compose_prefixes(base, [keys_at(base, ids, 0) for ids in parts])
    assert composed.length == 16
    for ids, first in zip(parts, (0, 7, 12), strict=True):
        expected, span = keys_at(base, ids, first), slice(first, first + ids.shape[1])
        for (key, value), (own_key, own_value) in zip(composed.layers, expected.layers, strict=True):
            torch.testing.assert_close(key[:, :, span], own_key, rtol=0, atol=1e-5)
            torch.testing.assert_close(value[:, :, span], own_value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_on_one_layer_two_texts_are_the_joined_text_in_context(family: str) -> None:
    """The keys and values of the first layer depend on no other token, so composing loses nothing there."""
    base, (one, two, ids) = tiny.build(family, num_hidden_layers=1), texts()
    composed = compose_prefixes(base, [keys_at(base, one, 0), keys_at(base, two, 0)])
    model = get_peft_model(base, config(num_virtual_tokens=composed.length)).eval()
    model.encoder().start_from(composed.flat())
    expected = base(input_ids=torch.cat([one, two, ids], dim=1)).logits[:, composed.length :]
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    plain = compose_prefixes(base, [keys_at(base, one, 0), keys_at(base, two, 0)], rerotate=False)
    model.encoder().start_from(plain.flat())
    assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon_alibi"])
def test_keys_without_positions_stay_as_they_are(family: str) -> None:
    """ALiBi goes by where a key stands, so that joining alone puts the second prefix where it says."""
    base, (one, two, ids) = families.build(family, "CAUSAL_LM"), texts()
    prefixes = [keys_at(base, one, 0), keys_at(base, two, 0)]
    composed = compose_prefixes(base, prefixes)
    assert torch.equal(composed.flat(), torch.cat([each.flat() for each in prefixes]))
    model = get_peft_model(base, config(num_virtual_tokens=12)).eval()
    model.encoder().start_from(composed.flat())
    with torch.no_grad():
        out = base(
            input_ids=ids,
            attention_mask=torch.ones(1, 16, dtype=torch.long),
            **hf_cache.given(base, composed.to_cache()),
        )
        torch.testing.assert_close(model(input_ids=ids).logits, out.logits, rtol=0, atol=1e-5)


def test_a_model_with_prompts_composes_too_and_its_door_stays_shut() -> None:
    base, (one, two, _) = tiny.build("llama"), texts()
    model = get_peft_model(base, config())
    ours = compose_prefixes(model, [keys_at(base, one, 0), keys_at(base, two, 0)])
    theirs = compose_prefixes(base, [keys_at(base, one, 0), keys_at(base, two, 0)])
    assert torch.equal(ours.flat(), theirs.flat())


def test_frequencies_that_change_with_the_length_are_noticed() -> None:
    """LongRoPE turns slower from `original_max_position_embeddings` on, so that keys made before do not fit there."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
    base = tiny.build("llama", rope_parameters={**rope, "original_max_position_embeddings": 10, "factor": 4.0})
    one, two = (torch.randint(4, tiny.VOCAB, (1, 4)) for _ in range(2))
    assert compose_prefixes(base, [keys_at(base, one, 0), keys_at(base, two, 0)]).length == 8
    with pytest.raises(UnsupportedError, match="frequencies"):
        compose_prefixes(base, [keys_at(base, one, 0)] * 4)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_are_not_moved(family: str) -> None:
    base, (one, two, _) = tiny.build(family), texts()
    prefixes = [keys_at(base, one, 0), keys_at(base, two, 0)]
    with pytest.raises(UnsupportedError, match=r"cannot be moved.*rerotate=False"):
        compose_prefixes(base, prefixes)
    plain = compose_prefixes(base, prefixes, rerotate=False)
    assert torch.equal(plain.flat(), torch.cat([each.flat() for each in prefixes]))


def test_prefixes_that_do_not_go_together() -> None:
    base, (one, two, _) = tiny.build("llama"), texts()
    mine, other = keys_at(base, one, 0), keys_at(tiny.build("qwen3"), two, 0)
    with pytest.raises(ConfigError, match=r"prefix 1 has .* compose prefixes of this model"):
        compose_prefixes(base, [mine, other])
    with pytest.raises(ConfigError, match="no prefixes"):
        compose_prefixes(base, [])
    with pytest.raises(ConfigError, match=r"161 tokens.*context of 160"):
        compose_prefixes(base, [mine] * 23)
    with pytest.raises(UnsupportedError, match="decoders"):
        compose_prefixes(tiny.build("bert"), [mine, mine])


def saved(base: Any, folder: Path, **options: Any) -> Path:
    model = get_peft_model(base, config(**options))
    train(model)
    model.save_pretrained(folder)
    return folder


def test_composed_adapters_are_an_adapter(tmp_path: Path) -> None:
    base = tiny.build("llama")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    one, two = saved(base, tmp_path / "1"), saved(base, tmp_path / "2", num_frozen_tokens=1, num_virtual_tokens=4)
    compose_cartridge_adapters([one, two], output_path=tmp_path / "both", model=base)
    model = SoftPromptModel.from_pretrained(base, tmp_path / "both")
    kvs = [KV.from_flat(load_adapter(folder).tensors["prompt_embeddings"], load_adapter(folder).config)
           for folder in (one, two)]  # fmt: skip
    assert torch.equal(model.encoder().prompt().flat(), compose_prefixes(base, kvs).flat())
    assert model.peft_config["default"].num_frozen_tokens == FROZEN
    compose_cartridge_adapters([one, two], output_path=tmp_path / "named")  # the base model that the config names
    named, both = (load_adapter(tmp_path / name).tensors["prompt_embeddings"] for name in ("named", "both"))
    assert torch.equal(named, both)
    compose_cartridge_adapters([one, two], output_path=tmp_path / "plain", rerotate=False)
    peft.tuners.cartridge.utils.compose_cartridge_adapters([one, two], output_path=tmp_path / "theirs")
    plain, theirs = (load_adapter(tmp_path / name).tensors["prompt_embeddings"] for name in ("plain", "theirs"))
    assert torch.equal(plain, theirs)
    assert not torch.allclose(plain, both)


def test_adapters_that_cannot_be_composed(tmp_path: Path) -> None:
    one = saved(tiny.build("llama"), tmp_path / "1")
    other = saved(tiny.build("llama", num_hidden_layers=1), tmp_path / "2")
    get_peft_model(tiny.build("llama"), softprompt.PrefixTuningConfig(task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "prefix"
    )
    for paths, options, message in (
        ([one], {}, "1 adapters"),
        ([one, other], {}, "num_layers 1.*num_layers|num_layers 1"),
        ([one, tmp_path / "prefix"], {}, "PREFIX_TUNING"),
        ([one, one], {"safe_serialization": False}, "pickle"),
        ([one, one], {}, "model=.*rerotate=False"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_cartridge_adapters(paths, output_path=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
