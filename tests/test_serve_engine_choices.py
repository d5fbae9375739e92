"""How tokens are chosen in a batch of requests that all want something else, and what ends or refuses a request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from serve_kit import Served, answer, rows, running, serve, text_of, together, tokens_of

from softprompt import ConfigError, PromptTuningConfig, SoftPromptError, UnsupportedError
from softprompt.serve.batching import TransformersEngine
from softprompt.serve.engine import EngineError, Piece, Sampling
from softprompt.serve.sampling import Sampler, choose

DRAWN: dict[str, Any] = {"temperature": 0.9, "max_tokens": 10, "ignore_eos": True}


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return serve(tiny.build("gpt2"), tmp_path)


def scores_of(served: Served, name: str | None, ids: list[int], generated: list[int]) -> torch.Tensor:
    """The scores `[n, V]` before each generated token, from one plain forward pass."""
    row = torch.tensor([ids + generated])
    with torch.no_grad():
        logits = served.model(input_ids=row, adapter_names=[name or "__base__"]).logits[0]
    return logits[len(ids) - 1 : -1]


# ---- chance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"top_p": 0.7}, {"top_k": 5}, {"top_k": 30, "top_p": 0.9}])
def test_a_seed_means_the_same_alone_and_among_others(served: Served, tmp_path: Path, more: dict[str, Any]) -> None:
    texts = rows(6)
    seeded = [served.ask("kv", texts[0], seed=seed, **DRAWN, **more) for seed in (7, 8, 7)]
    names = ["words", None, "mlp", "first"]
    others = [served.ask(name, ids, **DRAWN) for name, ids in zip(names, texts[1:5], strict=True)]
    first, second, *_, third = together(served.engine, [*seeded[:2], *others, seeded[2]])
    again = together(TransformersEngine(served.engine.base, tiny.tokenizer()), [seeded[0]])[0]
    assert tokens_of(first) == tokens_of(again) == tokens_of(third) != tokens_of(second)
    assert len(tokens_of(first)) == 10


def test_without_a_seed_answers_differ(served: Served) -> None:
    asks = [served.ask("words", rows(1)[0], **DRAWN)] * 4
    assert len({tuple(tokens_of(each)) for each in together(served.engine, asks)}) == 4


def test_top_k_of_one_and_little_top_p_are_greedy(served: Served) -> None:
    ids = rows(1)[0]
    least = {"top_k": 1, "top_p": 5e-324, "temperature": 2.0}  # a share of which rounds to nothing
    asks = [
        served.ask("kv", ids, **{"temperature": 1.0, "max_tokens": 8, **each})
        for each in ({"top_k": 1}, {"top_p": 1e-9}, least)
    ]
    for pieces in together(served.engine, [*asks, served.ask(None, ids, **DRAWN)])[:3]:
        assert tokens_of(pieces) == served.offline("kv", ids, 8)


def test_seeds_below_zero_are_others_than_above() -> None:
    assert len({Sampler(Sampling(1, seed=seed), ()).random.random() for seed in range(-3, 4)}) == 7


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"logprobs": 2}])
def test_scores_that_are_no_numbers_harm_their_own_row_only(bad: float, sampling: dict[str, Any]) -> None:
    scores = torch.zeros(3, 8)
    scores[0, 5] = scores[2, 6] = 40.0
    scores[1] = bad if bad < 0 else scores[1]
    scores[1, 2] = bad
    found = choose(scores, [Sampler(Sampling(1, **{"temperature": 0.0, **sampling}), ()) for _ in scores])
    assert [None if each is None else each.token for each in found] == [5, None, 6]


# ---- penalties and log-probabilities -------------------------------------------------------------------------------


def test_penalties(served: Served) -> None:
    """Against the formula, token by token; a row without any is untouched beside them."""
    ids = rows(1)[0]
    wanted: dict[str, Any] = {"presence_penalty": 0.4, "frequency_penalty": 0.3}
    asks = [served.ask("words", ids, max_tokens=24, ignore_eos=True, **wanted), served.ask("words", ids, max_tokens=24)]
    got, plain = (tokens_of(each) for each in together(served.engine, asks))
    scores = scores_of(served, "words", ids, got)
    for place, token in enumerate(got):
        adjusted = scores[place].clone()
        for known in set(got[:place]):
            adjusted[known] -= 0.4 + 0.3 * got[:place].count(known)
        assert int(adjusted.argmax()) == token
    assert plain == served.offline("words", ids, 24) != got[: len(plain)]


def test_logprobs_are_those_of_a_plain_forward_pass(served: Served) -> None:
    """The model's own, whatever temperature and penalties choose."""
    texts, names = rows(4, seed=3), ["kv", None, "words", "kv"]
    more: list[dict[str, Any]] = [
        {"logprobs": 3},
        {"logprobs": 5},
        {"logprobs": 0, **DRAWN, "presence_penalty": 1.0},
        {},
    ]
    asks = [served.ask(name, ids, **each) for name, ids, each in zip(names, texts, more, strict=True)]
    answers = together(served.engine, asks)
    for name, ids, each, pieces in zip(names[:3], texts, more, answers[:3], strict=False):
        tokens = tokens_of(pieces)
        expected = scores_of(served, name, ids, tokens).log_softmax(-1)
        found = [one for piece in pieces for one in piece.logprobs]
        assert [one.token_id for one in found] == tokens
        for place, one in enumerate(found):
            assert one.logprob == pytest.approx(float(expected[place, one.token_id]), abs=2e-4)
            values, top = expected[place].topk(each["logprobs"])
            assert [entry[0] for entry in one.top] == top.tolist()
            assert [entry[2] for entry in one.top] == pytest.approx(values.tolist(), abs=2e-4)
            assert all(isinstance(entry[1], str) for entry in one.top)
    assert not any(piece.logprobs for piece in answers[3])


# ---- stop strings --------------------------------------------------------------------------------------------------


def test_a_stop_string_across_tokens_ends_the_answer_before_it(served: Served) -> None:
    ids = rows(1)[0]
    plain = together(served.engine, [served.ask("kv", ids, max_tokens=24, ignore_eos=True)])[0]
    whole, parts = text_of(plain), [piece.text for piece in plain if piece.text]
    begin = whole.index(parts[1], len(parts[0]))
    stop = whole[begin - 1 : begin + 1]  # the end of one piece and the beginning of the next
    engine = TransformersEngine(served.engine.base, tiny.tokenizer())
    asks = [
        served.ask("kv", ids, max_tokens=24, ignore_eos=True, stop=("nothing like it", stop)),
        served.ask("kv", ids, max_tokens=24, ignore_eos=True, stop=(whole + "x",)),
    ]
    short, long = together(engine, asks)
    assert text_of(short) == whole[: whole.index(stop)] and short[-1].finish_reason == "stop"
    assert len(tokens_of(short)) < 24
    assert text_of(long) == whole and long[-1].finish_reason == "length"


# ---- prompts inside the rows ---------------------------------------------------------------------------------------


def test_a_prompt_in_a_template(served: Served, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, placement="template")
    served.model.add_adapter("slots", config)
    torch.nn.init.normal_(served.model.encoder("slots").embedding.weight)
    served.model.save_pretrained(tmp_path, selected_adapters=["slots"])
    version = served.versions["kv"]
    place = tmp_path / "slots"
    served.versions["slots"] = type(version)("slots", "d" * 64, place, place, "any", 3, slots=True)
    ids, slots = [5, 0, 9, 0, 0, 17], (-1, 0, -1, 1, 2, -1)
    served.model.set_adapter("slots", inference_mode=True)
    rest: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    row = torch.tensor([ids])
    mask = torch.ones_like(row)
    expected = served.model.generate(input_ids=row, attention_mask=mask, slots=torch.tensor([slots]), **rest)
    other = rows(1)[0]
    asks = [served.ask("kv", other), served.ask("slots", ids, slots), served.ask("slots", ids)]

    async def whole() -> list[Any]:
        return await asyncio.gather(*(answer(served.engine, ask) for ask in asks), return_exceptions=True)

    beside, filled, without = running(served.engine, whole)
    assert tokens_of(filled) == expected[0, len(ids) :].tolist()
    assert tokens_of(beside) == served.offline("kv", other)
    assert isinstance(without, ConfigError) and "slots" in str(without)


# ---- what is refused, and what fails -------------------------------------------------------------------------------


def refused(served: Served, **change: Any) -> str:
    given = {"name": "kv", "ids": [5, 6], **change}
    ask = served.ask(given.pop("name"), given.pop("ids"), given.pop("slots", ()), **given)
    with pytest.raises(ConfigError) as error:
        together(served.engine, [ask])
    return str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        *({"ids": ids} for ids in ([], [5, tiny.VOCAB], [-1], [5] * 150)),
        *({"temperature": each} for each in (float("nan"), -1.0)),
        *({"max_tokens": each} for each in (0, 160)),
        *({"top_p": 0.0}, {"top_k": -1}, {"logprobs": 321}, {"slots": (1,)}, {"min_tokens": 9}),
    ],
)
def test_what_can_never_run_is_refused(served: Served, change: dict[str, Any]) -> None:
    assert "\n" not in refused(served, **change)


def test_the_longest_that_fits(served: Served) -> None:
    """Virtual tokens, text and answer fill the model's positions to the last."""
    ids = [5] * (tiny.CONTEXT - 6 - 4)
    pieces = together(served.engine, [served.ask("kv", ids, max_tokens=4, ignore_eos=True)])[0]
    assert tokens_of(pieces) == served.offline("kv", ids, 4, eos_token_id=None)
    served.engine = TransformersEngine(served.engine.base, tiny.tokenizer())
    refused(served, ids=[*ids, 5], max_tokens=4)


def test_a_prompt_that_is_gone_is_its_own_requests_error(served: Served, tmp_path: Path) -> None:
    version = served.versions["kv"]
    served.versions["gone"] = type(version)("gone", "a" * 64, tmp_path / "gone", tmp_path, "any", 6)
    ids = rows(1)[0]

    async def whole() -> list[Any]:
        asks = [served.ask("gone", ids), served.ask("kv", ids)]
        return await asyncio.gather(*(answer(served.engine, ask) for ask in asks), return_exceptions=True)

    gone, fine = running(served.engine, whole)
    assert isinstance(gone, SoftPromptError) and "gone" in str(gone)
    assert tokens_of(fine) == served.offline("kv", ids)


def test_a_model_that_fails_ends_the_rows_it_fails_for(served: Served) -> None:
    """As when memory runs out: those under way end with an error, and the next are answered."""
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no memory\nand more")

    hook = served.engine.base.register_forward_pre_hook(fail)
    ids = rows(1)[0]

    async def whole() -> tuple[Any, str | None, list[Piece], str | None]:
        failed = (await asyncio.gather(answer(served.engine, served.ask(None, ids)), return_exceptions=True))[0]
        health = served.engine.health()
        return failed, health, await answer(served.engine, served.ask("kv", ids)), served.engine.health()

    failed, health, pieces, later = running(served.engine, whole)
    hook.remove()
    assert isinstance(failed, EngineError) and "no memory" in str(failed) and "\n" not in str(failed)
    assert health is not None and later is None
    assert tokens_of(pieces) == served.offline("kv", ids)


def test_a_model_that_has_failed_is_asked_until_it_answers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else may ask: balancers send nothing to a server that says it is not well."""
    monkeypatch.setattr("softprompt.serve.batching.AGAIN", 0.01)
    engine, out_of_memory = served.engine, True

    def fail(*_: Any) -> None:
        if out_of_memory:
            raise RuntimeError("no memory")

    async def until(well: bool) -> None:
        async with asyncio.timeout(10):
            while (engine.health() is None) != well:
                await asyncio.sleep(0.01)

    async def whole() -> None:
        nonlocal out_of_memory
        with pytest.raises(EngineError):
            await answer(engine, served.ask(None, [5, 6]))
        await until(False)
        await asyncio.sleep(0.1)
        assert "no memory" in str(engine.health())  # as long as that is so
        out_of_memory = False
        await until(True)

    hook = engine.base.register_forward_pre_hook(fail)
    running(engine, whole)
    hook.remove()


def test_stopping_ends_what_is_under_way_and_refuses_more(served: Served) -> None:
    engine = served.engine
    assert engine.health() is not None

    async def whole() -> Any:
        stream = engine.generate(served.ask("kv", rows(1)[0], max_tokens=100, ignore_eos=True))
        await anext(stream)
        await engine.stop()
        with pytest.raises(EngineError):
            async for _ in stream:
                pass
        with pytest.raises(EngineError):
            await answer(engine, served.ask("kv", [5]))

    running(engine, whole)
    assert engine.health() is not None


def test_time_is_up(served: Served) -> None:
    engine = TransformersEngine(served.engine.base, tiny.tokenizer(), timeout=0.0)
    pieces = together(engine, [served.ask("kv", [5, 6])])[0]
    assert pieces[-1].finish_reason == "timeout" and not tokens_of(pieces)


def test_models_it_cannot_serve() -> None:
    import families

    for kind, task in (("bert", "MASKED_LM"), ("mamba", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")):
        with pytest.raises(UnsupportedError, match="gpt2"):
            TransformersEngine(families.build(kind, task), tiny.tokenizer())
    with pytest.raises(ConfigError, match="max_length"):
        TransformersEngine(tiny.build("gpt2"), tiny.tokenizer(), max_length=tiny.CONTEXT + 1)
