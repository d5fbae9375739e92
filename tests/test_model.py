"""The wrapped model: outputs, losses, several adapters, heads; the base model's own state."""

from typing import Any

import naive
import pytest
import tiny
import torch
from model_kit import METHODS, TWO_KINDS, close, ids_of, make, several, trainable

from softprompt import (
    ConfigError,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptError,
    get_peft_model,
)

# ---- outputs -----------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
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

    from softprompt.facts import LayerShape

    facts = make("llama", "prefix").facts
    uneven = replace(facts, layers=(LayerShape(2, 8, 8), LayerShape(1, 16, 12)))
    config = PrefixEncoder.fill(PrefixTuningConfig(num_virtual_tokens=3), uneven)
    assert isinstance(config, PrefixTuningConfig)
    assert config.layer_shapes == [[2, 8, 8], [1, 16, 12]]
    encoder = PrefixEncoder(config)
    kv = encoder.prompt()
    shapes = [tuple(part.shape) for pair in kv.layers for part in pair]
    assert shapes == [(1, 2, 3, 8), (1, 2, 3, 8), (1, 1, 3, 16), (1, 1, 3, 12)]
    assert torch.equal(kv.flat(), encoder.embedding.weight)
    even = PrefixEncoder.fill(PrefixTuningConfig(num_virtual_tokens=3), facts)
    assert isinstance(even, PrefixTuningConfig)
    assert even.layer_shapes is None
