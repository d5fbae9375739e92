"""Encoder-decoders: every prompt in its place, equal to the plain formulation row by row, in training and generation.

The plain formulation: vectors concatenated in front of the embedded source of one unpadded row; a decoder prefix in a
prefilled cache (what PEFT does); prefixes of the other attentions in an attention function written out by hand.
"""

from typing import Any

import hf_cache
import pytest
import tiny
import torch
from families import build
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from softprompt import (
    KV,
    ConfigError,
    Embeddings,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)

FAMILIES = ("t5", "bart", "mbart", "pegasus", "blenderbot")
METHODS: dict[str, Any] = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    "p_tuning": lambda: PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix": lambda: PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
}


def make(family: str, config: Any) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(build(family, "SEQ_2_SEQ_LM"), config).eval()


def naive_logits(model: SoftPromptModel, source: Tensor, target: Tensor) -> Tensor:
    """Logits `[1, t, V]` of one row: source `[1, s]` and decoder input `[1, t]`."""
    base, prompt = model.get_base_model(), model.encoder().prompt()
    if isinstance(prompt, Embeddings):
        embedded = torch.cat([prompt.vectors, base.get_encoder().get_input_embeddings()(source)], dim=1)
        return base(inputs_embeds=embedded, decoder_input_ids=target, use_cache=False).logits
    assert not prompt.cross and not prompt.encoder
    own = DynamicCache()
    for index, (key, value) in enumerate(prompt.layers):
        own.update(key, value, index)
    cache = EncoderDecoderCache(own, DynamicCache())
    return base(input_ids=source, decoder_input_ids=target, **hf_cache.given(base, cache)).logits


def batch_of(side: str) -> tuple[dict[str, Tensor], Tensor]:
    """Ragged sources padded on a side, and targets with −100 behind their ends."""
    source = tiny.ragged((3, 6, 5), side=side)
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100], [9, 10, 2, -100]])
    return source, labels


def shifted_right(base: PreTrainedModel, labels: Tensor) -> Tensor:
    """The decoder's input for these labels: its start token first, or the family's own rule."""
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return base.prepare_decoder_input_ids_from_labels(labels=labels)
    start = torch.full_like(labels[:, :1], base.config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1]], dim=1).masked_fill(
        torch.cat([start, labels[:, :-1]], dim=1) == -100, base.config.pad_token_id
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_equal_single_rows(family: str, method: str, side: str) -> None:
    model = make(family, METHODS[method]())
    source, labels = batch_of(side)
    base = model.get_base_model()
    shifted = shifted_right(base, labels)
    out = model(**source, labels=labels)
    total, count = torch.zeros(()), 0
    for row, (ids, mask) in enumerate(zip(source["input_ids"], source["attention_mask"], strict=True)):
        expected = naive_logits(model, ids[mask.bool()][None], shifted[row][None])
        torch.testing.assert_close(out.logits[row], expected[0], atol=2e-5, rtol=1e-4)
        total = total + cross_entropy(expected[0], labels[row], ignore_index=-100, reduction="sum")
        count += int((labels[row] != -100).sum())
    torch.testing.assert_close(out.loss, total / count, atol=1e-5, rtol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    expected_gradients = torch.autograd.grad(total / count, parameters)
    for got, wanted in zip(torch.autograd.grad(out.loss, parameters), expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-3)
    assert out.encoder_last_hidden_state.shape[1] == source["input_ids"].shape[1]


@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_batch_equals_single_rows_and_the_plain_way(family: str, method: str, beams: int) -> None:
    model = make(family, METHODS[method]())
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "min_new_tokens": 5}
    for side in ("left", "right"):
        source, _ = batch_of(side)
        together = model.generate(**source, **options)
        for row, (ids, mask) in enumerate(zip(source["input_ids"], source["attention_mask"], strict=True)):
            alone = model.generate(input_ids=ids[mask.bool()][None], **options)
            assert torch.equal(together[row], alone[0])
            if beams == 1:
                tokens = alone[:, :1]
                for _ in range(5):
                    following = naive_logits(model, ids[mask.bool()][None], tokens)[:, -1]
                    following[:, _ends(model.get_base_model())] = -torch.inf
                    tokens = torch.cat([tokens, following.argmax(-1, keepdim=True)], dim=1)
                assert torch.equal(alone, tokens[:, : alone.shape[1]])


def _ends(base: PreTrainedModel) -> list[int]:
    assert base.generation_config is not None
    end = base.generation_config.eos_token_id
    return end if isinstance(end, list) else [end] if end is not None else []


THREE = {"decoder_prefix": True, "cross_prefix": True, "encoder_prefix": True}


@pytest.mark.pairwise
@pytest.mark.parametrize("parts", [("decoder",), ("cross",), ("encoder",), ("decoder", "cross", "encoder")], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_prefix_reaches_its_attention(
    family: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against attention written out by hand, in which a layer's own keys follow its part of the prefix."""
    flags: dict[str, Any] = {f"{part}_prefix": part in parts for part in ("decoder", "cross", "encoder")}
    model = make(family, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, **flags))
    prompt = model.encoder().prompt()
    assert isinstance(prompt, KV)
    assert [bool(prompt.layers), bool(prompt.cross), bool(prompt.encoder)] == [
        part in parts for part in ("decoder", "cross", "encoder")
    ]
    for side in ("left", "right"):
        source, labels = batch_of(side)
        out = model(**source, labels=labels).logits
        shifted = shifted_right(model.get_base_model(), labels)
        with by_hand(model, prompt, monkeypatch):
            for row, (ids, mask) in enumerate(zip(source["input_ids"], source["attention_mask"], strict=True)):
                expected = model.get_base_model()(
                    input_ids=ids[mask.bool()][None], decoder_input_ids=shifted[row][None], use_cache=False
                )
                torch.testing.assert_close(out[row], expected.logits[0], atol=2e-5, rtol=1e-4)
    plain = make(family, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    with plain.disable_adapter():
        bare = plain(**source, labels=labels).logits
    assert (out - bare).abs().max() > 1e-4


class by_hand:
    """Eager attention of every layer replaced: prefix keys concatenated, T5's bias looked up at −p…−1."""

    def __init__(self, model: SoftPromptModel, prompt: KV, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.functions, self.patch = ALL_ATTENTION_FUNCTIONS, monkeypatch
        base = model.get_base_model()
        self.base, self.shift = base, prompt.length if prompt.layers else 0
        self.prefix: dict[Any, tuple[Tensor, Tensor]] = {}
        stacks = ((base.get_decoder(), prompt.layers, prompt.cross), (base.get_encoder(), prompt.encoder, ()))
        for stack, own, cross in stacks:
            modules = [m for n, m in stack.named_modules() if n.endswith(("self_attn", "SelfAttention"))]
            others = [m for n, m in stack.named_modules() if n.endswith(("encoder_attn", "EncDecAttention"))]
            self.prefix.update(zip(modules, own, strict=False))
            self.prefix.update(zip(others, cross, strict=False))

    def __enter__(self) -> None:
        before = self.base.config._attn_implementation
        self.patch.setitem(self.functions._global_mapping, "sdpa", self.attend)
        self.before = before
        self.handles = []
        for name, table in self.base.get_decoder().named_modules():
            if name == "embed_positions" and self.shift:
                self.handles.append(table.register_forward_pre_hook(self.later, with_kwargs=True))

    def later(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + self.shift}

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()
        for handle in self.handles:
            handle.remove()

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        queries, keys = query.shape[2], key.shape[2]
        scores = query @ key.transpose(2, 3) * options.get("scaling", 1.0)
        if options.get("position_bias") is not None:
            scores = scores + options["position_bias"]
        if getattr(module, "is_causal", False):
            scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), -torch.inf)
        if module in self.prefix:
            more_key, more_value = self.prefix[module]
            count = more_key.shape[2]
            more = query @ more_key.transpose(2, 3) * options.get("scaling", 1.0)
            if options.get("position_bias") is not None:
                more = more + self.bias(module, queries, count)
            scores, value = torch.cat([more, scores], dim=-1), torch.cat([more_value, value], dim=2)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    def bias(self, module: Any, queries: int, count: int) -> Tensor | float:
        stack = self.base.get_decoder() if module.is_decoder else self.base.get_encoder()
        own = [m for n, m in stack.named_modules() if n.endswith("SelfAttention")]
        if module not in own:
            return 0.0
        relative = torch.arange(-count, 0)[None] - torch.arange(queries)[:, None]
        bucket = module._relative_position_bucket(
            relative,
            not module.is_decoder,
            module.relative_attention_num_buckets,
            module.relative_attention_max_distance,
        )
        return own[0].relative_attention_bias(bucket).permute(2, 0, 1)[None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_three_prefixes_under_gradient_checkpointing(family: str, reentrant: bool) -> None:
    source, labels = batch_of("left")
    gradients = []
    for checkpointing in (False, True):
        model = make(family, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, **THREE))
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        model(**source, labels=labels).loss.backward()
        gradients.append(next(iter(model.prompt_encoder["default"].parameters())).grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


def test_encoder_outputs_without_the_prompt_are_refused() -> None:
    model = make("t5", METHODS["prompt_tuning"]())
    source, labels = batch_of("right")
    outputs = model.get_base_model().get_encoder()(**source)
    with pytest.raises(ConfigError, match=r"without the prompt; pass input_ids"):
        model(encoder_outputs=outputs, attention_mask=source["attention_mask"], labels=labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_prefixes_are_saved_and_loaded(family: str, tmp_path: Any) -> None:
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, **THREE)
    model = make(family, config)
    source, labels = batch_of("left")
    expected = model(**source, labels=labels).logits
    model.save_pretrained(tmp_path)
    loaded = SoftPromptModel.from_pretrained(build(family, "SEQ_2_SEQ_LM"), tmp_path)
    assert torch.equal(loaded(**source, labels=labels).logits, expected)


def test_generate_leaves_the_model_unchanged_when_it_raises() -> None:
    model = make("bart", METHODS["prompt_tuning"]())
    base = model.get_base_model()
    source, _ = batch_of("right")
    before = base.generate(**source, max_new_tokens=3)
    with pytest.raises(ValueError, match="no_such_option"):
        model.generate(**source, no_such_option=1)
    assert torch.equal(base.generate(**source, max_new_tokens=3), before)
    row = source["input_ids"][1:2]  # without padding
    assert torch.equal(model.generate(row, max_new_tokens=3), model.generate(input_ids=row, max_new_tokens=3))


def test_a_source_beyond_the_learned_positions_is_refused() -> None:
    model = make("bart", METHODS["prompt_tuning"]())
    limit = model.get_base_model().config.max_position_embeddings
    ids = torch.full((1, limit - 3), 5)
    with pytest.raises(ConfigError, match=rf"{limit + 1} tokens, the virtual ones included.*{limit} learned"):
        model(input_ids=ids, labels=torch.tensor([[5, 6]]))
    model(input_ids=ids[:, 1:], labels=torch.tensor([[5, 6]]))
