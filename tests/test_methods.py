"""Configs and encoders: PEFT's arguments, attributes, shapes and numbers; where a prompt starts from."""

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from tokenizers.normalizers import Strip
from torch import Tensor, nn

import softprompt
from softprompt import (
    METHODS,
    ConfigError,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from softprompt.methods.prompt_tuning import common_tokens
from softprompt.prompt import EmbeddingPrompt

DOCUMENTED = {  # what PEFT's documentation passes to all three configs, made small
    "task_type": "SEQ_2_SEQ_LM",
    "num_virtual_tokens": 7,
    "token_dim": 24,
    "num_transformer_submodules": 1,
    "num_attention_heads": 4,
    "num_layers": 3,
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flat": ("PREFIX_TUNING", {}),
    "ffn": ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 16}),
    "mlp": ("P_TUNING", {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 16}),
    "lstm": ("P_TUNING", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16}),
    "lstm_one_layer": (
        "P_TUNING",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16, "encoder_num_layers": 1},
    ),
    "table": ("PROMPT_TUNING", {}),
}
NAMES = {
    "PREFIX_TUNING": ("PrefixTuningConfig", "PrefixEncoder"),
    "P_TUNING": ("PromptEncoderConfig", "PromptEncoder"),
    "PROMPT_TUNING": ("PromptTuningConfig", "PromptEmbedding"),
}


def both(kind: str, inference: bool = False) -> tuple[nn.Module, nn.Module]:
    """The same documented constructor call in PEFT and here; PEFT's encoder and ours."""
    peft_type, options = ENCODERS[kind]
    built = []
    for library in (peft, softprompt):
        config_name, encoder_name = NAMES[peft_type]
        config = getattr(library, config_name)(
            peft_type=peft_type, **DOCUMENTED, **options, **({"inference_mode": True} if inference else {})
        )
        words = [nn.Embedding(11, 24)] if peft_type == "PROMPT_TUNING" else []
        built.append(getattr(library, encoder_name)(config, *words))
    return built[0], built[1]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_parameters_of_peft_give_equal_outputs(kind: str, inference: bool) -> None:
    theirs, ours = both(kind, inference)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    indices = torch.arange(7).expand(3, -1)
    if inference and ENCODERS[kind][1]:  # PEFT reads the table directly there
        torch.testing.assert_close(ours(indices), theirs.embedding(indices), rtol=0, atol=0)
        return
    torch.testing.assert_close(ours(indices), theirs(indices), rtol=0, atol=1e-6)
    width = 2 * 3 * 24 if ENCODERS[kind][0] == "PREFIX_TUNING" else 24
    assert ours(indices).shape == (3, 7, width)
    assert ours(indices[:, :2]).shape == (3, 2, width)


@pytest.mark.parametrize("kind", ENCODERS)
def test_attributes_of_peft(kind: str) -> None:
    theirs, ours = both(kind)
    documented = {
        "PREFIX_TUNING": ["embedding", "prefix_projection"] + (["transform"] if kind == "ffn" else []),
        "P_TUNING": ["embedding", "mlp_head", "token_dim", "input_size", "output_size", "hidden_size"]
        + ["total_virtual_tokens", "encoder_type"]
        + (["lstm_head"] if "lstm" in kind else []),
        "PROMPT_TUNING": ["embedding"],
    }[ENCODERS[kind][0]]
    for name in documented:
        mine, their = getattr(ours, name), getattr(theirs, name)
        if isinstance(their, nn.Module):
            assert type(mine) is type(their)
            assert str(mine) == str(their), name
        else:
            assert mine == their, name
    assert hasattr(ours, "lstm_head") == hasattr(theirs, "lstm_head")
    assert hasattr(ours, "transform") == hasattr(theirs, "transform")


def test_two_submodules_double_what_embedding_methods_save_and_nothing_else() -> None:
    """PEFT writes 2n rows for an encoder-decoder and uses n of them; only those n are trained here."""
    sizes: dict[str, Any] = {**DOCUMENTED, "num_transformer_submodules": 2}
    table = PromptEmbedding(PromptTuningConfig(**sizes))
    assert table.embedding.num_embeddings == 7
    saved = table.saved_tensors()["prompt_embeddings"]
    assert torch.equal(saved, torch.cat([table.embedding.weight, table.embedding.weight]))
    table.load_saved({"prompt_embeddings": torch.arange(14.0)[:, None].expand(14, 24)})
    assert table.embedding.weight[:, 0].tolist() == list(range(7))
    mlp = PromptEncoder(PromptEncoderConfig(**sizes, encoder_hidden_size=8))
    assert mlp.total_virtual_tokens == 14
    assert mlp.prompt().vectors.shape == (1, 7, 24)
    assert PrefixEncoder(PrefixTuningConfig(**sizes)).embedding.num_embeddings == 7


def test_load_prompt_embeddings_and_its_two_errors() -> None:
    theirs, ours = both("flat")
    flat = torch.randn(7, 2 * 3 * 24)
    for encoder in (theirs, ours):
        encoder.load_prompt_embeddings(flat)
        assert torch.equal(encoder.embedding.weight, flat)
        with pytest.raises(ValueError, match=r"Expected \(7, 144\), got \(6, 144\)"):
            encoder.load_prompt_embeddings(flat[:6])
        assert torch.equal(encoder.embedding.weight, flat)
    assert ours.embedding.weight.requires_grad
    for encoder in both("ffn"):
        with pytest.raises(ValueError, match=r"Cannot load flattened prompt embeddings when `prefix_projection=True`"):
            encoder.load_prompt_embeddings(flat)


def test_kv_dropout_only_in_training() -> None:
    options: dict[str, Any] = {**DOCUMENTED, "prefix_dropout": 0.5}
    encoder = PrefixEncoder(PrefixTuningConfig(**options))
    with torch.no_grad():
        encoder.embedding.weight.fill_(1.0)
    dropped = encoder.all_vectors()
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(encoder.saved_vectors(), torch.ones(7, 144))
    assert encoder.training
    encoder.eval()
    assert torch.equal(encoder.all_vectors(), torch.ones(7, 144))


@pytest.mark.parametrize("projection", [False, True])
def test_zero_init_is_zero_and_trains(projection: bool) -> None:
    config = PrefixTuningConfig(
        num_virtual_tokens=4, init_weights="zero", prefix_projection=projection, encoder_hidden_size=8
    )
    model = get_peft_model(tiny.build("gpt2"), config)
    assert torch.count_nonzero(model.encoder().saved_vectors()) == 0
    batch = tiny.ragged()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = model.encoder().transform[-1] if projection else model.encoder().embedding
    assert torch.count_nonzero(trained.weight.grad) > 0


# ---- where prompt tuning starts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def started(base: Any, **options: Any) -> Tensor:
    encoder = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", **options)).encoder()
    assert isinstance(encoder, EmbeddingPrompt)
    return encoder.saved_vectors()


def distances(rows: Tensor, words: Tensor) -> Tensor:
    return (rows[:, None] - words[None]).norm(dim=-1)


def test_random_is_uniform_on_half() -> None:
    rows = started(tiny.build("gpt2"), num_virtual_tokens=100)
    assert rows.min() >= -0.5
    assert rows.max() < 0.5
    assert abs(rows.std().item() - 12**-0.5) < 0.02  # of a uniform draw, not of a normal one


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])  # Gemma scales its embeddings on the way in
def test_sample_of_the_vocabulary(family: str) -> None:
    base = tiny.build(family)
    rows = started(base, num_virtual_tokens=9, prompt_tuning_init="SAMPLE_VOCAB")
    words = base.get_input_embeddings()(torch.arange(tiny.VOCAB))
    found = distances(rows, words).min(dim=1)
    assert found.values.max() < 1e-4
    assert len(set(found.indices.tolist())) > 1


@pytest.mark.parametrize("count", [2, 5, 40])
def test_text_is_cut_or_repeated_as_in_peft(count: int, tokenizer_folder: str) -> None:
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the cat sat on the mat"}
    rows = started(tiny.build("llama"), num_virtual_tokens=count, tokenizer_name_or_path=tokenizer_folder, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            tiny.build("llama"),
            peft.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=count, tokenizer_name_or_path=tokenizer_folder, **options
            ),
        )
    assert torch.equal(rows, theirs.prompt_encoder["default"].embedding.weight.detach())


def test_common_words_are_drawn_without_replacement(tokenizer_folder: str) -> None:
    base, special = tiny.build("llama"), tiny.tokenizer().all_special_ids
    table = base.get_input_embeddings().weight
    options = {"prompt_tuning_init": "COMMON_VOCAB", "common_vocab_size": 30}
    rows = started(base, num_virtual_tokens=25, tokenizer_name_or_path=tokenizer_folder, **options)
    found = distances(rows, table).min(dim=1)
    assert found.values.max() < 1e-4
    ids = found.indices.tolist()
    assert len(set(ids)) == 25
    assert set(ids) <= set(range(30 + len(special))) - set(special)  # the first ones of the vocabulary
    assert ids != sorted(ids)
    base.save_pretrained(tokenizer_folder)  # the tokenizer beside the base model serves as well
    named = type(base).from_pretrained(tokenizer_folder)
    assert started(named, num_virtual_tokens=3, prompt_tuning_init="COMMON_VOCAB").shape == (3, 32)
    options_of_labels = {"prompt_tuning_init": "CLASS_LABELS", "class_labels": ["the"]}
    first = started(named, num_virtual_tokens=3, **options_of_labels)[0]
    torch.testing.assert_close(first, table[tiny.tokenizer()("the")["input_ids"]].mean(0))
    with pytest.raises(ConfigError, match=r"31 virtual tokens.*30 common tokens.*common_vocab_size"):
        started(base, num_virtual_tokens=31, tokenizer_name_or_path=tokenizer_folder, **options)


def test_common_words_are_counted_in_texts_or_go_by_the_vocabulary() -> None:
    tokenizer = tiny.tokenizer()
    dog, cat = (tokenizer(word)["input_ids"] for word in ("dog", "cat"))
    assert set(dog).isdisjoint(cat)
    counted = common_tokens(tokenizer, 100, ["cat", "dog", "dog</s>", "dog</s>", "cat"])
    assert [set(counted[: len(dog)]), set(counted[len(dog) :])] == [set(dog), set(cat)]
    assert common_tokens(tokenizer, 1, ["dog"]) == dog[:1]
    assert common_tokens(tokenizer, 5) == [3, 4, 5, 6, 7]  # after pad, bos and eos

    class Vocabulary:
        """What is asked of a tokenizer, with pieces of many families that are no words."""

        all_special_ids = (0,)

        def get_vocab(self) -> dict[str, int]:
            pieces = ["</s>", "<0x0A>", "[unused1]", "<unused7>", "the", "<extra_id_3>", "madeupword0000", "of", "a"]
            return {piece: token for token, piece in enumerate(pieces)}

    assert common_tokens(Vocabulary(), 2) == [4, 7]


def test_class_labels_are_means_of_their_pieces(tokenizer_folder: str) -> None:
    base, labels = tiny.build("bert"), ["positive", "the", "very negative"]
    rows = started(
        base,
        num_virtual_tokens=5,
        prompt_tuning_init="CLASS_LABELS",
        class_labels=labels,
        tokenizer_name_or_path=tokenizer_folder,
    )
    table = base.get_input_embeddings().weight
    for row, label in zip(rows, labels, strict=False):
        ids = tiny.tokenizer()(label, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(row, table[ids].mean(0))
    rest = distances(rows[3:], table).min(dim=1)
    assert rest.values.max() < 1e-4  # the rest are common words, each once
    assert len(set(rest.indices.tolist())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": ""}, "prompt_tuning_init_text"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": None}, "tokenizer"),
        ({"prompt_tuning_init": "CLASS_LABELS", "class_labels": []}, "class_labels"),
        ({"prompt_tuning_init": "CLASS_LABELS", "class_labels": ["a", "b", "c"]}, "3 class_labels.*2"),
        ({"prompt_tuning_init": "CLASS_LABELS", "class_labels": ["a", ""]}, "''"),
        ({"prompt_tuning_init": "NEAREST"}, "RANDOM.*SAMPLE_VOCAB.*COMMON_VOCAB.*TEXT.*CLASS_LABELS"),
        ({"prompt_tuning_init": "COMMON_VOCAB", "common_vocab_size": 0}, "common_vocab_size"),
        ({"prompt_tuning_init": "COMMON_VOCAB", "tokenizer_name_or_path": None}, "tokenizer_name_or_path"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs"),
        (
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}
            | {"tokenizer_kwargs": {"trust_remote_code": True}},
            "trust_remote_code",
        ),
        (
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "/nowhere/at/all"},
            "/nowhere/at/all",
        ),
    ],
)
def test_a_start_that_cannot_be_made(options: dict[str, Any], message: str, tokenizer_folder: str) -> None:
    given = {"num_virtual_tokens": 2, "tokenizer_name_or_path": tokenizer_folder} | options
    with pytest.raises(ConfigError, match=message):
        started(tiny.build("gpt2"), **given)


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = Strip()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="prompt_tuning_init_text=' ' has no tokens"):
        started(
            tiny.build("gpt2"),
            num_virtual_tokens=2,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=" ",
            tokenizer_name_or_path=str(tmp_path),
        )


# ---- starting from given vectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_start_from_is_exact_up_to_the_hidden_units(kind: str) -> None:
    for count in (1, 7, 16):
        peft_type, options = ENCODERS[kind]
        config_class, encoder_class = (getattr(softprompt, name) for name in NAMES[peft_type])
        encoder = encoder_class(config_class(**{**DOCUMENTED, "num_virtual_tokens": count}, **options))
        target = torch.randn_like(encoder.saved_vectors())
        encoder.start_from(target)
        if kind == "mlp" and count == 16:
            continue  # half of the ReLUs are off: no exact solution there, see the next test
        torch.testing.assert_close(encoder.saved_vectors(), target, rtol=0, atol=2e-3 if "lstm" in kind else 1e-4)
        assert encoder.training


@pytest.mark.parametrize("kind", ["ffn", "mlp", "lstm"])
def test_start_from_more_rows_than_units_is_the_least_squares_fit(kind: str) -> None:
    peft_type, options = ENCODERS[kind]
    config_class, encoder_class = (getattr(softprompt, name) for name in NAMES[peft_type])
    encoder = encoder_class(config_class(**{**DOCUMENTED, "num_virtual_tokens": 60}, **options))
    target = torch.randn_like(encoder.saved_vectors())
    encoder.start_from(target)
    residual = encoder.saved_vectors() - target
    assert residual.norm() < target.norm()  # better than nothing,
    gradient = torch.autograd.grad((encoder.all_vectors() - target).square().sum(), encoder.output_layer().weight)[0]
    assert gradient.norm() < 1e-2 * target.norm()  # and no step of the last layer makes it better


def test_start_from_another_shape_is_refused() -> None:
    for kind in ENCODERS:
        _, encoder = both(kind)
        before = copy.deepcopy(encoder.state_dict())
        with pytest.raises(ConfigError, match=r"\(5, 5\)"):
            encoder.start_from(torch.zeros(5, 5))
        assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


# ---- configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_configs_and_encoders_can_be_copied_and_pickled(method: str) -> None:
    config = METHODS[method].config_class(**{**DOCUMENTED, "task_type": "CAUSAL_LM"})
    config = replace(config, **({"encoder_hidden_size": 8} if hasattr(config, "encoder_hidden_size") else {}))
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):  # noqa: S301
        assert again == config
        assert again.to_dict() == config.to_dict()
    encoder = METHODS[method](config)
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
        assert torch.equal(again.saved_vectors(), encoder.saved_vectors())


def test_encoders_need_their_sizes() -> None:
    with pytest.raises(ConfigError, match="token_dim"):
        PrefixEncoder(PrefixTuningConfig(num_layers=2))
    with pytest.raises(ConfigError, match="encoder_hidden_size"):
        PromptEncoder(PromptEncoderConfig(token_dim=8))
    with pytest.raises(ConfigError, match="word embeddings"):
        PromptEmbedding(PromptTuningConfig(token_dim=8, prompt_tuning_init="SAMPLE_VOCAB"))
