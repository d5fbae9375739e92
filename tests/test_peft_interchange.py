"""Trained with PEFT, used here, and the way back: equal logits, equal greedy tokens, no warnings on either side."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import peft_cells
import pytest
import tiny
import torch
from torch import Tensor, nn

import softprompt
from softprompt import SoftPromptModel
from softprompt.errors import CheckpointError

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

P = 4
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_tuning": ("PromptTuningConfig", {}),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix_ffn": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "p_tuning_mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "p_tuning_lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    ),
}
FAMILIES = ("gpt2", "llama", "bert")
pairs = pytest.mark.parametrize(("family", "method"), [(family, method) for family in FAMILIES for method in METHODS])


def config(library: Any, family: str, method: str, **options: Any) -> Any:
    """The same settings as a config of either library."""
    name, own = METHODS[method]
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    return getattr(library, name)(**{"task_type": task, "num_virtual_tokens": P, **own, **options})


def train(model: Any, family: str, steps: int = 3) -> None:
    """A few steps large enough that every part of the prompt and the head has moved."""
    batch = tiny.ragged()
    labels = torch.tensor([0, 1, 2])
    if family != "bert":
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def outputs(model: nn.Module, family: str, lengths: tuple[int, ...] = (5, 9, 7)) -> Tensor:
    """Logits of the real tokens `[N, V]`, or of the rows `[B, labels]`; PEFT has p more positions in front."""
    batch = tiny.ragged(lengths, seed=1)
    logits = model(**batch).logits
    if family == "bert":
        return logits
    return logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


def generated(model: Any) -> Tensor:
    """Greedy tokens after one row without padding."""
    row = tiny.ragged((6,), seed=2)
    return model.generate(**row, max_new_tokens=12, do_sample=False)[:, 6:]


def assert_same(one: nn.Module, other: nn.Module, family: str) -> None:
    plain = outputs(tiny.build(family), family)
    assert (outputs(one, family) - plain).abs().max() > 0.1, (
        "the prompt must matter for the comparison to mean anything"
    )
    torch.testing.assert_close(outputs(one, family), outputs(other, family), atol=1e-5, rtol=0)
    if family != "bert":
        several = [each for each in (one, other) if not (peft_cells.LAGS and isinstance(each, peft.PeftModel))]
        tokens = [generated(each) for each in several]
        assert all(torch.equal(tokens[0], each) for each in tokens)


@pytest.mark.pairwise
@pairs
def test_from_peft(tmp_path: Path, family: str, method: str) -> None:
    theirs: Any = peft.get_peft_model(tiny.build(family), config(peft, family, method))
    train(theirs, family)
    theirs.save_pretrained(tmp_path)
    ours = SoftPromptModel.from_pretrained(tiny.build(family), tmp_path)
    assert_same(ours, theirs, family)


@pytest.mark.pairwise
@pairs
def test_to_peft(tmp_path: Path, family: str, method: str) -> None:
    ours = softprompt.get_peft_model(tiny.build(family), config(softprompt, family, method))
    train(ours, family)
    ours.save_pretrained(tmp_path, keep_encoder=True)
    theirs = peft.PeftModel.from_pretrained(tiny.build(family), str(tmp_path))
    assert_same(ours, theirs, family)
    assert_same(ours, SoftPromptModel.from_pretrained(tiny.build(family), tmp_path), family)


@pairs
def test_both_write_the_same_fields_and_tensors(tmp_path: Path, family: str, method: str) -> None:
    peft.get_peft_model(tiny.build(family), config(peft, family, method)).save_pretrained(str(tmp_path / "theirs"))
    softprompt.get_peft_model(tiny.build(family), config(softprompt, family, method)).save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours"))
    theirs["peft_version"] = ours["peft_version"]
    theirs["modules_to_save"] = list(dict.fromkeys(theirs["modules_to_save"] or [])) or None  # PEFT lists heads twice
    assert ours == theirs
    tensors = [_shapes(tmp_path / side) for side in ("ours", "theirs")]
    assert tensors[0] == tensors[1]


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in softprompt.checkpoint.load_adapter(folder).tensors.items()}


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix", "p_tuning_mlp"])
def test_named_adapters_lie_in_sub_folders_both_ways(tmp_path: Path, method: str) -> None:
    theirs: Any = peft.get_peft_model(tiny.build("llama"), config(peft, "llama", method), adapter_name="fr")
    train(theirs, "llama")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "theirs" / "fr", adapter_name="fr")
    assert_same(ours, theirs, "llama")
    ours.save_pretrained(tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == ["fr"]
    again = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "ours" / "fr"), adapter_name="fr")
    assert_same(ours, again, "llama")


def test_a_pickle_of_peft_is_read_without_unpickling(tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(tiny.build("gpt2"), config(peft, "gpt2", "prefix"))
    train(theirs, "gpt2")
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.bin" in os.listdir(tmp_path)
    assert_same(SoftPromptModel.from_pretrained(tiny.build("gpt2"), tmp_path), theirs, "gpt2")


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_with_a_prompt_of_peft(tmp_path: Path, method: str) -> None:
    theirs: Any = peft.get_peft_model(tiny.build("bert"), config(peft, "bert", method))
    train(theirs, "bert")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SoftPromptModel.from_pretrained(tiny.build("bert"), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(outputs(ours.eval(), "bert"), outputs(theirs, "bert"), atol=1e-4, rtol=0)
    before = outputs(ours, "bert")
    train(ours, "bert")
    assert (outputs(ours, "bert") - before).abs().max() > 1e-3
    ours.save_pretrained(tmp_path / "ours")
    assert_same(ours, peft.PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / "ours")), "bert")


def test_text_initialisation_is_history_once_saved(tmp_path: Path) -> None:
    """The tokenizer named in the config is not needed to load."""
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "the cat sat on the mat",
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
        "tokenizer_kwargs": {"use_fast": True},
    }
    theirs: Any = peft.get_peft_model(tiny.build("llama"), config(peft, "llama", "prompt_tuning", **options))
    ours = softprompt.get_peft_model(tiny.build("llama"), config(softprompt, "llama", "prompt_tuning", **options))
    assert_same(ours, theirs, "llama")
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    assert_same(SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "theirs"), ours, "llama")
    assert_same(peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "ours")), ours, "llama")
    trainable = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "theirs", is_trainable=True)
    assert_same(trainable.eval(), ours, "llama")


def test_a_setting_that_peft_does_not_have_is_named_by_its_warning(tmp_path: Path) -> None:
    options = {"prefix_dropout": 0.25}
    ours = softprompt.get_peft_model(tiny.build("gpt2"), config(softprompt, "gpt2", "prefix", **options))
    train(ours, "gpt2")
    ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="prefix_dropout"):
        theirs = peft.PeftModel.from_pretrained(tiny.build("gpt2"), str(tmp_path))
    assert_same(ours, theirs, "gpt2")


def test_common_words_load_in_peft(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = {"prompt_tuning_init": "COMMON_VOCAB", "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    ours = softprompt.get_peft_model(tiny.build("gpt2"), config(softprompt, "gpt2", "prompt_tuning", **options))
    train(ours, "gpt2")
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny.build("gpt2"), str(tmp_path / "ours"))
    assert_same(ours, theirs, "gpt2")
    theirs.save_pretrained(str(tmp_path / "back"))
    assert_same(SoftPromptModel.from_pretrained(tiny.build("gpt2"), tmp_path / "back"), ours, "gpt2")


def test_class_labels_load_in_peft(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = {
        "prompt_tuning_init": "CLASS_LABELS",
        "class_labels": ["red house", "dog"],
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
        "tokenizer_kwargs": {"use_fast": True},
    }
    ours = softprompt.get_peft_model(tiny.build("gpt2"), config(softprompt, "gpt2", "prompt_tuning", **options))
    ours.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="class_labels"):
        theirs = peft.PeftModel.from_pretrained(tiny.build("gpt2"), str(tmp_path / "ours"))
    assert_same(ours, theirs, "gpt2")


def test_a_head_on_a_decoder(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    def base() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return AutoModelForSequenceClassification.from_config(tiny.build("llama", num_labels=3).config).eval()

    even = (6, 6, 6)  # with padded rows PEFT scores the padding of an embedding prompt
    for method in ("prefix", "p_tuning_mlp"):
        theirs: Any = peft.get_peft_model(base(), config(peft, "bert", method))
        train(theirs, "bert")
        theirs.save_pretrained(tmp_path / method)
        ours = SoftPromptModel.from_pretrained(base(), tmp_path / method)
        ours.save_pretrained(tmp_path / "back" / method)
        again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "back" / method))
        for one in (ours, again):
            torch.testing.assert_close(outputs(one, "bert", even), outputs(theirs, "bert", even), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_a_prompt_for_another_base_model_changes_nothing(tmp_path: Path, method: str) -> None:
    peft.get_peft_model(tiny.build("llama"), config(peft, "llama", method)).save_pretrained(str(tmp_path))
    base = tiny.build("llama", hidden_size=64, head_dim=16, num_hidden_layers=3)
    before = {name: (each.clone(), each.requires_grad) for name, each in base.named_parameters()}
    with pytest.raises(CheckpointError, match="layers 2 in the adapter, 3 here"):
        SoftPromptModel.from_pretrained(base, tmp_path)
    for name, each in base.named_parameters():
        assert torch.equal(each, before[name][0])
        assert each.requires_grad == before[name][1]


def test_lora_is_sent_back_to_peft(tmp_path: Path) -> None:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(tiny.build("llama"), lora).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r'peft_type "LORA" is no soft prompt known here .* use PEFT for it'):
        SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path)


def test_a_config_reads_the_same_in_both_libraries(tmp_path: Path) -> None:
    written = replace(config(softprompt, "gpt2", "p_tuning_lstm"), token_dim=32, num_layers=2, num_attention_heads=4)
    written.save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(theirs) is peft.PromptEncoderConfig
    theirs.save_pretrained(str(tmp_path))
    assert softprompt.PromptEncoderConfig.from_pretrained(tmp_path) == replace(
        written, inference_mode=True, peft_version=peft.__version__
    )


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_where_it_stopped(tmp_path: Path, method: str) -> None:
    """With the encoder kept, three steps, a save and three more are six steps (each time with a new optimizer)."""
    ours = softprompt.get_peft_model(tiny.build("bert"), config(softprompt, "bert", method))
    train(ours, "bert")
    ours.save_pretrained(tmp_path, keep_encoder=True)
    again = SoftPromptModel.from_pretrained(tiny.build("bert"), tmp_path, is_trainable=True)
    train(ours, "bert")
    train(again, "bert")
    torch.testing.assert_close(outputs(again, "bert"), outputs(ours, "bert"), atol=1e-6, rtol=0)
