"""vLLM's prefix cache never mixes prompts, whoever asks and however; and nobody gets a prompt past the door."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import kit
import pytest
from kit import assert_same
from vllm.exceptions import VLLMValidationError

from softprompt.serve.vllm.marks import salt_of

FAMILY = "llama"
KINDS = {
    "prefix_tuning": kit.config_of("prefix_tuning", 45),
    "prompt_tuning": kit.config_of("prompt_tuning", 45),
    "behind": kit.config_of("prompt_tuning", 45, placement="after_bos"),  # embeddings, and not keys and values
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Engine]:
    """Prompts of three kinds, each in two versions that differ in one number of thousands."""
    folder = tmp_path_factory.mktemp("isolation")
    base = kit.build(FAMILY)
    for kind, config in KINDS.items():
        kit.save_prompt(base, config, folder / "prompts" / kind / "one")
        kit.save_prompt(base, config, folder / "prompts" / kind / "two", change=8.0)
    options = {"max_num_batched_tokens": 96, "enable_prompt_embeds": True}
    with kit.engine(FAMILY, folder, folder / "prompts", **options) as running:
        yield running


def test_prompts_that_differ_in_one_number_under_load(engine: kit.Engine) -> None:
    """The same texts after each prompt and after none, in random order, cold and then cached."""
    free, some = engine.free_blocks, random.Random(0)
    rows = [(name, ids) for name in engine.names() for ids in kit.texts(6, (5, 40, 70), seed=1)]
    for kind in KINDS:
        ids = rows[0][1]
        assert engine.expect(f"{kind}/one", ids).top != engine.expect(f"{kind}/two", ids).top
    for _ in range(3):
        some.shuffle(rows)
        for (name, ids), found in zip(rows, engine.ask(rows), strict=True):
            assert_same(found, engine.expect(name, ids))
    assert engine.free_blocks == free


@pytest.mark.parametrize("kind", ["prefix_tuning", "behind"])
def test_two_versions_of_one_name(engine: kit.Engine, kind: str) -> None:
    """Who began with the old version goes on with it while others have the new one."""
    name = f"changing-{kind}"
    ids, folder = kit.texts(1, (60,), seed=2)[0], engine.prompts / name
    config, base = replace(KINDS[kind], num_virtual_tokens=33), kit.build(FAMILY)
    kit.save_prompt(base, config, folder)
    engine.library.scan()
    old = engine.library.get(name)
    expected_old = engine._expect(name, ids, 10)
    kit.save_prompt(base, config, folder, change=9.0)
    engine.library.load(name)
    new = engine.library.get(name)
    assert old.digest != new.digest
    expected_new = engine._expect(name, ids, 10)
    for _ in range(2):
        found = engine.ask([(name, ids)] * 4, versions=[old, new, old, new])
        for answer, expected in zip(found, [expected_old, expected_new] * 2, strict=True):
            assert_same(answer, expected)
    assert expected_old.top != expected_new.top


def test_blocks_of_embeddings_are_shared_too(engine: kit.Engine) -> None:
    """By requests for the same version, and by no others: not even the block in which the vectors are the same."""
    ids = kit.texts(1, (70,), seed=8)[0]
    hits = []
    for name in ("behind/one", "behind/two", None, "behind/one", "behind/two"):
        before = engine.metric("vllm:prefix_cache_hits")
        assert_same(engine.ask([(name, ids)])[0], engine.expect(name, ids))
        hits.append(engine.metric("vllm:prefix_cache_hits") - before)
    assert hits == [0, 0, 0, 96, 96]


def test_repetition_penalty_and_embeddings(engine: kit.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts words only; vLLM's other model runner would count a word that is not there."""
    name, ids = "behind/one", kit.texts(1, (6,), seed=3)[0]
    logits = engine.penalised(name, ids, 1.5)
    assert 0 not in ids
    bias = {0: float(logits.max() - logits[0]) + 0.1}
    assert engine.ask([(name, ids)], 1, repetition_penalty=1.5)[0].ids == [int(logits.argmax())] != [0]
    assert engine.ask([(name, ids)], 1, repetition_penalty=1.5, logit_bias=bias)[0].ids == [0]
    monkeypatch.setattr(engine.slots, "_zeroed", True)
    assert len(engine.ask([(name, ids)], 2)[0].ids) == 2
    with pytest.raises(VLLMValidationError, match=r"repetition_penalty=1\.5"):
        engine.ask([(name, ids)], 1, repetition_penalty=1.5)


def test_without_the_salt_they_would_mix(engine: kit.Engine) -> None:
    """What the connector refuses is what would go wrong: the first to come fills the blocks for all."""
    one, two = (engine.library.get(f"prefix_tuning/{name}") for name in ("one", "two"))
    ids = kit.texts(1, (50,), seed=3)[0]
    (refused,) = engine.raw([(one.digest, one.length, "shared", ids)])
    assert refused == "error"
    (refused,) = engine.raw([(two.digest, two.length, salt_of(one.digest), ids)])
    assert refused == "error"
    (done,) = engine.raw([(two.digest, two.length, salt_of(two.digest, "mine"), ids)])
    assert done == "length"


HOSTILE: list[tuple[Any, Any]] = [
    ("../../etc/passwd", 3),
    ("f" * 64, 3),
    ("F" * 64, 3),
    ("\0", 3),
    ("a" * 100_000, 3),
    (None, 3),
    (["x"], 3),
    ("ok", "45"),
    ("ok", -1),
    ("ok", 0),
    ("ok", True),
    ("ok", 44),
    ("ok", 10**12),
    ("ok", None),
]


def test_what_no_client_of_ours_sends_fails_alone(engine: kit.Engine) -> None:
    """Forged transfers end as failed requests; requests beside them are answered, and no block is lost."""
    one, ids = engine.library.get("prefix_tuning/one"), kit.texts(1, (20,), seed=4)[0]
    free = engine.free_blocks
    forged = [
        (one.digest if digest == "ok" else digest, length, salt_of(one.digest), ids) for digest, length in HOSTILE
    ]
    ended = engine.raw([*forged, (one.digest, one.length, salt_of(one.digest), ids)])
    assert ended == ["error"] * len(forged) + ["length"]
    assert engine.free_blocks == free
    assert_same(engine.ask([("prefix_tuning/one", ids)])[0], engine.expect("prefix_tuning/one", ids))


def test_a_file_that_is_gone_or_damaged_fails_its_requests_only(engine: kit.Engine) -> None:
    kit.save_prompt(kit.build(FAMILY), kit.config_of("prefix_tuning", 20), engine.prompts / "doomed", seed=9)
    engine.library.scan()
    version, ids = engine.library.get("doomed"), kit.texts(1, (8,), seed=5)[0]
    file = version.folder / "kv.safetensors"
    whole, free = file.read_bytes(), engine.free_blocks
    raw = (version.digest, version.length, salt_of(version.digest), ids)
    for content in (whole[: len(whole) // 2], b"garbage", None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        else:
            file.mkdir()
        assert engine.raw([raw]) == ["error"]
        assert_same(engine.ask([("prefix_tuning/one", ids)])[0], engine.expect("prefix_tuning/one", ids))
        file.rmdir() if content is None else None
        file.write_bytes(whole)
    assert engine.raw([raw]) == ["length"]
    prefixes = engine.prefixes
    before, prefixes.max_bytes = prefixes.max_bytes, 0
    prefixes._keep("", [])  # what is held goes
    file.write_bytes(whole[: len(whole) // 2])  # after the scheduler has looked at it
    assert engine.raw([raw, raw]) == ["error"] * 2
    prefixes.max_bytes = before
    file.write_bytes(whole)
    assert engine.raw([raw]) == ["length"]
    assert engine.free_blocks == free


def test_prompts_beyond_the_memory_limit_are_read_again(engine: kit.Engine) -> None:
    prefixes = engine.prefixes
    before, prefixes.max_bytes = prefixes.max_bytes, 100_000
    ids = kit.texts(1, (4,), seed=6)[0]
    try:
        for _ in range(2):
            for name in engine.library.names():
                if name != "doomed":
                    assert_same(engine.ask([(name, ids)])[0], engine._expect(name, ids, 10))
        assert prefixes._nbytes <= 100_000
    finally:
        prefixes.max_bytes = before
