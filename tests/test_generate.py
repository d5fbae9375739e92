"""`generate` with a prompt in front: every way of decoding gives what the plain model does with it in its cache.

The reference is transformers itself, over a row that starts with p stand-in tokens whose keys and values are the folded
prompt's, held in a plain cache.
"""

from collections.abc import Callable
from threading import Thread
from typing import Any

import hf_cache
import naive
import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from softprompt import (
    ConfigError,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)

COUNT, NEW = 5, 8
METHODS: dict[str, Callable[[], Any]] = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT),
    "p_tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, encoder_hidden_size=16),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT),
    "prefix_ffn": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=COUNT, prefix_projection=True, encoder_hidden_size=16
    ),
}
TWO_KINDS = ("prompt_tuning", "prefix")
FEW = ("gpt2", "llama", "gemma3")


def make(family: str, method: str, **overrides: Any) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.build(family, **overrides), METHODS[method]()).eval()


def ids_of(length: int = 6, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length))


def ours(model: SoftPromptModel, ids: Tensor, **options: Any) -> Any:
    """What comes after `ids`, with a full mask."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return out if options.get("return_dict_in_generate") else out[:, ids.shape[1] :]


def reference(model: SoftPromptModel, ids: Tensor, **options: Any) -> Tensor:
    """The same by the plain model: p stand-in tokens that are in the cache already, then `ids`."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    base, kv = model.get_base_model(), model.fold()
    copies = options.get("num_beams", 1) if options.get("num_beams", 1) > 1 else options.get("num_return_sequences", 1)
    cache = DynamicCache(config=base.config)
    for index, (key, value) in enumerate(kv.layers):
        rows = ids.shape[0] * copies
        cache.update(key.expand(rows, -1, -1, -1).clone(), value.expand(rows, -1, -1, -1).clone(), index)
    stand_in = torch.full((ids.shape[0], COUNT), tiny.PAD)
    whole = torch.cat([stand_in, ids], dim=1)
    out = base.generate(
        input_ids=whole, attention_mask=torch.ones_like(whole), **hf_cache.given(base, cache), **options
    )
    return out[:, whole.shape[1] :]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "beam_several": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "sample": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "sample_several": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "no_repeat": {"no_repeat_ngram_size": 2},
    "eos": {"eos_token_id": list(range(3, 60)), "pad_token_id": 0},
    "min_length": {"eos_token_id": list(range(3, 200)), "pad_token_id": 0, "min_new_tokens": 4},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FEW)
def test_every_way_of_decoding_equals_the_plain_models(family: str, method: str, way: str) -> None:
    model, ids = make(family, method), ids_of(rows=2)
    torch.manual_seed(7)
    expected = reference(model, ids, **WAYS[way])
    torch.manual_seed(7)
    assert torch.equal(ours(model, ids, **WAYS[way]), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_matters(method: str) -> None:
    model, ids = make("llama", method), ids_of()
    with model.disable_adapter():
        plain = ours(model, ids)
    assert not torch.equal(ours(model, ids), plain)


def test_a_repetition_penalty_sees_real_tokens_only() -> None:
    """The stand-in tokens of the reference would be penalised, so this one is done by hand."""
    model, ids = make("llama", "prefix"), ids_of()
    row = ids.clone()
    for _ in range(NEW):
        scores = naive.logits(model, row)[0][:, -1]
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, row, True)
        penalised = torch.where(scores < 0, scores * 1.7, scores / 1.7)
        row = torch.cat([row, torch.where(seen, penalised, scores).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ours(model, ids, repetition_penalty=1.7), row[:, ids.shape[1] :])


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.DECODERS + tiny.MORE_DECODERS)
def test_left_padded_rows_equal_single_rows(family: str, method: str) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    single = [ours(model, row) for row in naive.rows(batch)]
    assert torch.equal(together, torch.cat(single))


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "offloaded"} if torch.cuda.is_available() else {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: "-".join(str(part) for pair in options.items() for part in pair),
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FEW)
def test_other_caches_and_none_give_the_same_tokens(family: str, method: str, options: dict[str, Any]) -> None:
    model, ids = make(family, method), ids_of()
    if "prompt_lookup_num_tokens" in options:
        ids = ids.repeat(1, 3)  # something to look up
    assert torch.equal(ours(model, ids, **options), ours(model, ids))


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_static_cache_with_padding(method: str) -> None:
    model, batch = make("llama", method), tiny.ragged(side="left")
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("method", TWO_KINDS)
def test_an_assistant_drafts(method: str) -> None:
    model, ids = make("llama", method), ids_of()
    for seed in (0, 1):  # one that drafts as the plain model would, and one that does not
        draft = tiny.build("llama", seed=seed)
        assert torch.equal(ours(model, ids, assistant_model=draft), ours(model, ids))


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FEW)
def test_a_second_turn_on_the_same_cache(family: str, method: str, backend: str) -> None:
    model, ids = make(family, method, attn_implementation=backend), ids_of()
    first = ours(model, ids, return_dict_in_generate=True)
    assert hf_cache.of(first).get_seq_length() == ids.shape[1] + NEW - 1  # real tokens only
    more = torch.cat([first.sequences, ids_of(4)], dim=1)
    expected = ours(model, more)
    assert torch.equal(ours(model, more, **hf_cache.given(model, hf_cache.of(first))), expected)


@pytest.mark.parametrize("method", TWO_KINDS)
def test_scores_are_those_of_forward(method: str) -> None:
    model, ids = make("gpt2", method), ids_of(rows=2)
    out = ours(model, ids, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert len(out.scores) == NEW
    logits = model(input_ids=out.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(out.scores, dim=1), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", TWO_KINDS)
def test_states_and_attentions_cover_real_tokens(method: str) -> None:
    model, ids = make("llama", method, attn_implementation="eager"), ids_of()
    out = ours(model, ids, return_dict_in_generate=True, output_hidden_states=True, output_attentions=True)
    assert out.hidden_states[0][-1].shape[:2] == (1, 6)
    assert out.attentions[0][0].shape == (1, 4, 6, 6)
    assert out.attentions[2][0].shape == (1, 4, 1, 8)


@pytest.mark.parametrize("method", METHODS)
def test_lengths_count_real_tokens(method: str) -> None:
    model, ids = make("llama", method), ids_of()
    assert ours(model, ids, max_new_tokens=None, max_length=9).shape == (1, 3)
    assert ours(model, ids, max_new_tokens=1).shape == (1, 1)
    eos = {"eos_token_id": list(range(3, tiny.VOCAB)), "pad_token_id": 0}
    assert ours(model, ids, min_length=9, **eos).shape[1] >= 3


@pytest.mark.parametrize("method", TWO_KINDS)
def test_stopping_criteria_see_real_tokens(method: str) -> None:
    seen: list[Tensor] = []

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            seen.append(input_ids)
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)

    model, ids = make("llama", method), ids_of()
    out = ours(model, ids, stopping_criteria=StoppingCriteriaList([Stop()]))
    assert out.shape == (1, 3)
    assert torch.equal(seen[0][:, :6], ids)


@pytest.mark.parametrize("method", TWO_KINDS)
def test_stop_strings(method: str) -> None:
    model, ids, tokenizer = make("llama", method), ids_of(), tiny.tokenizer()
    pieces = [tokenizer.decode([token]) for token in ours(model, ids)[0].tolist()]
    number, text = next((n, piece) for n, piece in enumerate(pieces[:-1]) if piece.strip() and piece.isascii())
    out = ours(model, ids, stop_strings=[text], tokenizer=tokenizer)
    assert out.shape[1] <= number + 1


@pytest.mark.parametrize("method", METHODS)
def test_streaming_from_a_thread(method: str) -> None:
    model, ids, tokenizer = make("llama", method), ids_of(), tiny.tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "streamer": streamer}
    thread = Thread(target=model.generate, args=(ids,), kwargs={"attention_mask": torch.ones_like(ids), **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(ours(model, ids)[0])
    assert model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", TWO_KINDS)
def test_two_threads_generate_at_once(method: str) -> None:
    model, inputs = make("llama", method), [ids_of(4), ids_of(7)]
    expected = [ours(model, ids, max_new_tokens=24) for ids in inputs]
    got: dict[int, Tensor] = {}

    def work(index: int) -> None:
        got[index] = ours(model, inputs[index], max_new_tokens=24)

    threads = [Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert torch.equal(got[index], expected[index])


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FEW)
def test_from_embedded_inputs(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of()
    embedded = model.get_base_model().get_input_embeddings()(ids)
    out = model.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(out, ours(model, ids))


def test_ids_by_position_and_by_each_name() -> None:
    model, ids = make("gpt2", "prefix"), ids_of()
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    by_position = model.generate(ids, **options)
    assert torch.equal(by_position, model.generate(input_ids=ids, **options))
    assert torch.equal(by_position, model.generate(inputs=ids, **options))


@pytest.mark.parametrize("method", METHODS)
def test_training_mode_has_no_say(method: str) -> None:
    """Dropout on the prefix is for training steps; `generate` in between sees the prompt as it is."""
    torch.manual_seed(0)
    config = METHODS[method]()
    if "prefix" in method:
        from dataclasses import replace

        config = replace(config, prefix_dropout=0.5)
    model, ids = get_peft_model(tiny.build("llama"), config).eval(), ids_of()
    expected = ours(model, ids)
    model.train()
    assert torch.equal(ours(model, ids), expected)
    assert model.encoder().training


@pytest.mark.parametrize("method", TWO_KINDS)
def test_the_active_adapter_generates(method: str) -> None:
    model, ids = make("llama", method), ids_of()
    first = ours(model, ids)
    model.add_adapter("other", PrefixTuningConfig(num_virtual_tokens=3))
    assert torch.equal(ours(model, ids), first)
    model.set_adapter("other")
    assert torch.equal(ours(model, ids), naive.greedy(model, ids, NEW))
    model.set_adapter("default")
    assert torch.equal(ours(model, ids), first)


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_running_out_of_learned_positions(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of(150)
    assert ours(model, ids, max_new_tokens=6).shape == (1, 6)  # the last token needs no position
    with pytest.raises(ConfigError, match=r"161 tokens.*160 learned positions.*shorten"):
        ours(model, ids, max_new_tokens=7)
    with pytest.raises(ConfigError, match="160 learned positions"):
        ours(model, ids_of(156))
    assert model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_sliding_window_while_generating(method: str) -> None:
    model, batch = make("mistral", method, sliding_window=6), tiny.ragged((5, 11, 8), side="left")
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **options)[:, 11:]
    assert torch.equal(together, model.generate(**batch, use_cache=False, **options)[:, 11:])
    assert torch.equal(together, torch.cat([ours(model, row) for row in naive.rows(batch)]))
    static = model.generate(**batch, cache_implementation="static", **options)[:, 11:]
    assert torch.equal(together, static)


def test_bfloat16() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("llama").to(torch.bfloat16), METHODS["prefix"]()).eval()
    ids = ids_of()
    assert torch.equal(ours(model, ids), reference(model, ids))
