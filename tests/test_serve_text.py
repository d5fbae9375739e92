"""An answer's text: whole characters as their tokens come, and stop strings wherever tokens begin and end."""

from __future__ import annotations

import itertools
import random

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softprompt.embedded import PATH
from softprompt.errors import SoftPromptError
from softprompt.serve.detokenize import Detokenizer, StopStrings, texts_of
from softprompt.serve.filled import in_template

TEXTS = ["the cat sat", "née Çelik, 東京 and 🎉👩‍👩‍👧 on one line\n\nand  another", " ", "\u202b\ufffdx", "a\ufffd"]


def by_bytes() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: words begin with a blank that is dropped in front, and bytes are tokens."""
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    core = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def streamed(tokenizer: PreTrainedTokenizerFast, before: list[int], ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer, before)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["tiny", "embedded"])
def test_pieces_join_to_the_text(name: str, text: str) -> None:
    tokenizer = tiny.tokenizer() if name == "tiny" else AutoTokenizer.from_pretrained(PATH)
    before = tokenizer("name[The Mill]", add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = streamed(tokenizer, before, ids)
    assert "".join(pieces) == text.rstrip("\ufffd")
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_token() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("🎉", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert streamed(tokenizer, [], ids) == ["", "", "", "🎉", ""]
    assert streamed(tokenizer, [], ids[:2]) == ["", "", ""]


def test_bytes_that_are_no_characters_do_not_hold_up_the_rest() -> None:
    tokenizer = tiny.tokenizer()
    broken = tokenizer("🎉", add_special_tokens=False)["input_ids"][0]
    word = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    pieces = streamed(tokenizer, [], [broken] * 40 + word)
    assert "".join(pieces) == "\ufffd" * 40 + "the cat"
    assert any(pieces[:20])


def test_words_with_a_blank_in_front_and_bytes_as_tokens() -> None:
    tokenizer = by_bytes()
    kanji = [4 + byte for byte in "東京".encode()]
    assert streamed(tokenizer, [1], [2, 3, *kanji, 1]) == [" cat", "s", "", "", "東", "", "", "京", " the", ""]
    assert "".join(streamed(tokenizer, [], [1, 2])) == "the cat"
    assert texts_of(tokenizer, [2, 3], 1) == [" cat", "s"]


def test_special_tokens_have_no_text_and_are_not_kept() -> None:
    tokenizer = tiny.tokenizer()
    stream = Detokenizer(tokenizer, [])
    assert [stream.push(tiny.EOS) for _ in range(100)] == [""] * 100
    assert len(stream._ids) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aab", ["ab"], "a"),
        ("abababac", ["abac"], "abab"),
        ("no end", ["ends"], "no end"),
        ("", ["x"], ""),
        ("x\n\ny", ["\n\n"], "x"),
        ("keep", [""], "keep"),
        ("overlap", ["laps", "lap"], "over"),
    ],
)
def test_stop_strings(text: str, stops: list[str], expected: str, size: int) -> None:
    filter_ = StopStrings(stops)
    parts = [filter_.push(text[place : place + size]) for place in range(0, len(text), size)]
    assert "".join(parts) + filter_.finish() == expected
    assert filter_.found == (expected != text)


def test_stop_strings_that_overlap_with_themselves() -> None:
    """As a search through the whole text finds them, whatever the parts it comes in."""
    draw = random.Random(5)
    found = 0
    for _ in range(2000):
        text = "".join(draw.choices("ab", k=draw.randint(0, 30)))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 7))) for _ in range(draw.randint(1, 3))]
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 8)))
        filter_ = StopStrings(stops)
        parts = [filter_.push(text[a:b]) for a, b in itertools.pairwise([0, *cuts, len(text)])]
        # of strings that end in the same part the one that begins first counts: the part is the same token's
        places = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert filter_.found == bool(places)
        sent = "".join(parts) + filter_.finish()
        if not places:
            assert sent == text
            continue
        found += 1
        seen = min(cut for cut in [*cuts, len(text)] if cut >= min(places))
        assert sent == text[: min(text.find(stop) for stop in stops if stop in text[:seen])]
    assert found > 500


def test_nothing_is_held_back_that_cannot_be_a_stop_string() -> None:
    filter_ = StopStrings(["</answer>"])
    assert [filter_.push(each) for each in ("a <", "b", " </ans", "x")] == ["a ", "<b", " ", "</ansx"]


@pytest.mark.parametrize("template", ["[P] {a} {b} => {text}", "{a} [P] {b} [MASK]"])
@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, f'{{"a": {"1" * 5000}, "b": "x"}}', "null", "3", '["a", "b"]', "{}", "no JSON"),
        *('{"a": null, "b": "x"}', '{"a": ["x"], "b": "x"}', '{"a": "\\ud800", "b": "x"}'),
    ],
)
def test_texts_that_cannot_fill_a_template_of_several_fields(template: str, text: str) -> None:
    with pytest.raises(SoftPromptError) as error:
        in_template(template, text, tiny.tokenizer())
    assert "--" not in str(error.value)  # there are no flags over HTTP


@pytest.mark.parametrize("template", ["[P] {a} {b} => {text}", "{a} [P] {b} [MASK]"])
def test_numbers_are_texts_in_a_template(template: str) -> None:
    tokenizer = tiny.tokenizer()
    found = in_template(template, '{"a": 5, "b": "x"}', tokenizer)
    assert found == in_template(template, '{"a": "5", "b": "x"}', tokenizer) and found.virtual == 1
