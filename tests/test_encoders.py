"""Encoders with a head: outputs, losses and gradients equal one row at a time, written out by hand."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    PreTrainedModel,
)

from softprompt import (
    KV,
    Embeddings,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)

COUNT = 6
METHODS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=COUNT, **more),
    "p_tuning_mlp": lambda **more: PromptEncoderConfig(num_virtual_tokens=COUNT, encoder_hidden_size=16, **more),
    "p_tuning_lstm": lambda **more: PromptEncoderConfig(
        num_virtual_tokens=COUNT, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **more
    ),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=COUNT, **more),
    "prefix_ffn": lambda **more: PrefixTuningConfig(
        num_virtual_tokens=COUNT, prefix_projection=True, encoder_hidden_size=16, **more
    ),
}
TWO_KINDS = ("prompt_tuning", "prefix")
HEADS = {
    "tokens": AutoModelForTokenClassification,
    "masked": AutoModelForMaskedLM,
    "answers": AutoModelForQuestionAnswering,
}


def make(family: str, method: str, task: str | None = "SEQ_CLS") -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.build(family), METHODS[method](task_type=task)).eval()


def with_head(family: str, head: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny.build(family).config
    if head == "answers":
        config.num_labels = 2  # a start and an end
    base = HEADS[head].from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base


def offset(base: PreTrainedModel) -> int:
    return base.config.pad_token_id + 1 if base.config.model_type == "roberta" else 0


@contextmanager
def keys_in_front(model: SoftPromptModel) -> Iterator[None]:
    """Every self-attention of BERT or RoBERTa written out: softmax(q [Pk; k]ᵀ / √d) [Pv; v], for one row unpadded."""
    layers = dict(model.get_base_model().base_model.encoder.layer.named_children())
    pairs, before = model.encoder().prompt().layers, []
    for name, layer in layers.items():
        attention, (more_key, more_value) = layer.attention.self, pairs[int(name)]
        before.append((attention, attention.forward))

        def forward(
            states: Tensor, *_: Any, part: Any = attention, pk: Tensor = more_key, pv: Tensor = more_value, **__: Any
        ) -> tuple[Tensor, None]:
            def heads(linear: Any) -> Tensor:
                return linear(states).view(1, states.shape[1], 4, 8).transpose(1, 2)

            key = torch.cat([pk, heads(part.key)], dim=2)
            value = torch.cat([pv, heads(part.value)], dim=2)
            weights = (heads(part.query) @ key.transpose(2, 3) / math.sqrt(8)).softmax(-1)
            return (weights @ value).transpose(1, 2).flatten(2), None

        attention.forward = forward
    try:
        yield
    finally:
        for attention, _ in before:
            del attention.forward


def naive(model: SoftPromptModel, row: Tensor, types: Tensor | None = None) -> Any:
    """The plain model's output for one row without padding `[1, t]`; embedding prompts cover p more columns."""
    base, prompt = model.get_base_model(), model.encoder().prompt()
    more = {} if types is None else {"token_type_ids": types}
    if isinstance(prompt, Embeddings):
        embedded = torch.cat([prompt.vectors, base.get_input_embeddings()(row)], dim=1)
        positions = torch.arange(embedded.shape[1])[None] + offset(base)
        if types is not None:
            more = {"token_type_ids": torch.cat([torch.zeros(1, COUNT, dtype=torch.long), types], dim=1)}
        return base(inputs_embeds=embedded, position_ids=positions, **more)
    with keys_in_front(model):
        return base(input_ids=row, position_ids=torch.arange(row.shape[1])[None] + COUNT + offset(base), **more)


def rows_of(batch: dict[str, Tensor], name: str = "input_ids") -> list[Tensor]:
    return [each[mask.bool()][None] for each, mask in zip(batch[name], batch["attention_mask"], strict=True)]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_logits_loss_and_gradients_equal_naive(family: str, method: str, side: str) -> None:
    model, batch, labels = make(family, method), tiny.ragged(side=side), torch.tensor([2, 0, 1])
    expected = torch.cat([naive(model, row).logits for row in rows_of(batch)])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected_loss = cross_entropy(expected, labels)
    expected_gradients = torch.autograd.grad(expected_loss, parameters, materialize_grads=True)
    out = model(**batch, labels=labels)
    close(out.logits, expected)
    close(out.loss, expected_loss)
    for got, wanted in zip(torch.autograd.grad(out.loss, parameters), expected_gradients, strict=True):
        close(got, wanted)
    close(model(**batch).logits, expected)
    single = [model(input_ids=row).logits for row in rows_of(batch)]  # and without a mask
    close(torch.cat(single), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.MORE_ENCODERS)
def test_padding_changes_nothing(family: str, method: str) -> None:
    model = make(family, method)
    left, right = tiny.ragged(side="left"), tiny.ragged(side="right")
    single = torch.cat([model(input_ids=row).logits for row in rows_of(right)])
    close(model(**left).logits, single)
    close(model(**right).logits, single)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_mlp", "prefix"])
def test_bert_equals_peft_on_right_padded_rows(method: str) -> None:
    model, batch = make("bert", method), tiny.ragged()
    config = {
        "prompt_tuning": peft.PromptTuningConfig,
        "p_tuning_mlp": peft.PromptEncoderConfig,
        "prefix": peft.PrefixTuningConfig,
    }[method](num_virtual_tokens=COUNT, task_type="SEQ_CLS", **({"encoder_hidden_size": 16} if "p_t" in method else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.build("bert"), config).eval()
        theirs.prompt_encoder["default"].load_state_dict(model.encoder().state_dict())
        expected = theirs(**batch).logits
    close(model(**batch).logits, expected)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_token_types_follow_their_tokens(family: str, method: str, side: str) -> None:
    config = tiny.build(family).config
    model = make(family, method)
    if config.type_vocab_size < 2:
        pytest.fail("the tiny model has no second token type")
    batch = tiny.ragged(side=side)
    types = torch.randint(0, 2, batch["input_ids"].shape)
    got = model(**batch, token_type_ids=types).logits
    paired = zip(rows_of(batch), rows_of({**batch, "types": types}, "types"), strict=True)
    close(got, torch.cat([naive(model, row, row_types).logits for row, row_types in paired]))
    assert not torch.allclose(got, model(**batch).logits, atol=1e-3)


@pytest.mark.parametrize("method", TWO_KINDS)
def test_four_dimensional_masks(method: str) -> None:
    """Two blocks of three tokens and one that nobody sees; every token sees the prompt, the prompt what any sees."""
    model, ids = make("bert", method), torch.randint(3, tiny.VOCAB, (1, 7))
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3), torch.zeros(1, 1)).bool()
    got = model(input_ids=ids, attention_mask=mask[None, None]).logits
    if method == "prefix":  # the pooled token sees its own block and the prompt
        close(got, naive(model, ids[:, :3]).logits)
        return
    visible = torch.ones(COUNT + 7, COUNT + 7, dtype=torch.bool)
    visible[COUNT:, COUNT:] = mask
    visible[:COUNT, -1] = False
    base = model.get_base_model()
    embedded = torch.cat([model.encoder().prompt().vectors, base.get_input_embeddings()(ids)], dim=1)
    close(got, base(inputs_embeds=embedded, attention_mask=visible[None, None]).logits)
    assert not torch.allclose(got, model(input_ids=ids).logits, atol=1e-3)


# ---- one output per token ----------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("head", ["tokens", "masked"])
@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_token_outputs_come_in_the_callers_order(family: str, head: str, method: str, side: str) -> None:
    model = get_peft_model(with_head(family, head), METHODS[method]()).eval()
    batch = tiny.ragged(side=side)
    labels = torch.randint(0, 3, batch["input_ids"].shape).masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels, output_hidden_states=True)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    losses = []
    for index, (row, mask) in enumerate(zip(rows_of(batch), batch["attention_mask"].bool(), strict=True)):
        shown = -row.shape[1]
        expected = naive(model, row).logits[0, shown:]
        close(out.logits[index, mask], expected)
        losses.append(cross_entropy(expected, labels[index, mask], reduction="none"))
    close(out.loss, torch.cat(losses).mean())
    for states in out.hidden_states:
        assert states.shape[:2] == batch["input_ids"].shape


@pytest.mark.parametrize("backend", ["eager"])
@pytest.mark.parametrize("method", TWO_KINDS)
def test_attentions_cover_real_tokens(method: str, backend: str) -> None:
    base = tiny.build("bert", attn_implementation=backend)
    model = get_peft_model(base, METHODS[method](task_type="SEQ_CLS")).eval()
    left, right = tiny.ragged(side="left"), tiny.ragged(side="right")
    outputs = [model(**batch, output_attentions=True).attentions for batch in (left, right)]
    for one, other in zip(*outputs, strict=True):
        assert one.shape == (3, 4, 9, 9)
        for index, (a, b) in enumerate(zip(left["attention_mask"], right["attention_mask"], strict=True)):
            a, b = a.bool(), b.bool()
            close(one[index][:, a][:, :, a], other[index][:, b][:, :, b])
        assert (one.sum(-1) < 1).all()  # the rest of every row went to the prompt


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
def test_answer_spans_follow_their_tokens(method: str, side: str) -> None:
    model = get_peft_model(with_head("bert", "answers"), METHODS[method](task_type="QUESTION_ANS")).eval()
    batch = tiny.ragged(side=side)
    first = batch["attention_mask"].argmax(1)  # the column of the first real token
    starts, ends = first + torch.tensor([1, 0, 2]), first + torch.tensor([3, 8, 2])
    out = model(**batch, start_positions=starts, end_positions=ends)
    assert out.start_logits.shape == batch["input_ids"].shape
    shift = COUNT if method == "prompt_tuning" else 0
    for index, row in enumerate(rows_of(batch)):
        alone, mask = naive(model, row), batch["attention_mask"][index].bool()
        close(out.start_logits[index, mask], alone.start_logits[0, shift:])
        close(out.end_logits[index, mask], alone.end_logits[0, shift:])
        start, end = (starts - first)[index : index + 1], (ends - first)[index : index + 1]
        expected = cross_entropy(alone.start_logits[:, shift:], start) + cross_entropy(alone.end_logits[:, shift:], end)
        close(model(input_ids=row, start_positions=start, end_positions=end).loss, expected / 2)


@pytest.mark.parametrize("method", TWO_KINDS)
def test_spans_of_a_left_padded_batch(method: str) -> None:
    """One row padded on either side gives one loss: the span's columns move with the tokens."""
    model = get_peft_model(with_head("bert", "answers"), METHODS[method](task_type="QUESTION_ANS")).eval()
    losses = []
    for side, first in (("left", 3), ("right", 0)):
        batch = {name: value[:1] for name, value in tiny.ragged((5, 8), side=side).items()}
        span = {"start_positions": torch.tensor([first + 1]), "end_positions": torch.tensor([first + 4])}
        losses.append(model(**batch, **span).loss)
        wrong = {"start_positions": torch.tensor([first + 2]), "end_positions": torch.tensor([first + 4])}
        assert abs(model(**batch, **wrong).loss - losses[-1]) > 1e-3
        outside = {"start_positions": torch.tensor([8]), "end_positions": torch.tensor([first + 4])}
        assert model(**batch, **outside).loss.isnan()  # as in the plain model: nothing is left to average
    close(losses[0], losses[1])


# ---- the body alone, and others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
def test_features_of_the_body_alone(method: str, side: str) -> None:
    model = get_peft_model(tiny.build("bert").bert, METHODS[method](task_type="FEATURE_EXTRACTION")).eval()
    batch = tiny.ragged(side=side)
    out = model(**batch)
    assert out.last_hidden_state.shape[:2] == batch["input_ids"].shape
    for index, row in enumerate(rows_of(batch)):
        alone = naive(model, row)
        mask = batch["attention_mask"][index].bool()
        close(out.last_hidden_state[index, mask], alone.last_hidden_state[0, -row.shape[1] :])
        close(out.pooler_output[index], alone.pooler_output[0])


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_narrower_than_the_layers(method: str) -> None:
    torch.manual_seed(0)
    base = ElectraForSequenceClassification(
        ElectraConfig(
            vocab_size=tiny.VOCAB, embedding_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    model = get_peft_model(base, METHODS[method](task_type="SEQ_CLS")).eval()
    close(model(**tiny.ragged(side="left")).logits, model(**tiny.ragged(side="right")).logits)
    assert model.peft_config["default"].token_dim == (32 if "prefix" in method else 12)


def test_one_layer_run_three_times_has_three_prefixes() -> None:
    config = AlbertConfig(
        vocab_size=tiny.VOCAB, embedding_size=12, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    base = AlbertForSequenceClassification(config).eval()
    model = get_peft_model(base, METHODS["prompt_tuning"](task_type="SEQ_CLS")).eval()
    batch = tiny.ragged(side="left")
    close(model(**batch).logits, torch.cat([naive(model, row).logits for row in rows_of(batch)]))
    model.add_adapter("prefix", METHODS["prefix"]())
    model.set_adapter("prefix")
    prefix = model.encoder().prompt()
    assert isinstance(prefix, KV) and len(prefix.layers) == 3
    before = model(**batch).logits
    table = model.encoder().embedding.weight
    for number in range(3):  # each run has its own: any one of them matters
        kept = table.detach().clone()
        with torch.no_grad():
            table.view(COUNT, 3, -1)[:, number] += 1
        assert (model(**batch).logits - before).abs().max() > 1e-4
        with torch.no_grad():
            table.copy_(kept)
    close(model(**batch).logits, model(**tiny.ragged(side="right")).logits)


def test_an_encoder_cannot_fold_vectors() -> None:
    with pytest.raises(UnsupportedError, match=r"BertForSequenceClassification is not causal.*prefix_tuning"):
        make("bert", "prompt_tuning").fold()
    assert make("bert", "prefix").fold().length == COUNT
