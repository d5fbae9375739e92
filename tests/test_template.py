"""The template language: what is written, what ids and slots come of it, and what is cut when a row is too long."""

from __future__ import annotations

from typing import Any

import cloze_kit
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.errors import ConfigError, DataError
from softprompt.template import Answer, Field, Mark, Slot, Template, TemplateRow, Words, collate_rows, encode_rows

RTE = "{premise} question : {hypothesis} ? [P*3] answer : [MASK] ."


def slots(template: str) -> list[int]:
    return [piece.index for piece in Template(template).pieces if isinstance(piece, Slot)]


def test_the_pieces_of_a_template() -> None:
    assert Template("{a} x[P*2]y [MASK].").pieces == (
        Field("a"), Words(" x"), Slot(0), Slot(1), Words("y "), Mark("MASK"), Words("."),
    )  # fmt: skip
    assert Template.parse(RTE).num_virtual_tokens == 3
    assert Template(RTE).fields == ("premise", "hypothesis")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("[P] {a} [P]", [0, 1]),
        ("[P*2] {a} [P][P*1]", [0, 1, 2, 3]),
        ("[P1] {a} [P1]", [0, 0]),
        ("[P1] {a} [P2] [P1] [P]", [0, 1, 0, 2]),
        ("[P] [P7*2] {a} [P7*2] [P]", [0, 1, 2, 1, 2, 3]),
        ("{a} [P2] [P1]", [0, 1]),
    ],
)
def test_slots_are_new_unless_they_share_a_name(template: str, expected: list[int]) -> None:
    assert slots(template) == expected
    assert Template(template).num_virtual_tokens == max(expected) + 1


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{x}} {a}", "{x} A"),
        ("[[P]] {a}", "[P] A"),
        ("[[MASK]] [[P*3]] {a}", "[MASK] [P*3] A"),
        ("name[{a}], [x] [1] [Pa] array[{a}]", "name[A], [x] [1] [Pa] array[A]"),
        ("[page] {a} [Price]", "[page] A [Price]"),
    ],
)
def test_plain_braces_and_brackets(template: str, text: str) -> None:
    tokenizer = cloze_kit.tokenizer(Answer.NEXT)
    row = Template(template).encode(tokenizer, {"a": "A"})
    assert row.input_ids == tokenizer(text)["input_ids"]
    assert set(row.slots) == {-1}


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        ("{a", "malformed"),
        ("words only [P] [MASK]", "names no column"),
        ("{a!r}", "plain"),
        ("{a} [MASK] or [MASK]", "more than once"),
        ("{a} [P*0]", "at least one"),
        ("{a} [P1*2] [P1]", "2 and 1 virtual tokens"),
        ("{a} [p]", r"\[p\].*none of"),
        ("{a} [P *3]", "none of"),
        ("{a} [P*x]", "none of"),
        ("{a} [P*]", "none of"),
        ("{a} [P*{b}]", "none of"),
        ("{a} [P 3]", "none of"),
        ("{a} [mask]", "none of"),
        ("{a} [ MASK ]", "none of"),
    ],
)
def test_a_malformed_template_is_refused_with_its_text(template: str, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment) as error:
        Template(template)
    assert template in str(error.value)


def test_a_row_on_a_masked_model() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.MASK)
    row = Template(RTE).encode(tokenizer, {"premise": "the cat sat", "hypothesis": "a dog"})
    text = "[CLS] the cat sat question : a dog ? [PAD] [PAD] [PAD] answer : [MASK] . [SEP]"
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == text.split()
    assert row.slots == [-1] * 9 + [0, 1, 2] + [-1] * 5
    assert row.answer_position == 14


def test_a_row_on_a_causal_model_ends_where_the_answer_begins() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.NEXT)
    row = Template(RTE).encode(tokenizer, {"premise": "the cat", "hypothesis": "a dog"})
    before, after = tokenizer("the cat question : a dog ?")["input_ids"], tokenizer(" answer :")["input_ids"]
    pad = tokenizer.pad_token_id
    assert row == TemplateRow([*before, pad, pad, pad, *after], [-1] * len(before) + [0, 1, 2] + [-1] * len(after),
                              len(before) + len(after) + 2)  # fmt: skip
    open_end = Template(RTE.replace(" [MASK] .", "")).encode(tokenizer, {"premise": "the cat", "hypothesis": "a dog"})
    assert open_end == row


def test_a_row_on_an_encoder_decoder_has_a_sentinel() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.SENTINEL)
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    for template in ("{a} : [MASK] .", "{a} :"):
        row = Template(template).encode(tokenizer, {"a": "the cat"}, answer=Answer.SENTINEL)
        assert row.input_ids.count(sentinel) == 1 and row.input_ids[row.answer_position] == sentinel
        assert row.input_ids[-1] == tokenizer.eos_token_id


def test_special_tokens_in_the_template_come_once() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.MASK)
    plain = Template("{a} [MASK]").encode(tokenizer, {"a": "the cat"})
    assert Template("[CLS] {a} [MASK] [SEP]").encode(tokenizer, {"a": "the cat"}) == plain
    two = Template("[P] [CLS] {a} [SEP] {b} [MASK]").encode(tokenizer, {"a": "cat", "b": "dog"})
    assert tokenizer.convert_ids_to_tokens(two.input_ids) == [
        "[PAD]",
        "[CLS]",
        "cat",
        "[SEP]",
        "dog",
        "[MASK]",
        "[SEP]",
    ]
    with pytest.raises(ConfigError, match=r"has \[CLS\], but this tokenizer has no such token"):
        Template("[CLS] {a}").encode(cloze_kit.tokenizer(Answer.NEXT), {"a": "x"})
    with pytest.raises(ConfigError, match=r"has \[MASK\], but this tokenizer has no such token"):
        Template("[MASK] {a}").encode(cloze_kit.tokenizer(Answer.NEXT), {"a": "x"}, answer=Answer.MASK)


@pytest.mark.parametrize("template", ["{a} [MASK] [P]", "{a} [MASK] {b}"])
def test_what_a_causal_model_cannot_see_when_it_answers_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"behind \[MASK\].*move it before"):
        Template(template).encode(cloze_kit.tokenizer(Answer.NEXT), {"a": "x", "b": "y"})


@pytest.mark.parametrize("answer", Answer)
@given(text=st.text(max_size=40) | st.sampled_from(["[P] [MASK] </s> <s>", "[MASK]", "<extra_id_0>", "[CLS]a[SEP]"]))
def test_what_a_column_holds_is_only_text(answer: Answer, text: str) -> None:
    """Whatever it is: the same virtual tokens, one answer, and the same special tokens as around an ordinary word."""
    tokenizer = cloze_kit.tokenizer(answer)
    template = Template("[P2] {a} [P*2] : [MASK]")
    usual, row = (template.encode(tokenizer, {"a": value}, answer=answer) for value in ("cat", text))
    assert [slot for slot in row.slots if slot >= 0] == [0, 1, 2]
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<extra_id_0>")}
    special -= {tokenizer.unk_token_id}
    found = [[number for number in each.input_ids if number in special] for each in (usual, row)]
    assert found[0] == found[1]
    assert row.input_ids[-1] == usual.input_ids[-1]
    assert row.input_ids[row.answer_position] == usual.input_ids[usual.answer_position]


@pytest.mark.parametrize("answer", Answer)
def test_without_slots_the_ids_are_those_of_the_plain_text(answer: Answer) -> None:
    tokenizer = cloze_kit.tokenizer(answer)
    row = Template("the {a} ran home : {b}").encode(tokenizer, {"a": "red dog", "b": "no"}, answer=Answer.NEXT)
    ids = tokenizer("the red dog ran home : no", add_special_tokens=False)["input_ids"]
    assert row.input_ids[-len(ids) :] == ids


@pytest.mark.parametrize("answer", Answer)
def test_a_blank_before_a_slot_is_not_a_token_and_one_behind_it_belongs_to_the_word(answer: Answer) -> None:
    tokenizer = cloze_kit.tokenizer(answer)
    row = Template("{a} [P] sat on").encode(tokenizer, {"a": "the cat"}, answer=Answer.NEXT)
    ids = tokenizer("the cat sat on", add_special_tokens=False)["input_ids"]
    assert row.without_slots().input_ids[-len(ids) :] == ids


def texts(row: TemplateRow, tokenizer: Any) -> str:
    return tokenizer.decode([number for number, slot in zip(row.input_ids, row.slots, strict=True) if slot < 0])


@pytest.mark.parametrize("answer", Answer)
@pytest.mark.parametrize("less", [1, 5, 12])
def test_only_fields_are_cut_the_longest_first(answer: Answer, less: int) -> None:
    tokenizer = cloze_kit.tokenizer(answer)
    template = Template("{a} question : {b} ? [P*3] answer : [MASK]")
    fields = {"a": "the cat sat on the mat " * 4, "b": "a dog"}
    whole = template.encode(tokenizer, fields, answer=answer)
    row = template.encode(tokenizer, fields, len(whole.input_ids) - less, answer=answer)
    assert len(whole.input_ids) - less - 3 <= len(row.input_ids) <= len(whole.input_ids) - less
    assert [slot for slot in row.slots if slot >= 0] == [0, 1, 2]
    text = texts(row, tokenizer)
    assert "question : a dog ? answer :" in " ".join(text.split())  # the anchors and the shorter field are whole
    assert text.replace("<s>", "").replace("[CLS]", "").strip().startswith("the")
    assert template.encode(tokenizer, fields, len(whole.input_ids), answer=answer) == whole


def test_fields_of_equal_length_are_cut_alike() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.MASK)
    template = Template("{a} . {b} [MASK]")
    row = template.encode(tokenizer, {"a": "cat " * 9, "b": "dog " * 6}, 12)
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids)
    assert (tokens.count("cat"), tokens.count("dog")) == (4, 4)
    row = template.encode(tokenizer, {"a": "cat " * 9, "b": "dog " * 2}, 12)
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids)
    assert (tokens.count("cat"), tokens.count("dog")) == (6, 2)


def test_a_field_used_twice_is_cut_in_both_places() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.MASK)
    row = Template("{a} . {a} [MASK]").encode(tokenizer, {"a": "cat " * 20}, 14)
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids)
    assert len(tokens) == 14 and tokens.index(".") == 6


def test_cuts_fall_between_words_and_inside_one_only_where_there_is_one() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.MASK)
    row = Template("{a} [MASK]").encode(tokenizer, {"a": "cat matcatmat"}, 6)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["[CLS]", "cat", "[MASK]", "[SEP]"]
    row = Template("{a} [MASK]").encode(tokenizer, {"a": "matcatmat"}, 5)
    assert len(row.input_ids) == 5


def test_a_template_that_does_not_fit_by_itself_names_the_row() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.MASK)
    with pytest.raises(DataError, match=r"data line 2 does not fit: 4 tokens too many.*shorten the template"):
        encode_rows(Template("{a} [P*5] [MASK]"), tokenizer, [{"a": "cat"}], 4, Answer.MASK, where=["data line 2"])
    with pytest.raises(DataError, match=r'row 2 has no field "b".*it has a'):
        encode_rows(Template("{a} {b}"), tokenizer, [{"a": "x", "b": "y"}, {"a": "x"}])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_either_side(side: str) -> None:
    rows = [TemplateRow([5, 0, 6], [-1, 0, -1], 2), TemplateRow([7], [-1], 0)]
    batch = collate_rows(rows, 9, side)
    for number, row in enumerate(rows):
        real = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number][real].tolist() == row.input_ids
        assert batch["slots"][number][real].tolist() == row.slots
        assert (batch["slots"][number][~real] == -1).all() and (batch["input_ids"][number][~real] == 9).all()
        answer = int(batch["answer_position"][number])
        assert int(batch["input_ids"][number, answer]) == row.input_ids[row.answer_position]
    assert batch["attention_mask"][1].tolist() == ([0, 0, 1] if side == "left" else [1, 0, 0])
    assert "slots" not in collate_rows(rows[1:], 9, side)


def test_several_masks_and_the_row_without_its_slots() -> None:
    tokenizer = cloze_kit.tokenizer(Answer.MASK)
    row = Template("[P*2] {a} : [MASK] . [P]").encode(tokenizer, {"a": "cat"}, masks=3)
    assert tokenizer.convert_ids_to_tokens(row.without_slots().input_ids) == (
        ["[CLS]", "cat", ":", "[MASK]", "[MASK]", "[MASK]", ".", "[SEP]"]
    )
    assert row.answer_position == 5 and row.without_slots().answer_position == 3
