"""Files become examples, examples become ids: what is read, what is refused, and where exactly the target begins."""

import csv
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt import demo_data
from softprompt.data import (
    IGNORED,
    Encoded,
    EncodedLabel,
    Example,
    Template,
    collate,
    encode,
    encode_all,
    encode_labels,
    expand,
    input_ids,
    load_examples,
    load_labelled,
)
from softprompt.data.examples import templated
from softprompt.errors import ConfigError, DataError, SoftPromptError

RECORDS = [
    {"mr": "name[The Mill], food[French]", "refs": ["The Mill serves French food.", "French food at The Mill."]},
    {"mr": "name[The Cat], area[riverside]", "refs": ["The Cat is by the river."]},
]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Reading -------------------------------------------------------------------------------------------------------------


def test_a_template_splits_at_its_last_field_and_a_list_gives_references(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "e2e.jsonl", RECORDS)
    first, second = load_examples(path, template="{mr} => {refs}")
    assert first.input == "name[The Mill], food[French] =>"
    assert first.border == " "
    assert first.targets == ("The Mill serves French food.", "French food at The Mill.")
    assert second.where == f"{path} line 2"
    assert [pair.targets for pair in expand([first, second])] == [
        (ref,) for record in RECORDS for ref in record["refs"]
    ]


def test_a_field_finds_the_plural_of_its_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "e2e.jsonl", RECORDS)
    assert load_examples(path, template="{mr} => {ref}") == load_examples(path, template="{mr} => {refs}")


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    records = [{"input": "a, b", "target": 'say "é"\nline two'}, {"input": "c", "target": "d"}]
    jsonl = write_jsonl(tmp_path / "rows.jsonl", records)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(records, indent=1), encoding="utf-8")
    paths = [jsonl, array]
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["input", "target"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
        paths.append(tmp_path / name)
    read = [[(example.input, example.targets) for example in load_examples(path)] for path in paths]
    assert read == [[("a, b", ('say "é"\nline two',)), ("c", ("d",))]] * len(paths)


def test_parquet_and_lists_in_it(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "e2e.parquet")
    jsonl = write_jsonl(tmp_path / "e2e.jsonl", RECORDS)
    ours = load_examples(tmp_path / "e2e.parquet", template="{mr} => {ref}")
    assert [(e.input, e.targets) for e in ours] == [(e.input, e.targets) for e in load_examples(jsonl, "{mr} => {ref}")]


def test_columns_can_be_named_and_the_number_of_rows_limited(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": n, "a": n + 1} for n in range(5)])
    examples = load_examples(path, input_column="q", target_column="a", limit=2)
    assert [(example.input, example.targets) for example in examples] == [("0", ("1",)), ("1", ("2",))]


def test_braces_numbers_and_text_after_the_last_field() -> None:
    template = Template("{{{a}}} {b}\n{c}!")
    assert template.fields == ("a", "b", "c")
    row = type("R", (), {"values": {"a": 1, "b": 2.5, "c": "x"}, "where": "here"})()
    example = templated(row, template)
    assert (example.input, example.border, example.targets) == ("{1} 2.5\n", "", ("x!",))


@pytest.mark.parametrize(
    ("template", "fragment"),
    [("{a", "malformed"), ("no field", "names no column"), ("{} => {b}", "plain"), ("{a!r} {b}", "plain")],
)
def test_bad_templates(template: str, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        Template(template)


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"\n\n", "holds no rows"),
    ("broken.jsonl", b'{"input": "a", "target": "b"}\n{"input": "a"\n', "line 2 is not valid JSON"),
    ("list.jsonl", b'["a", "b"]\n', "line 1 holds a list"),
    ("deep.jsonl", b"[" * 100_000 + b"\n", "line 1 is"),
    (
        "missing.jsonl",
        b'{"mr": "a", "refs": ["b"]}\n',
        "its columns are mr, refs: name two of these, or give a template such as",
    ),
    ("null.jsonl", b'{"input": "a", "target": null}\n', 'line 1: column "target" must be text, not None'),
    ("flag.jsonl", b'{"input": true, "target": "x"}\n', 'column "input" must be text, not True'),
    ("none.jsonl", b'{"input": "a", "target": []}\n', "empty list"),
    ("blank.jsonl", b'{"input": "a", "target": " "}\n', "blank"),
    ("surrogate.jsonl", b'{"input": "\\ud83d", "target": "x"}\n', "surrogate"),
    ("latin.jsonl", b'{"input": "caf\xe9", "target": "x"}\n', "not UTF-8"),
    ("ragged.csv", b"input,target\na,b\na,b,c\n", "line 3 has 3 fields but the header names 2"),
    ("twice.csv", b"input,input\na,b\n", "names a column twice"),
    ("quote.csv", b'input,target\n"a"b,c\n', "line 2 is not valid CSV"),
    ("header.csv", b"input,target\n", "holds no rows"),
    ("text.parquet", b"input,target\n", "not a readable Parquet file"),
    ("rows.doc", b"hello\n", "no known format"),
    ("roles.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', "must be the assistant's"),
    ("turns.jsonl", b'{"messages": "hi"}\n', '"messages" must be a list'),
    ("content.jsonl", b'{"messages": [{"role": "user"}]}\n', "messages.content"),
]


@pytest.mark.parametrize(("name", "content", "fragment"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_a_bad_file_is_one_sentence(tmp_path: Path, name: str, content: bytes, fragment: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_examples(tmp_path / name)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_closest_ones(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no file .*trian\.jsonl; did you mean .*train\.jsonl\?"):
        load_examples(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="does not exist either"):
        load_examples(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        load_examples(tmp_path)


def test_a_name_that_is_no_data_set() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="neither a file here nor a data set"):
        load_examples("nobody/no-such-set")


@given(content=st.binary(max_size=60), ending=st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]))
def test_any_bytes_are_examples_or_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{ending}"
    path.write_bytes(content)
    try:
        load_examples(path)
    except SoftPromptError as error:
        message = str(error)
    else:
        message = "fine"
    assert "\n" not in message


# Labels --------------------------------------------------------------------------------------------------------------


def test_labels_are_numbers_or_names(tmp_path: Path) -> None:
    numbers = write_jsonl(tmp_path / "n.jsonl", [{"sentence": "a", "label": 2}, {"sentence": "b", "label": 0}])
    examples, names = load_labelled(numbers)
    assert ([example.label for example in examples], names) == ([2, 0], ["0", "1", "2"])
    words = write_jsonl(tmp_path / "w.jsonl", [{"text": "a", "id": 7, "label": "pos"}, {"text": "b", "label": "neg"}])
    examples, names = load_labelled(words)
    assert ([example.label for example in examples], names) == ([1, 0], ["neg", "pos"])
    test, _ = load_labelled(write_jsonl(tmp_path / "t.jsonl", [{"text": "a", "label": "pos"}]), label_names=names)
    assert test[0].label == 1


@pytest.mark.parametrize(
    ("record", "fragment"),
    [
        ({"sentence": "a", "label": -1}, "start at 0"),
        ({"sentence": "a", "label": 1.5}, "class number or name"),
        ({"sentence": "a"}, 'no column "label"'),
        ({"a": "x", "b": "y", "label": 1}, "name the one that holds the text"),
        ({"sentence": None, "label": 1}, "must be text"),
    ],
)
def test_bad_labels(tmp_path: Path, record: dict[str, Any], fragment: str) -> None:
    with pytest.raises(DataError, match=fragment):
        load_labelled(write_jsonl(tmp_path / "rows.jsonl", [record]))


def test_a_label_that_training_did_not_have(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": "odd"}])
    with pytest.raises(DataError, match="'odd' is not one of neg, pos"):
        load_labelled(path, label_names=["neg", "pos"])


# Encoding ------------------------------------------------------------------------------------------------------------


def test_the_border_is_exact_and_the_target_ends() -> None:
    tokenizer = tiny.tokenizer()
    example = Example("name[The Mill] =>", ("The Mill serves food.",), border=" ")
    encoded = encode(example, tokenizer, max_length=100)
    start = input_ids([example], tokenizer)[0]
    assert encoded.input_ids[: len(start)] == start == tokenizer("name[The Mill] =>")["input_ids"]
    assert encoded.labels[: len(start)] == [IGNORED] * len(start)
    assert encoded.labels[len(start) :] == encoded.input_ids[len(start) :]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.input_ids[:-1]) == "name[The Mill] => The Mill serves food."


@pytest.mark.slow
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=1, max_size=4))
def test_many_at_once_equal_one_at_a_time(texts: list[str]) -> None:
    tokenizer = tiny.tokenizer()
    examples = [Example(text, (text,)) for text in texts]
    assert encode_all(examples, tokenizer, 1000) == [encode(example, tokenizer, 1000) for example in examples]


def test_start_tokens_stay_and_end_tokens_after_the_input_go() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    specials = [("<s>", tiny.BOS), ("</s>", tiny.EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    encoded = encode(Example("the cat", ("sat",)), tokenizer, 100)
    assert encoded.input_ids[0] == tiny.BOS
    assert [place for place, token in enumerate(encoded.input_ids) if token == tiny.EOS] == [len(encoded.input_ids) - 1]


def test_a_sentencepiece_tokenizer_gets_one_space_not_two(assets: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    example = Example("a =>", ("The cat.",), border=" ")
    encoded = encode(example, tokenizer, 100)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "a => The cat."
    whole = tokenizer("a => The cat.")["input_ids"]
    assert encoded.input_ids == [*whole, tokenizer.eos_token_id]


def test_a_chat_learns_the_last_turn_only() -> None:
    tokenizer = tiny.tokenizer()
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "and"), ("assistant", "the dog ran")]
    messages = [{"role": role, "content": content} for role, content in turns]
    example = Example("", ("the dog ran",), messages)
    encoded = encode(example, tokenizer, 150)
    learnt = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == "the dog ran</s>"  # the template's own end, once
    start = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert input_ids([example], tokenizer) == [start]


def test_a_chat_needs_a_chat_template() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="no chat template"):
        encode(Example("", ("b",), messages), tokenizer, 100)


def test_a_chat_template_may_refuse_a_chat() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    messages = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"row 3: .*refuses the messages .roles must alternate"):
        encode(Example("", ("b",), messages, where="row 3"), tokenizer, 100)


def test_a_chat_template_that_changes_the_past_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="cannot be told apart"):
        encode(Example("", ("b",), messages), tokenizer, 100)


def test_a_chat_template_without_an_end_of_turn_gets_the_end_token() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoded = encode(Example("", ("b",), messages), tokenizer, 100)
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


@given(st.text(max_size=30))
def test_any_template_is_parsed_or_refused(text: str) -> None:
    try:
        fields = Template(text).fields
    except ConfigError:
        return
    assert fields


def test_what_does_not_fit_names_row_and_lengths() -> None:
    tokenizer = tiny.tokenizer()
    example = Example("the cat", ("sat on the mat " * 20,), where="train.jsonl line 7")
    fits = len(encode(example, tokenizer, 1000).input_ids)
    assert len(encode(example, tokenizer, fits + 20, room_for_prompt=20).input_ids) == fits
    with pytest.raises(DataError, match=rf"train\.jsonl line 7 does not fit.* room for {fits - 1} beside 20"):
        encode(example, tokenizer, fits + 19, room_for_prompt=20)


def test_nothing_to_start_from() -> None:
    with pytest.raises(DataError, match="the input is empty"):
        encode(Example("", ("x",)), tiny.tokenizer(), 100)


def test_texts_to_classify_are_refused_or_cut(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    examples, _ = load_labelled(write_jsonl(tmp_path / "r.jsonl", [{"text": "the cat sat on the mat", "label": 1}]))
    whole = encode_labels(examples, tokenizer, 100)
    assert whole == [EncodedLabel(tokenizer("the cat sat on the mat")["input_ids"], 1)]
    with pytest.raises(DataError, match="line 1 does not fit"):
        encode_labels(examples, tokenizer, 2)
    assert encode_labels(examples, tokenizer, 2, truncate=True)[0].input_ids == whole[0].input_ids[:2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_side_asked_for(side: str) -> None:
    batch = collate([Encoded([5, 6, 7], [IGNORED, 6, 7]), Encoded([8], [8])], pad_id=9, padding_side=side)
    short = {
        "left": [[9, 9, 8], [0, 0, 1], [IGNORED, IGNORED, 8]],
        "right": [[8, 9, 9], [1, 0, 0], [8, IGNORED, IGNORED]],
    }
    assert [batch[name][1].tolist() for name in ("input_ids", "attention_mask", "labels")] == short[side]
    labels = collate([EncodedLabel([5, 6], 1), EncodedLabel([8], 0)], pad_id=0)["labels"]
    assert torch.equal(labels, torch.tensor([1, 0]))


# The page about data -------------------------------------------------------------------------------------------------


def test_the_examples_in_the_page_about_data_load(root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- (data:|labelled) ?(.*?) ?-->\n```json\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    path = tmp_path / "rows.jsonl"
    for kind, template, rows in blocks:
        path.write_text(rows, encoding="utf-8")
        read: list[Any] = load_labelled(path)[0] if kind == "labelled" else load_examples(path, template or None)
        assert len(read) == len(rows.splitlines())
        if kind == "data:":
            assert encode_all(read, tiny.tokenizer(), 1000)


# The demo's set ------------------------------------------------------------------------------------------------------


def test_the_demo_data_is_what_its_script_writes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_demo_data.py", "--out", str(tmp_path)])
    runpy.run_path(str(root / "scripts" / "make_demo_data.py"), run_name="__main__")
    for path in (demo_data.TRAIN, demo_data.HELD_OUT):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_held_out_cards_join_values_that_no_training_card_joins() -> None:
    def pairs(card: str) -> set[tuple[str, ...]]:
        fields = sorted(card.split(" | "))
        return {(a, b) for a in fields for b in fields if a < b}

    train = load_examples(demo_data.TRAIN, input_column="data", target_column="text")
    held_out = load_examples(demo_data.HELD_OUT, input_column="data", target_column="text")
    seen = set().union(*(pairs(example.input) for example in train))
    assert all(pairs(example.input) - seen for example in held_out)
    values = {field for example in train for field in example.input.split(" | ")}
    assert all(set(example.input.split(" | ")) <= values for example in held_out)
    assert all(len(example.targets) == 3 for example in held_out)
