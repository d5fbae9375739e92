"""The wrapped model: outputs, losses, several adapters, heads, saving and going on; the base model's own state."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from softprompt import (
    CheckpointError,
    ConfigError,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptError,
    SoftPromptModel,
    get_peft_model,
)

METHODS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=4, **more),
    "p_tuning_mlp": lambda **more: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **more),
    "p_tuning_lstm": lambda **more: PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **more
    ),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=4, **more),
    "prefix_ffn": lambda **more: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, **more
    ),
}
TWO_KINDS = ("prompt_tuning", "prefix")


def make(family: str, method: str, task: str | None = "CAUSAL_LM", **more: Any) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.build(family), METHODS[method](task_type=task, **more)).eval()


def ids_of(length: int, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- outputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_states_and_attentions_cover_real_tokens(family: str, method: str, labelled: bool) -> None:
    torch.manual_seed(0)
    base = tiny.build(family, attn_implementation="eager")
    model = get_peft_model(base, METHODS[method]()).eval()
    batch = tiny.ragged(side="left")
    more = {"labels": batch["input_ids"]} if labelled else {}
    out = model(**batch, output_hidden_states=True, output_attentions=True, **more)
    plain = base(**batch, output_hidden_states=True, output_attentions=True)
    assert [s.shape for s in out.hidden_states] == [s.shape for s in plain.hidden_states]
    assert [a.shape for a in out.attentions] == [a.shape for a in plain.attentions]
    real = batch["attention_mask"].bool()
    for weights in out.attentions:
        rows = weights.transpose(1, 2)[real]
        assert (rows.sum(-1) < 0.9999).all()  # the rest of every row went to the prompt
        hidden = ~real[:, None, :].expand(-1, 9, -1)[real]
        assert rows.transpose(1, 2)[hidden].abs().max() < 1e-6  # nothing looks at padding
    assert not torch.allclose(out.hidden_states[-1][real], plain.hidden_states[-1][real], atol=1e-3)


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_return_dict_false_is_the_same_as_a_tuple(family: str, method: str) -> None:
    model, batch = make(family, method, task=None), tiny.ragged()
    labels = torch.tensor([0, 1, 2]) if family == "bert" else batch["input_ids"]
    for more in ({}, {"labels": labels}):
        out = model(**batch, use_cache=False, **more) if family == "gpt2" else model(**batch, **more)
        switch = {"use_cache": False} if family == "gpt2" else {}
        as_tuple = model(**batch, return_dict=False, **switch, **more)
        assert isinstance(as_tuple, tuple)
        for one, other in zip(as_tuple, out.to_tuple(), strict=True):
            assert torch.equal(one, other)
        if family == "gpt2":
            continue  # transformers' own GPT-2 cannot be told so by its config and asked for otherwise
        model.get_base_model().config.return_dict = False
        assert isinstance(model(**batch, **more), tuple)
        model.get_base_model().config.return_dict = True


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_real_token_counts_for_embedding_methods(method: str, side: str) -> None:
    """Its loss is the last virtual token's; a KV prefix has no output that could predict it."""
    model, batch = make("llama", method), tiny.ragged(side=side)
    real = batch["attention_mask"].bool()
    first = real & (batch["attention_mask"].cumsum(-1) == 1)
    everything = batch["input_ids"].masked_fill(~real, -100)
    close(model(**batch, labels=everything).loss, naive.loss(model, batch, everything))
    only_first = batch["input_ids"].masked_fill(~first, -100)
    loss = model(**batch, labels=only_first).loss
    if "prefix" in method:
        assert loss.isnan()  # nothing is left to average
    else:
        close(loss, naive.loss(model, batch, only_first))
    without = everything.masked_fill(first, -100)
    close(model(**batch, labels=without).loss, naive.loss(model, batch, without))


def test_labels_on_padding_are_the_callers_own_affair() -> None:
    """As in the plain model, what stands in `labels` under padding counts unless it is −100."""
    model, batch = make("llama", "prefix"), tiny.ragged(side="right")
    masked = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert not torch.equal(model(**batch, labels=batch["input_ids"]).loss, model(**batch, labels=masked).loss)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_training_mode_runs_with_dropout(family: str, method: str) -> None:
    drop = {
        "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
        "llama": {"attention_dropout": 0.3},
        "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    }[family]
    model = get_peft_model(tiny.build(family, **drop), METHODS[method]()).train()
    batch = tiny.ragged(side="left")
    labels = torch.tensor([0, 1, 2]) if family == "bert" else batch["input_ids"]
    losses = {model(**batch, labels=labels).loss.item() for _ in range(3)}
    assert len(losses) == 3  # dropout is on
    model.eval()
    assert len({model(**batch, labels=labels).loss.item() for _ in range(2)}) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_few_steps_lower_the_loss_and_leave_the_base_alone(method: str) -> None:
    base = tiny.build("llama")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, METHODS[method]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
    batch = tiny.ragged()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_what_is_unknown_here_is_the_base_models() -> None:
    model = make("llama", "prefix")
    assert model.config is model.get_base_model().config
    assert model.device == torch.device("cpu")
    assert model.dtype is torch.float32
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense


def test_counting_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = make("gpt2", "prefix")
    own, rest = 4 * 2 * 2 * 32, sum(parameter.numel() for parameter in model.get_base_model().parameters())
    assert model.get_nb_trainable_parameters() == (own, own + rest)
    model.print_trainable_parameters()
    share = 100 * own / (own + rest)
    expected = f"trainable params: {own:,d} || all params: {own + rest:,d} || trainable%: {share:.4f}"
    assert capsys.readouterr().out.strip() == expected


def test_the_signature_names_what_trainers_look_for() -> None:
    import inspect

    names = inspect.signature(make("bert", "prefix", task=None).forward).parameters
    assert {"input_ids", "attention_mask", "token_type_ids", "labels", "position_ids"} <= set(names)


# ---- adapters ----------------------------------------------------------------------------------------------------


def several() -> SoftPromptModel:
    """Three methods on one model; `default` is active."""
    model = make("llama", "prefix_ffn")
    model.add_adapter("soft", METHODS["prompt_tuning"](task_type="CAUSAL_LM"))
    model.add_adapter("lstm", METHODS["p_tuning_lstm"](task_type="CAUSAL_LM"))
    return model.eval()


def test_several_methods_on_one_model() -> None:
    model, ids = several(), ids_of(6)
    assert model.active_adapter == "default"
    assert model.active_adapters == ["default"]
    outputs = {}
    for name in ("default", "soft", "lstm"):
        model.set_adapter(name)
        assert model.active_peft_config is model.peft_config[name]
        outputs[name] = model(input_ids=ids).logits
        close(outputs[name], naive.logits(model, ids)[0])
        only = {f"prompt_encoder.{name}.{key}" for key, _ in model.prompt_encoder[name].named_parameters()}
        assert trainable(model) == only
    assert not torch.allclose(outputs["soft"], outputs["lstm"], atol=1e-3)


def test_adding_does_not_activate_or_thaw() -> None:
    model = make("llama", "prefix")
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()
    model.add_adapter("more", METHODS["prompt_tuning"]())
    assert model.active_adapter == "default"
    assert trainable(model) == set()
    model.set_adapter("more")
    assert trainable(model) == {"prompt_encoder.more.embedding.weight"}


def test_deleting() -> None:
    model, ids = several(), ids_of(5)
    model.delete_adapter("soft")
    assert list(model.peft_config) == ["default", "lstm"]
    model.delete_adapter("default")  # the active one: another takes over
    assert model.active_adapter == "lstm"
    close(model(input_ids=ids).logits, naive.logits(model, ids)[0])
    assert all(name.startswith("prompt_encoder.lstm.") for name in trainable(model))
    with pytest.raises(ConfigError, match="'lstm' is the only adapter"):
        model.delete_adapter("lstm")
    with pytest.raises(ConfigError, match=r"no adapter named 'soft'.*lstm"):
        model.delete_adapter("soft")
    model.add_adapter("soft", METHODS["prefix"]())  # the name is free again
    assert "soft" in model.peft_config


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", "a.b", "../up", "a\\b", "x" * 300, "\x00", "keys", "training", "forward"]
)
def test_names_that_are_no_folder_or_module(name: str) -> None:
    model = make("gpt2", "prefix")
    with pytest.raises(SoftPromptError, match="name"):
        model.add_adapter(name, METHODS["prefix"]())
    with pytest.raises(SoftPromptError, match="name"):
        get_peft_model(tiny.build("gpt2"), METHODS["prefix"](), adapter_name=name)
    assert list(model.peft_config) == ["default"]
    assert list(model.prompt_encoder) == ["default"]


def test_a_name_twice_and_unknown_names() -> None:
    model = make("gpt2", "prefix")
    before = model.encoder()
    with pytest.raises(ConfigError, match="'default' is there already"):
        model.add_adapter("default", METHODS["prompt_tuning"]())
    assert model.encoder() is before
    for call in (model.set_adapter, model.encoder, model.fold, model.prompt_vectors):
        with pytest.raises(ConfigError, match="no adapter named 'none'; there are default"):
            call("none")
    assert model.active_adapter == "default"


def test_inference_mode_trains_nothing_and_has_no_encoder() -> None:
    model = make("llama", "p_tuning_mlp", inference_mode=True)
    assert trainable(model) == set()
    assert list(model.encoder().state_dict()) == ["embedding.weight"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(token_dim=64), "token_dim=64.*16"),
        (PrefixTuningConfig(num_attention_heads=3), "num_attention_heads=3.*2"),
        (PrefixTuningConfig(num_layers=3), "num_layers=3.*2"),
        (PromptTuningConfig(token_dim=64), "token_dim=64.*32"),
        (PromptTuningConfig(num_transformer_submodules=2), "num_transformer_submodules=2"),
        (PrefixTuningConfig(num_virtual_tokens=400), "400.*context of 160"),
        (PrefixTuningConfig(modules_to_save=["head"]), "'head'.*no such module"),
        (PrefixTuningConfig(modules_to_save=["self_attn"]), "attention"),
        (PrefixTuningConfig(modules_to_save=["model"]), "attention"),
    ],
)
def test_a_config_that_does_not_fit_changes_nothing(config: Any, message: str) -> None:
    base = tiny.build("llama")
    modules = dict(base.named_modules())
    with pytest.raises(SoftPromptError, match=message):
        get_peft_model(base, config)
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = make("llama", "prefix")
    with pytest.raises(SoftPromptError, match=message):
        model.add_adapter("more", config)
    assert list(model.peft_config) == list(model.prompt_encoder) == ["default"]
    assert dict(base.named_modules()) == modules


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sizes_as_peft_documents_them(family: str) -> None:
    """The model's own width and heads; keys and values of grouped queries have fewer."""
    sizes: dict[str, Any] = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
    for config in (PrefixTuningConfig(**sizes), PromptTuningConfig(**sizes), PromptEncoderConfig(**sizes)):
        model = get_peft_model(tiny.build(family), config)
        grouped = family == "llama" and isinstance(config, PrefixTuningConfig)
        assert model.peft_config["default"].token_dim == (16 if grouped else 32)
        assert model.peft_config["default"].num_attention_heads == (2 if grouped else 4)


def test_a_config_of_no_method() -> None:
    from softprompt import PromptConfig

    with pytest.raises(ConfigError, match=r"PromptConfig.*PrefixTuningConfig"):
        get_peft_model(tiny.build("gpt2"), PromptConfig())


# ---- the plain model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_disable_adapter_is_the_plain_model(family: str, method: str) -> None:
    base, batch = tiny.build(family), tiny.ragged(side="right")
    expected = base(**batch).logits
    model = get_peft_model(base, METHODS[method](task_type="SEQ_CLS" if family == "bert" else None)).eval()
    for parameter in model.heads.parameters():  # a head that has been trained
        parameter.data.add_(1.0)
    prompted = model(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, prompted)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(model(**batch).logits, prompted)
    assert not torch.allclose(prompted, expected, atol=1e-3)


def test_switching_while_disabled() -> None:
    model, ids = several(), ids_of(5)
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
        model.set_adapter("soft")
        assert torch.equal(model(input_ids=ids).logits, plain)
    close(model(input_ids=ids).logits, naive.logits(model, ids)[0])
    assert model.active_adapter == "soft"


@pytest.mark.parametrize("method", TWO_KINDS)
def test_generate_while_disabled(method: str) -> None:
    model, ids = make("llama", method), ids_of(5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = tiny.build("llama").generate(ids, **options)
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(input_ids=ids, **options), expected)


def test_the_state_of_the_base_has_its_own_names() -> None:
    base = tiny.build("bert")
    keys = list(base.state_dict())
    model = get_peft_model(base, METHODS["prefix"](task_type="SEQ_CLS"))
    model.add_adapter("more", METHODS["prompt_tuning"](task_type="SEQ_CLS"))
    for name in ("more", "default"):
        model.set_adapter(name)
        assert list(base.state_dict()) == keys


# ---- heads -------------------------------------------------------------------------------------------------------


def classifier(family: str, seed: int = 0, labels: int = 3) -> PreTrainedModel:
    if family == "bert":
        return tiny.build(family, num_labels=labels) if labels != 3 else tiny.build(family)
    torch.manual_seed(seed)
    config = tiny.build(family).config
    config.num_labels = labels
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_classifiers_pool_the_right_token(family: str, method: str, side: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(classifier(family), METHODS[method](task_type="SEQ_CLS")).eval()
    batch, labels = tiny.ragged(side=side), torch.tensor([0, 2, 1])
    out = model(**batch, labels=labels)
    single = torch.cat([model(input_ids=row).logits for row in naive.rows(batch)])
    close(out.logits, single)
    close(out.loss, torch.nn.functional.cross_entropy(single, labels))
    out.loss.backward()
    head = "classifier" if family == "bert" else "score"
    assert torch.count_nonzero(getattr(model.get_base_model(), head).weight.grad)
    assert all(torch.count_nonzero(parameter.grad) for parameter in model.prompt_encoder.parameters())
    prefixes = ("prompt_encoder.default.", "heads.copies.default.", f"base_model.{head}.")
    assert all(name.startswith(prefixes) for name in trainable(model))


def test_classifier_of_a_causal_model_pools_behind_the_prompt() -> None:
    """Checked against the plain model's own body over prompt and row, and its head by hand."""
    model = get_peft_model(classifier("gpt2"), METHODS["prompt_tuning"](task_type="SEQ_CLS")).eval()
    base, ids = model.get_base_model(), ids_of(6)
    embedded = torch.cat([model.encoder().prompt().vectors, base.get_input_embeddings()(ids)], dim=1)
    states = base.transformer(inputs_embeds=embedded).last_hidden_state
    close(model(input_ids=ids).logits, base.score(states[:, -1]))


def test_a_head_per_adapter() -> None:
    base, batch = tiny.build("bert"), tiny.ragged()
    original = base.classifier
    model = get_peft_model(base, METHODS["prefix"](task_type="SEQ_CLS"), adapter_name="one").eval()
    model.add_adapter("two", METHODS["prompt_tuning"](task_type="SEQ_CLS"))
    model.add_adapter("none", METHODS["prompt_tuning"]())
    assert base.classifier is not original
    with torch.no_grad():
        base.classifier.weight.zero_()
    outputs = {}
    for name in ("one", "two", "none"):
        model.set_adapter(name)
        outputs[name] = model(**batch).logits
        trains = {key for key in trainable(model) if "classifier" in key}
        assert bool(trains) == (name != "none")
    assert torch.equal(outputs["one"], base.classifier.bias.expand(3, -1))
    assert base.classifier is original  # `none` asks for no head of its own
    assert not original.weight.requires_grad
    assert torch.count_nonzero(original.weight)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(model(**batch).logits, outputs["two"])


def test_heads_follow_to_another_type() -> None:
    """Also the base model's own head, which waits outside while an adapter's stands in."""
    model = get_peft_model(tiny.build("bert"), METHODS["prefix"](task_type="SEQ_CLS")).eval()
    model.to(torch.float64)
    batch = tiny.ragged()
    assert model(**batch).logits.dtype is torch.float64
    with model.disable_adapter():
        assert model(**batch).logits.dtype is torch.float64


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_module_to_save_of_ones_own(method: str, tmp_path: Path) -> None:
    base, ids = tiny.build("llama"), ids_of(6)
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
    before = tiny.build("llama").lm_head.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(base.lm_head.weight, before)
    expected = model.eval()(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(base.lm_head.weight, before)
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path)
    close(again(input_ids=ids).logits, expected)


# ---- saving and going on -----------------------------------------------------------------------------------------


CASES = [("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")]


def trained(family: str, task: str, method: str, steps: int = 2) -> SoftPromptModel:
    model = make(family, method, task=task)
    train(model, steps)
    return model


def train(model: SoftPromptModel, steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = tiny.ragged()
    causal = model.geometry.causal
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100) if causal else torch.tensor([0, 1, 2])
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_saved_and_loaded(family: str, task: str, method: str, tmp_path: Path) -> None:
    model, batch = trained(family, task, method), tiny.ragged(side="left")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build(family), tmp_path)
    close(again(**batch).logits, expected)
    assert trainable(again) == set()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training
    assert again.peft_config["default"].inference_mode


@pytest.mark.slow
def test_saved_here_and_loaded_in_another_process(tmp_path: Path) -> None:
    model, batch = trained("llama", "CAUSAL_LM", "prefix_ffn"), tiny.ragged(side="left")
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().save_pretrained(tmp_path / "base")
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny, torch
from transformers import AutoModelForCausalLM
from softprompt import SoftPromptModel
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = SoftPromptModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
print(json.dumps(model(**tiny.ragged(side="left")).logits[:, -1].tolist()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    close(torch.tensor(json.loads(out.stdout.strip().splitlines()[-1])), model(**batch).logits[:, -1].detach())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_going_on_with_the_kept_encoder(family: str, task: str, method: str, tmp_path: Path) -> None:
    model = trained(family, task, method)
    model.save_pretrained(tmp_path, keep_encoder=True)
    again = SoftPromptModel.from_pretrained(tiny.build(family), tmp_path, is_trainable=True)
    assert trainable(again) == trainable(model)
    train(model, 3)
    train(again, 3)
    assert torch.equal(again.encoder().saved_vectors(), model.encoder().saved_vectors())
    for name, value in model.heads.state_dict().items():
        assert torch.equal(again.heads.state_dict()[name], value)


@pytest.mark.parametrize("method", METHODS)
def test_going_on_without_the_encoder_trains_the_table(method: str, tmp_path: Path) -> None:
    trained("llama", "CAUSAL_LM", method).save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path, is_trainable=True)
    assert trainable(again) == {"prompt_encoder.default.embedding.weight"}
    before = again.encoder().saved_vectors()
    train(again, 1)
    assert not torch.equal(again.encoder().saved_vectors(), before)
    again.save_pretrained(tmp_path / "again")
    once_more = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "again")
    assert torch.equal(once_more.encoder().saved_vectors(), again.encoder().saved_vectors())


def test_several_adapters_in_one_folder(tmp_path: Path) -> None:
    model, ids = several(), ids_of(5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "soft" / "adapter_config.json").is_file()
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path)
    again.load_adapter(tmp_path / "soft", "soft")
    again.load_adapter(tmp_path / "lstm", "lstm", is_trainable=True)
    assert again.active_adapter == "default"
    assert trainable(again) == set()
    for name in ("default", "soft", "lstm"):
        model.set_adapter(name)
        again.set_adapter(name)
        close(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert bool(trainable(again)) == (name == "lstm")  # the others were loaded frozen
    model.save_pretrained(tmp_path / "some", selected_adapters=["soft"])
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["soft"]


def test_loading_under_another_name(tmp_path: Path) -> None:
    trained("gpt2", "CAUSAL_LM", "prefix").save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.build("gpt2"), tmp_path, adapter_name="mine")
    assert again.active_adapter == "mine"
    with pytest.raises(ConfigError, match="'mine' is there already"):
        again.load_adapter(tmp_path, "mine")


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_failing_load_changes_nothing(method: str, tmp_path: Path) -> None:
    trained("gpt2", "CAUSAL_LM", method).save_pretrained(tmp_path)
    base = tiny.build("gpt2", n_layer=3, n_embd=48, n_head=4)
    modules, state = dict(base.named_modules()), {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"layers 2 in the adapter, 3 here|width 32 in the adapter, 48 here"):
        SoftPromptModel.from_pretrained(base, tmp_path)
    model = get_peft_model(base, METHODS["prefix"]()).eval()
    before = model(input_ids=ids_of(3)).logits
    with pytest.raises(CheckpointError, match="made for another base model"):
        model.load_adapter(tmp_path, "more")
    with pytest.raises(CheckpointError):
        model.load_adapter(tmp_path / "nothing", "more")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        SoftPromptModel.from_pretrained(tiny.build("gpt2"), tmp_path)
    assert list(model.peft_config) == list(model.prompt_encoder) == ["default"]
    assert dict(base.named_modules()) == modules
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
    assert before.isfinite().all()


def test_a_base_that_fails_to_load_still_trains(tmp_path: Path) -> None:
    trained("gpt2", "CAUSAL_LM", "prefix").save_pretrained(tmp_path)
    base = tiny.build("llama")
    with pytest.raises(CheckpointError):
        SoftPromptModel.from_pretrained(base, tmp_path)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_save_options_that_mean_nothing(tmp_path: Path) -> None:
    model = make("gpt2", "prefix")
    with pytest.raises(ConfigError, match="no option 'max_shard'"):
        model.save_pretrained(tmp_path, max_shard=1)
    with pytest.raises(ConfigError, match=r"safe_serialization=False.*safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ConfigError, match="no adapter named 'other'"):
        model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


# ---- other people's training loops --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_state_is_prompts_and_heads(family: str, method: str) -> None:
    model = make(family, method, task="SEQ_CLS" if family == "bert" else None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    heads = ["heads.copies.default.classifier.weight", "heads.copies.default.classifier.bias"]
    assert list(state) == ["prompt_encoder.default.embedding.weight", *(heads if family == "bert" else [])]
    other = make(family, method, task="SEQ_CLS" if family == "bert" else None)
    train(other, 1)
    other.load_state_dict(state)  # strictly
    close(other(**tiny.ragged()).logits, model(**tiny.ragged()).logits)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    assert list(nn.Sequential(model).state_dict()) == [f"0.{name}" for name in state]


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, classes: bool) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, tiny.VOCAB, (8,), generator=torch.Generator().manual_seed(index))
        types = {"token_type_ids": torch.ones(8, dtype=torch.long)} if self.classes else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types} | {
            "labels": index % 3 if self.classes else ids
        }


@pytest.mark.parametrize(("family", "task"), [("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
@pytest.mark.parametrize("method", ["p_tuning_mlp", "prefix"])
def test_transformers_own_trainer(family: str, task: str, method: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, use_cpu=True, disable_tqdm=True,
        load_best_model_at_end=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data = Rows(classes=task == "SEQ_CLS")
    model = make(family, method, task=task)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    assert trainer.predict(data).predictions.shape[0] == 8
    saved = tmp_path / "checkpoint-4" / "model.safetensors"
    assert saved.stat().st_size < sum(4 * p.numel() for p in model.get_base_model().parameters())
    again = Trainer(model=make(family, method, task=task), args=arguments, train_dataset=data, eval_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert math.isclose(again.evaluate()["eval_loss"], after, rel_tol=1e-5)


# ---- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_prompts_vectors(method: str) -> None:
    model = make("llama", method)
    vectors = model.prompt_vectors()
    if "prefix" in method:
        assert vectors is None
    else:
        assert vectors is not None
        assert vectors.shape == (4, 32)
        assert not vectors.requires_grad
        assert torch.equal(vectors, model.encoder().saved_vectors())


@pytest.mark.parametrize("method", METHODS)
def test_a_fold_is_frozen_and_leaves_modes_alone(method: str) -> None:
    model = make("llama", method).train()
    kv = model.fold()
    assert kv.length == 4
    assert not any(part.requires_grad for pair in kv.layers for part in pair)
    assert model.training
    assert model.encoder().training


def test_layers_of_different_shapes_have_a_prefix_each() -> None:
    """A layer's own heads and sizes are kept in the config, which PEFT has no field for, and in the flat table."""
    from dataclasses import replace

    from softprompt.geometry import LayerShape

    geometry = make("llama", "prefix").geometry
    uneven = replace(geometry, layers=(LayerShape(2, 8, 8), LayerShape(1, 16, 12)))
    config = PrefixEncoder.fill(PrefixTuningConfig(num_virtual_tokens=3), uneven)
    assert isinstance(config, PrefixTuningConfig)
    assert config.layer_shapes == [[2, 8, 8], [1, 16, 12]]
    encoder = PrefixEncoder(config)
    kv = encoder.prompt()
    shapes = [tuple(part.shape) for pair in kv.layers for part in pair]
    assert shapes == [(1, 2, 3, 8), (1, 2, 3, 8), (1, 1, 3, 16), (1, 1, 3, 12)]
    assert torch.equal(kv.flat(), encoder.embedding.weight)
    even = PrefixEncoder.fill(PrefixTuningConfig(num_virtual_tokens=3), geometry)
    assert isinstance(even, PrefixTuningConfig)
    assert even.layer_shapes is None
