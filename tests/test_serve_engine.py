"""The transformers engine: whatever runs beside it, a request gets what its prompt alone answers offline."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import families
import families_cache
import pytest
import tiny
import torch
from serve_kit import answer, rows, running, saved, serve, text_of, together, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import PrefixTuningConfig
from softprompt.embedded import PATH
from softprompt.serve import schedule as schedule_file
from softprompt.serve import steps
from softprompt.serve.engine import Piece

NAMES = ["words", "kv", None, "mlp", "words", "ffn", "task", "first", "kv", None, "words", "task", "first", "mlp"]


def build(kind: str) -> Any:
    if kind == "window":
        return tiny.build("mistral", sliding_window=8)
    if kind in families_cache.OTHERS:
        return families_cache.build(kind)
    return families.build(kind, "CAUSAL_LM")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "window", "gemma2", "bloom", "gpt_neo"])
def test_every_answer_is_the_offline_one(kind: str, tmp_path: Path) -> None:
    """Five of fourteen at a time, of all methods and none, each of another length: rows join and leave all along."""
    served = serve(build(kind), tmp_path, max_batch=5)
    texts = rows(len(NAMES))
    sizes = [3 + 5 * number % 11 for number in range(len(NAMES))]
    asks = [served.ask(name, ids, max_tokens=n) for name, ids, n in zip(NAMES, texts, sizes, strict=True)]
    for name, ids, size, pieces in zip(NAMES, texts, sizes, together(served.engine, asks), strict=True):
        expected = served.offline(name, ids, size)
        assert tokens_of(pieces) == expected, name
        assert pieces[-1].finish_reason == ("stop" if expected[-1] == tiny.EOS else "length")
        assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert served.engine.counts() | {"cache_tokens_limit": 0} == dict.fromkeys(served.engine.counts(), 0)


def test_the_embedded_model(tmp_path: Path) -> None:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(PATH), AutoTokenizer.from_pretrained(PATH)
    served = serve(base.eval(), tmp_path, tokenizer)
    texts = ["name[The Mill], food[French] =>", "The cat sat on", "name[Aromi], area[riverside] =>"] * 2
    names = ["words", None, "kv", "first", "mlp", "words"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    asks = [served.ask(name, row, max_tokens=12) for name, row in zip(names, ids, strict=True)]
    for name, row, pieces in zip(names, ids, together(served.engine, asks), strict=True):
        expected = served.offline(name, row, 12)
        assert tokens_of(pieces) == expected
        whole = tokenizer.decode(row + expected, skip_special_tokens=True)
        before = tokenizer.decode(row, skip_special_tokens=True)
        assert before + text_of(pieces) == whole.rstrip("\ufffd")


@pytest.mark.parametrize("kind", ["gpt2", "window"])
def test_long_texts_are_read_in_pieces(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "PIECE", 7)
    monkeypatch.setattr(schedule_file, "PIECE", 7)
    served = serve(build(kind), tmp_path)
    names = ["kv", "words", None, "first", "kv", "words"]
    texts = rows(len(names), longest=60)
    assert max(map(len, texts)) > 30
    asks = [served.ask(name, ids) for name, ids in zip(names, texts, strict=True)]
    for name, ids, pieces in zip(names, texts, together(served.engine, asks), strict=True):
        assert tokens_of(pieces) == served.offline(name, ids)


def test_memory_runs_out_while_rows_grow(tmp_path: Path) -> None:
    """The last to come are read anew, and say the same; at no time do rows and prompts hold more than is allowed."""
    served = serve(tiny.build("llama"), tmp_path, max_cache_tokens=150)
    engine, names = served.engine, ["words", None, "words", "kv", None, "first"]
    texts = rows(len(names), longest=8)
    seen: list[int] = []
    evicted: list[int] = []
    kept = schedule_file.Schedule._make_room

    def make_room(self: schedule_file.Schedule) -> None:
        before = len(self.model.rows)
        kept(self)
        evicted.append(before - len(self.model.rows))
        seen.append(self.model.tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_file.Schedule, "_make_room", make_room)
        asks = [served.ask(name, ids, max_tokens=30) for name, ids in zip(names, texts, strict=True)]
        answers = together(engine, asks)
    assert sum(evicted) > 0 and max(seen) <= 150
    for name, ids, pieces in zip(names, texts, answers, strict=True):
        assert tokens_of(pieces) == served.offline(name, ids, 30)
        assert len(pieces) == len(tokens_of(pieces))  # nothing was sent twice


def test_first_come_first_served(tmp_path: Path) -> None:
    served = serve(tiny.build("gpt2"), tmp_path, max_batch=2)
    order: list[int] = []

    async def one(number: int, ids: list[int]) -> None:
        async for _ in served.engine.generate(served.ask("kv", ids, max_tokens=4)):
            if number not in order:
                order.append(number)

    async def whole() -> None:
        await asyncio.gather(*(one(number, ids) for number, ids in enumerate(rows(7))))

    running(served.engine, whole)
    assert order == list(range(7))


def test_who_hangs_up_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    served = serve(tiny.build("gpt2"), tmp_path, max_batch=3)
    engine, texts = served.engine, rows(6)

    async def some(ids: list[int]) -> None:
        stream = engine.generate(served.ask("words", ids, max_tokens=100, ignore_eos=True))
        async for piece in stream:
            if piece.token_ids:
                break
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]

    async def whole() -> list[list[Piece]]:
        waits = asyncio.gather(*(some(ids) for ids in texts[:3]))
        answers = await asyncio.gather(*(answer(engine, served.ask("kv", ids, max_tokens=9)) for ids in texts[3:]))
        await waits
        while engine.counts()["running"]:  # within a step, which nothing here delays
            await asyncio.sleep(0.001)
        return list(answers)

    for ids, pieces in zip(texts[3:], running(engine, whole), strict=True):
        assert tokens_of(pieces) == served.offline("kv", ids, 9)
    assert engine.counts()["cache_tokens"] == 0


def test_an_end_token_ends_it_unless_it_is_too_early_or_ignored(tmp_path: Path) -> None:
    served = serve(tiny.build("gpt2"), tmp_path)
    ids = rows(1)[0]
    plain = served.offline("kv", ids, 8, eos_token_id=None)
    end = plain[3]
    served.engine._ends = (end,)
    first = plain.index(end)
    options: list[dict[str, Any]] = [{}, {"min_tokens": 6}, {"ignore_eos": True}]
    asks = [served.ask("kv", ids, max_tokens=8, **each) for each in options]
    stopped, later, whole = together(served.engine, asks)
    assert tokens_of(stopped) == plain[: first + 1] and stopped[-1].finish_reason == "stop"
    assert text_of(stopped) == tiny.tokenizer().decode(plain[:first]).rstrip("\ufffd")
    assert tokens_of(later) == served.offline("kv", ids, 8, eos_token_id=end, min_new_tokens=6)
    assert tokens_of(whole) == plain and whole[-1].finish_reason == "length"


def test_a_poisoned_prompt_harms_nobody_else(tmp_path: Path) -> None:
    """Scores that are no numbers end its own row; places that it had in the cache and the pool are had by others."""
    served = serve(tiny.build("llama"), tmp_path, max_batch=4)
    served.model.add_adapter("bad", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    served.model.encoder("bad").embedding.weight.data.fill_(3e38)
    served.model.save_pretrained(tmp_path, selected_adapters=["bad"])
    version = served.versions["kv"]
    served.versions["bad"] = type(version)("bad", "f" * 64, tmp_path / "bad", tmp_path / "bad", "any", 6)
    names = ["bad", "kv", "bad", None, "words", "bad", "first", "kv", "bad", "words"]
    texts = rows(len(names))
    asks = [served.ask(name, ids) for name, ids in zip(names, texts, strict=True)]

    async def whole() -> list[Any]:
        return await asyncio.gather(*(answer(served.engine, ask) for ask in asks), return_exceptions=True)

    for name, ids, found in zip(names, texts, running(served.engine, whole), strict=True):
        if name == "bad":
            assert "not numbers" in str(found) and "'bad'" in str(found)
        else:
            assert tokens_of(found) == served.offline(name, ids)


def test_a_name_with_a_new_version_while_the_old_one_is_under_way(tmp_path: Path) -> None:
    served = serve(tiny.build("gpt2"), tmp_path / "old")
    ids = rows(1)[0]
    old, expected = served.versions["kv"], served.offline("kv", ids, 20, eos_token_id=None)
    served.model.encoder("kv").embedding.weight.data += 1
    served.model.folds.clear()
    new = served.versions["kv"] = saved(served.model, "kv", tmp_path / "new", 77)
    assert (old.name, old.length) == (new.name, new.length)
    other = served.offline("kv", ids, 20, eos_token_id=None)
    assert other != expected

    async def whole() -> tuple[list[Piece], list[Piece]]:
        served.versions["kv"] = old
        first = served.engine.generate(served.ask("kv", ids, max_tokens=20, ignore_eos=True))
        pieces = [await anext(first)]
        served.versions["kv"] = new
        second = await answer(served.engine, served.ask("kv", ids, max_tokens=20, ignore_eos=True))
        return pieces + [piece async for piece in first], second

    before, after = running(served.engine, whole)
    assert tokens_of(before) == expected and tokens_of(after) == other


def test_a_prompt_is_there_once_and_goes_with_its_last_row(tmp_path: Path) -> None:
    served = serve(tiny.build("gpt2"), tmp_path)
    pool = served.engine._schedule.model.pool
    held: set[int] = set()

    async def one(name: str, ids: list[int]) -> None:
        async for _ in served.engine.generate(served.ask(name, ids, max_tokens=5, ignore_eos=True)):
            held.add(pool.tokens)

    async def whole() -> None:
        await asyncio.gather(*(one(name, ids) for name, ids in zip(["kv"] * 6 + ["words"] * 3, rows(9), strict=True)))

    running(served.engine, whole)
    assert max(held) == 2 * 6 and pool.tokens == 0 and not len(pool)


def test_prompts_seen_from_beyond_a_window_wait_for_the_others(tmp_path: Path) -> None:
    """Both kinds cannot share a batch, so they take turns, in the order in which they came."""
    served = serve(tiny.build("mistral", sliding_window=8), tmp_path)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, prefix_always_visible=True)
    served.model.add_adapter("far", config)
    torch.nn.init.normal_(served.model.encoder("far").embedding.weight)
    served.model.save_pretrained(tmp_path, selected_adapters=["far"])
    version = served.versions["kv"]
    served.versions["far"] = type(version)("far", "e" * 64, tmp_path / "far", tmp_path / "far", "any", 6)
    names = ["kv", "far", "words", "far", None, "far"]
    texts = rows(len(names))
    asks = [served.ask(name, ids, max_tokens=10) for name, ids in zip(names, texts, strict=True)]
    for name, ids, pieces in zip(names, texts, together(served.engine, asks), strict=True):
        assert tokens_of(pieces) == served.offline(name, ids, 10)


def test_nothing_grows(tmp_path: Path) -> None:
    """Rows that come and go for a long time leave the cache no wider than the rows that are there need it."""
    served = serve(tiny.build("gpt2"), tmp_path, max_batch=4)
    cache = served.engine._schedule.model._cache
    widest = 0

    async def one(ids: list[int]) -> None:
        nonlocal widest
        async for _ in served.engine.generate(served.ask("kv", ids, max_tokens=7, ignore_eos=True)):
            columns = [each.columns for each in cache.layers]
            widest = max([widest, *columns])

    async def whole() -> None:
        await asyncio.gather(*(one(ids) for ids in rows(70, longest=6)))

    running(served.engine, whole)
    assert 0 < widest <= 13 + 2 * 64
    assert not cache.layers and not cache.lengths
