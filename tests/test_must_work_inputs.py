"""What callers may give and what models may be: windows, layers of different shapes, masks, positions, names of enums.

The reference is the plain formulation of `naive.py`, PEFT where the same is meant, or a mask written out by hand.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_cache
import naive
import peft
import pytest
import tiny
import torch
import transformers as hf
from families import FAMILIES, build
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from softprompt import (
    KV,
    ConfigError,
    PrefixTuningConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]
COUNT = 4
TWO_KINDS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=COUNT, **more),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=COUNT, **more),
}
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}


def ids_of(length: int = 6, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB - 8, (rows, length))


# ---- sliding windows ---------------------------------------------------------------------------------------------

WINDOWS = ("mistral_window", "gemma2", "gemma3", "cohere2", "gpt_oss")  # of 5 tokens
LONG = (3, 14, 9)


@pytest.mark.pairwise
@pytest.mark.parametrize("count", [2, 4, 7])
@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
@pytest.mark.parametrize("family", WINDOWS)
def test_past_a_window_the_prompt_is_seen_as_in_peft(family: str, method: str, count: int, tmp_path: Path) -> None:
    """One row at a time and without padding, where PEFT counts as it should; ours is one padded batch."""
    import softprompt

    config = getattr(softprompt, method)(task_type="CAUSAL_LM", num_virtual_tokens=count)
    ours = get_peft_model(build(family, "CAUSAL_LM"), config).eval()
    ours.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(build(family, "CAUSAL_LM"), str(tmp_path)).eval()
    batch = tiny.ragged(LONG, side="left")
    with torch.no_grad():
        logits = ours(**batch).logits
        tokens = ours.generate(**batch, max_new_tokens=8, **PLAIN)[:, -8:]
        for row, (ids, mask) in enumerate(zip(naive.rows(batch), batch["attention_mask"], strict=True)):
            seen = torch.ones_like(ids)
            expected = theirs(input_ids=ids, attention_mask=seen).logits[:, -ids.shape[1] :]
            torch.testing.assert_close(logits[row][mask.bool()], expected[0], atol=1e-5, rtol=1e-4)
            if "cache" in hf_cache.given(ours, None):  # peft 0.21 loses its prompt in the generate of transformers 5.24
                written = naive.greedy(ours, ids, 8)
            else:
                written = theirs.generate(input_ids=ids, attention_mask=seen, max_new_tokens=8, **PLAIN)
            assert torch.equal(written[0, -8:], tokens[row])


def always_visible(family: str) -> SoftPromptModel:
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, prefix_always_visible=True)
    return get_peft_model(build(family, "CAUSAL_LM"), config).eval()


def seen_always(model: SoftPromptModel, ids: Tensor) -> Tensor:
    """Logits of one row `[1, t]` with a mask by hand: a window over the row's own tokens, and all of the prefix."""
    base, prompt, length = model.get_base_model(), model.encoder().prompt(), ids.shape[1]
    assert isinstance(prompt, KV)
    cache = DynamicCache()  # of plain layers, which forget nothing
    for index, (key, value) in enumerate(prompt.layers):
        cache.update(key, value, index)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    masks = {}
    for kind, window in (("full_attention", length), ("sliding_attention", base.config.sliding_window)):
        own = (distance >= 0) & (distance < window)
        masks[kind] = as_mask(torch.cat([torch.ones(length, COUNT, dtype=torch.bool), own], dim=1), "float")
    given = masks["sliding_attention"] if base.config.model_type == "mistral" else masks
    positions = COUNT + torch.arange(length)[None]
    return base(input_ids=ids, **hf_cache.given(base, cache), position_ids=positions, attention_mask=given).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", WINDOWS)
def test_a_prefix_that_is_always_visible(family: str, side: str) -> None:
    model, batch = always_visible(family), tiny.ragged(LONG, side=side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    result = model(**batch, labels=labels)
    total, count = torch.zeros(()), 0
    for row, (ids, mask) in enumerate(zip(naive.rows(batch), batch["attention_mask"], strict=True)):
        expected = seen_always(model, ids)
        torch.testing.assert_close(result.logits[row][mask.bool()], expected[0], atol=1e-5, rtol=1e-4)
        total = total + cross_entropy(expected[0, :-1], ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    torch.testing.assert_close(result.loss, total / count, atol=1e-5, rtol=1e-5)
    parameters = [each for each in model.parameters() if each.requires_grad]
    wanted = torch.autograd.grad(total / count, parameters)
    for got, want in zip(torch.autograd.grad(result.loss, parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)


@pytest.mark.pairwise
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("family", WINDOWS)
def test_generating_with_a_prefix_that_is_always_visible(family: str, options: dict[str, Any]) -> None:
    model, batch = always_visible(family), tiny.ragged(LONG, side="left")
    tokens = model.generate(**batch, max_new_tokens=8, **PLAIN, **options)[:, -8:]
    with torch.no_grad():
        for row, ids in enumerate(naive.rows(batch)):
            for _ in range(8):
                ids = torch.cat([ids, seen_always(model, ids)[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(tokens[row], ids[0, -8:])


def test_what_is_always_visible_stays_so_when_loaded(tmp_path: Path) -> None:
    model, batch = always_visible("mistral_window"), tiny.ragged(LONG)
    model.save_pretrained(tmp_path)
    loaded = SoftPromptModel.from_pretrained(build("mistral_window", "CAUSAL_LM"), tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    torch.manual_seed(0)
    usual = get_peft_model(build("mistral_window", "CAUSAL_LM"), TWO_KINDS["prefix"](task_type="CAUSAL_LM")).eval()
    assert (usual(**batch).logits[1] - model(**batch).logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "bloom", "bert", "t5"])
def test_without_a_window_nothing_needs_to_be_always_visible(family: str) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=COUNT, prefix_always_visible=True)
    with pytest.raises(ConfigError, match="prefix_always_visible is for models with a sliding window"):
        get_peft_model(build(family, FAMILIES[family].tasks[0]), config)


# ---- layers of different shapes ----------------------------------------------------------------------------------


def gemma4(**more: Any) -> PreTrainedModel:
    """Sliding layers with two heads of 8, full ones with one head of 16."""
    options: dict[str, Any] = {
        **tiny.GQA,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 5,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "vocab_size_per_layer_input": tiny.VOCAB,
        "hidden_size_per_layer_input": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(hf.Gemma4TextConfig(**{**options, **more}))
        tiny.perturb(model)
    return model.eval().double()  # its layers add up to numbers that float32 rounds visibly


LOOKED_UP = {"hidden_size_per_layer_input": 4}  # every layer looks the ids up in a table of its own
SHARING = {**LOOKED_UP, "num_kv_shared_layers": 2}  # and the last two layers use the keys of the first two
NARROW, WIDE = (2, 8), (1, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "shapes"),
    [("prompt_tuning", {}, [NARROW, WIDE] * 2), ("prefix", {}, [NARROW, WIDE] * 2),
     ("prefix", LOOKED_UP, [NARROW, WIDE] * 2), ("prefix", SHARING, [NARROW, WIDE])],
)  # fmt: skip
def test_layers_of_different_shapes(method: str, options: Any, shapes: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(gemma4(**options), TWO_KINDS[method](task_type="CAUSAL_LM")).eval()
    assert [(key.shape[1], key.shape[3]) for key, _ in model.fold().layers] == shapes
    batch = tiny.ragged(LONG, side="left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    result = model(**batch, labels=labels)
    for row, (ids, mask) in enumerate(zip(naive.rows(batch), batch["attention_mask"], strict=True)):
        torch.testing.assert_close(
            result.logits[row][mask.bool()], naive.logits(model, ids)[0][0], atol=1e-5, rtol=1e-4
        )
    expected = naive.loss(model, batch, labels)
    torch.testing.assert_close(result.loss, expected, atol=1e-5, rtol=1e-5, check_dtype=False)
    parameters = [each for each in model.parameters() if each.requires_grad]
    wanted = torch.autograd.grad(expected, parameters)
    for got, want in zip(torch.autograd.grad(result.loss, parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        written = torch.cat([naive.greedy(model, row, 6) for row in naive.rows(batch)])
        caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
        for more in caches:
            assert torch.equal(model.generate(**batch, max_new_tokens=6, **PLAIN, **more)[:, -6:], written)
        row = naive.rows(batch)[1]
        drafted = model.generate(row, max_new_tokens=6, prompt_lookup_num_tokens=3, **PLAIN)[:, -6:]
        assert torch.equal(drafted, written[1:2])
    model.save_pretrained(tmp_path)
    loaded = SoftPromptModel.from_pretrained(gemma4(**options), tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_vectors_where_layers_look_ids_up_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"takes no vectors in place of words \(.*; use prefix_tuning"):
        get_peft_model(gemma4(**LOOKED_UP), TWO_KINDS["prompt_tuning"]())


# ---- masks and positions -----------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_square_masks_of_encoders(family: str, method: str, kind: str) -> None:
    """A mask of the caller's in which the tokens of a row's two halves do not see each other; all see the prompt."""
    torch.manual_seed(0)
    model = get_peft_model(build(family, "TOKEN_CLS"), TWO_KINDS[method](task_type="TOKEN_CLS")).eval()
    ids, half = ids_of(6), torch.arange(6) < 3
    visible = half[:, None] == half[None]
    got = model(input_ids=ids, attention_mask=as_mask(visible, kind)).logits
    base, prompt = model.get_base_model(), model.encoder().prompt()
    if isinstance(prompt, KV):
        apart = [model(input_ids=part, position_ids=at) for part, at in halves(model, ids)]
        torch.testing.assert_close(got, torch.cat([each.logits for each in apart], dim=1), atol=1e-5, rtol=1e-4)
    else:
        whole = torch.ones(COUNT + 6, COUNT + 6, dtype=torch.bool)
        whole[COUNT:, COUNT:] = visible
        embedded = torch.cat([prompt.vectors, base.get_input_embeddings()(ids)], dim=1)
        expected = base(inputs_embeds=embedded, attention_mask=as_mask(whole, kind)).logits[:, COUNT:]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (got - model(input_ids=ids).logits).abs().max() > 1e-3


def as_mask(visible: Tensor, kind: str) -> Tensor:
    if kind == "bool":
        return visible[None, None]
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


def halves(model: SoftPromptModel, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    positions = torch.arange(6)[None] + model.facts.position_offset
    yield from zip(ids.split(3, dim=1), positions.split(3, dim=1), strict=True)


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_square_masks_of_encoder_decoders(family: str, method: str, kind: str) -> None:
    """Of the encoder's rows, in which its two halves do not see each other; of what is written, causal as ever."""
    torch.manual_seed(0)
    model = get_peft_model(build(family, "SEQ_2_SEQ_LM"), TWO_KINDS[method](task_type="SEQ_2_SEQ_LM")).eval()
    base, prompt, ids, written = model.get_base_model(), model.encoder().prompt(), ids_of(), ids_of()
    half = torch.arange(6) < 3
    visible, causal = half[:, None] == half[None], torch.ones(6, 6, dtype=torch.bool).tril()
    own = {"decoder_input_ids": written, "decoder_attention_mask": as_mask(causal, kind)}
    got = model(input_ids=ids, attention_mask=as_mask(visible, kind), **own).logits
    if isinstance(prompt, KV):
        with naive.keys_in_front(base, prompt):
            expected = base(input_ids=ids, attention_mask=as_mask(visible, kind), decoder_input_ids=written).logits
    else:
        whole = torch.ones(COUNT + 6, COUNT + 6, dtype=torch.bool)
        whole[COUNT:, COUNT:] = visible
        embedded = torch.cat([prompt.vectors, base.get_input_embeddings()(ids)], dim=1)
        encoded = base.get_encoder()(inputs_embeds=embedded, attention_mask=as_mask(whole, kind))
        seen = torch.cat([torch.ones(6, COUNT, dtype=torch.bool), visible], dim=1)  # by row of what is written
        expected = base(encoder_outputs=encoded, attention_mask=as_mask(seen, kind), decoder_input_ids=written).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padding_of_what_is_written(family: str, method: str) -> None:
    """Behind its end it changes nothing; before its beginning a prefix would stand at other distances in each row."""
    model = get_peft_model(build(family, "SEQ_2_SEQ_LM"), TWO_KINDS[method](task_type="SEQ_2_SEQ_LM")).eval()
    batch, written = tiny.ragged(side="left"), tiny.ragged((5, 2, 3), seed=1)
    names = {"input_ids": "decoder_input_ids", "attention_mask": "decoder_attention_mask"}
    out = model(**batch, **{names[name]: value for name, value in written.items()}).logits
    for row, (ids, target) in enumerate(zip(naive.rows(batch), naive.rows(written), strict=True)):
        expected = naive.run(model.get_base_model(), model.encoder().prompt(), ids, decoder_input_ids=target)["logits"]
        torch.testing.assert_close(out[row, : target.shape[1]], expected[0], atol=2e-5, rtol=1e-4)
    left = {names[name]: value for name, value in tiny.ragged((5, 2, 3), side="left").items()}
    if method == "prefix":
        with pytest.raises(ConfigError, match=r"decoder_attention_mask hides the beginning.*pad .* on the right"):
            model(**batch, **left)


def test_a_mask_of_four_dimensions_in_whole_numbers_is_refused() -> None:
    """torch refuses it without a prompt; added to the scores it would hide nothing."""
    model = get_peft_model(tiny.build("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    ids, seen = torch.tensor([[5, 6, 7]]), torch.ones(1, 1, 3, 3).tril()
    with pytest.raises(ConfigError, match=r"attention_mask of four dimensions cannot be of torch\.int64"):
        model(input_ids=ids, attention_mask=seen.long())
    torch.testing.assert_close(model(input_ids=ids, attention_mask=seen.bool()).logits, model(input_ids=ids).logits)
