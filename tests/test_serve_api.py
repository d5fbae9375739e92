"""The server's API by OpenAI's client: each prompt answers over HTTP what it answers offline, on every route."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from api_kit import BASE, CARD, LENGTHS, TEXT, Api, Prompts, complete, serving, write_prompts
from openai import OpenAI

NAMES = (BASE, "kv", "words", "team/guest")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def api(prompts: Prompts) -> Iterator[Api]:
    with serving(prompts.folder) as api:
        yield api


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[OpenAI]:
    with api.client() as client:
        yield client


@pytest.fixture(scope="module")
def lenient(api: Api) -> Iterator[OpenAI]:
    with api.client(strict=False) as client:
        yield client


def chatted(text: str) -> str:
    """What the embedded model's template makes of one message, but for the first token."""
    return f"User: {text}\nAssistant:"


# ---- answers -----------------------------------------------------------------------------------------------------


def test_the_answers_are_the_prompts_own(prompts: Prompts, client: OpenAI) -> None:
    offline = {name: prompts.offline(name) for name in NAMES}
    assert len(set(offline.values())) == len(NAMES)  # else a mix-up could not be seen
    for name, expected in offline.items():
        answer = complete(client, name)
        assert answer.choices[0].text == expected, name
        assert answer.model == name


def test_usage_counts_real_tokens_and_virtual_ones_apart(prompts: Prompts, client: OpenAI) -> None:
    for name in NAMES:
        usage = complete(client, name, tokens=3, extra_body={"ignore_eos": True}).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompts.ids()), 3)
        assert usage.total_tokens == usage.prompt_tokens + 3
        assert usage.prompt_tokens_details.virtual_tokens == LENGTHS.get(name, 0)


def test_several_texts_and_token_ids(prompts: Prompts, client: OpenAI) -> None:
    texts = [TEXT, "The", "She"]
    whole = complete(client, prompt=texts)
    expected = [prompts.offline("kv", text) for text in texts]
    assert [choice.text for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage.prompt_tokens == sum(len(prompts.ids(text)) for text in texts)
    assert whole.usage.prompt_tokens_details.virtual_tokens == 3 * LENGTHS["kv"]
    assert [c.text for c in complete(client, prompt=[prompts.ids(text) for text in texts]).choices] == expected
    assert complete(client, prompt=prompts.ids()).choices[0].text == expected[0]


def test_a_template_is_filled(prompts: Prompts, client: OpenAI) -> None:
    answer = complete(client, "filled", CARD)
    assert answer.choices[0].text.strip() == prompts.offline_filled(CARD)
    assert answer.usage.prompt_tokens_details.virtual_tokens == LENGTHS["filled"]
    assert answer.usage.prompt_tokens == len(
        prompts.ids(f"{CARD} =>")
    )  # the template's own words are read like any others
    with pytest.raises(openai.BadRequestError, match="template"):
        complete(client, "filled", prompts.ids())
    with pytest.raises(openai.BadRequestError, match="template"):
        client.responses.create(model="filled", input="x")


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"echo": True}, {"logprobs": 2}, {"prompt": [TEXT, "She"]}])
def test_a_stream_is_the_whole_answer_in_pieces(lenient: OpenAI, options: dict[str, Any]) -> None:
    whole = complete(lenient, **options)
    chunks = list(complete(lenient, **options, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks[:-1])
    for choice in whole.choices:
        pieces = [c for chunk in chunks[:-1] for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert len(pieces) > 2
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [choice.finish_reason]
        if choice.logprobs:
            for table in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [value for piece in pieces if piece.logprobs for value in getattr(piece.logprobs, table)]
                assert joined == getattr(choice.logprobs, table), table


def test_no_usage_in_a_stream_unless_asked(lenient: OpenAI) -> None:
    chunks = list(complete(lenient, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_stop_string_ends_the_answer_before_it(prompts: Prompts, client: OpenAI, lenient: OpenAI) -> None:
    expected = prompts.offline("kv", tokens=12)
    stop = expected[len(expected) // 2 :][:3]
    cut = expected[: expected.index(stop)]
    answer = complete(client, tokens=12, stop=["never there", stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    chunks = list(complete(lenient, tokens=12, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert complete(client, tokens=2).choices[0].finish_reason == "length"


def test_echo_has_the_text_and_no_virtual_tokens(prompts: Prompts, client: OpenAI) -> None:
    assert complete(client, echo=True).choices[0].text == TEXT + prompts.offline("kv")
    ids = prompts.ids()
    assert complete(client, prompt=ids, echo=True).choices[0].text == prompts.tokenizer.decode(ids) + prompts.offline(
        "kv"
    )
    alone = complete(client, echo=True, tokens=0, n=2)
    assert [choice.text for choice in alone.choices] == [TEXT, TEXT]
    assert (alone.usage.completion_tokens, alone.choices[0].finish_reason) == (0, "length")


def test_log_probabilities_are_the_prompts_own(prompts: Prompts, client: OpenAI) -> None:
    choice = complete(client, "words", logprobs=5).choices[0]
    scores = prompts.scores("words", TEXT, choice.text)
    table = choice.logprobs
    assert "".join(table.tokens) == choice.text and len(table.tokens) == len(scores)
    assert table.text_offset == [len("".join(table.tokens[:place])) for place in range(len(table.tokens))]
    best, places = scores.topk(5)
    torch.testing.assert_close(torch.tensor(table.token_logprobs), best[:, 0], atol=1e-4, rtol=0)
    for found, values, ids in zip(table.top_logprobs, best.tolist(), places.tolist(), strict=True):
        expected = {prompts.tokenizer.decode([token]): value for token, value in zip(ids, values, strict=True)}
        assert found == pytest.approx(expected, abs=1e-4)


def test_seeds(client: OpenAI) -> None:
    def drawn(**more: Any) -> list[str]:
        options = {"model": "kv", "prompt": TEXT, "max_tokens": 8, "temperature": 1.5, **more}
        return [choice.text for choice in client.completions.create(**options).choices]

    first = drawn(seed=7, n=3)
    assert drawn(seed=7, n=3) == first  # again
    assert len(set(first)) == 3  # each choice draws for itself
    assert drawn(seed=8, n=1) == [first[1]]  # the second choice has the next seed
    assert drawn(seed=9999) != first[:1]


# ---- conversations -----------------------------------------------------------------------------------------------


def test_a_conversation_is_its_template(prompts: Prompts, client: OpenAI) -> None:
    expected = prompts.offline("kv", chatted("Hello."))
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]
    options: dict[str, Any] = {"model": "kv", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == expected
    assert whole.usage and whole.usage.prompt_tokens == len(prompts.ids(chatted("Hello.")))
    assert whole.choices[0].logprobs and whole.choices[0].logprobs.content
    scores = whole.choices[0].logprobs.content
    assert "".join(each.token for each in scores) == expected
    assert all(each.top_logprobs[0].token == each.token and len(each.top_logprobs) == 2 for each in scores)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", None]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage == whole.usage


def test_the_roles_of_a_conversation(prompts: Prompts, client: OpenAI) -> None:
    first = client.chat.completions.create(
        model="kv", messages=[{"role": "user", "content": "A"}], max_tokens=4, temperature=0, n=2, seed=1
    )
    assert [choice.index for choice in first.choices] == [0, 1]
    sent_back: Any = first.choices[0].message.model_dump()
    turns: list[Any] = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "A"}, sent_back,
                        {"role": "user", "content": "B"}]  # fmt: skip
    answer = client.chat.completions.create(model="kv", messages=turns, max_tokens=4, temperature=0)
    text = f"System: Be kind.\nUser: A\nAssistant: {sent_back['content']}\nUser: B\nAssistant:"
    assert answer.choices[0].message.content == prompts.offline("kv", text, tokens=4)


def test_without_a_limit_an_answer_ends_with_the_context(prompts: Prompts) -> None:
    with serving(prompts.folder, max_length=48) as api, api.client() as client:
        messages: Any = [{"role": "user", "content": "A"}]
        usage = client.chat.completions.create(model="kv", messages=messages, extra_body={"ignore_eos": True}).usage
        assert usage and usage.total_tokens + LENGTHS["kv"] == 48
        text = " dog" * 42
        with pytest.raises(openai.BadRequestError) as error:
            complete(client, prompt=text)
        assert error.value.code == "context_length_exceeded" and f"{LENGTHS['kv']} virtual" in error.value.message
        assert (
            complete(client, BASE, text, 100, extra_body={"ignore_eos": True}).usage.total_tokens == 48
        )  # fits without the prompt
        assert [model.max_model_len for model in client.models.list().data] == [48] * 5  # type: ignore[attr-defined]


# ---- responses ---------------------------------------------------------------------------------------------------


def test_a_response(prompts: Prompts, client: OpenAI) -> None:
    expected = prompts.offline("kv", chatted("Hello."))
    whole = client.responses.create(model="kv", input="Hello.", max_output_tokens=8, temperature=0, metadata={"a": "b"})
    assert (whole.output_text, whole.status) == (expected, "incomplete")
    assert whole.incomplete_details and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage and whole.usage.input_tokens == len(prompts.ids(chatted("Hello.")))
    assert whole.usage.input_tokens_details.virtual_tokens == LENGTHS["kv"]  # type: ignore[attr-defined]
    assert whole.usage.total_tokens == whole.usage.input_tokens + 8 and whole.metadata == {"a": "b"}
    stop = expected[-4:]
    ended = client.responses.create(model="kv", input="Hello.", temperature=0, extra_body={"stop": stop})
    assert (ended.output_text, ended.status) == (expected[: expected.index(stop)], "completed")


def test_the_conversation_of_a_response(prompts: Prompts, client: OpenAI) -> None:
    first = client.responses.create(model="kv", input="A", max_output_tokens=4, temperature=0)
    asked = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "B"}]}
    turns: list[Any] = [{"role": "user", "content": "A"}, *[item.model_dump() for item in first.output], asked]
    second = client.responses.create(
        model="kv", input=turns, instructions="Be kind.", max_output_tokens=4, temperature=0
    )
    text = f"System: Be kind.\nUser: A\nAssistant: {first.output_text}\nUser: B\nAssistant:"
    assert second.output_text == prompts.offline("kv", text, tokens=4)


def test_the_events_of_a_response(prompts: Prompts, client: OpenAI) -> None:
    expected = prompts.offline("kv", chatted("Hello."))
    options: dict[str, Any] = {"model": "kv", "input": "Hello.", "max_output_tokens": 8, "temperature": 0}
    scored: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    events = list(client.responses.create(**options, **scored, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == ["created", "in_progress", "output_item.added", "content_part.added",
                     *["output_text.delta"] * len(deltas), "output_text.done", "content_part.done",
                     "output_item.done", "incomplete"]  # fmt: skip
    assert "".join(event.delta for event in deltas) == expected and len(deltas) > 2
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == expected
    (message,) = last.response.output
    assert message.type == "message" and message.content[0].type == "output_text"
    scores = message.content[0].logprobs
    assert scores and "".join(each.token for each in scores) == expected
    assert [each.token for event in deltas for each in event.logprobs] == [each.token for each in scores]
    stop = expected[-3:]
    with client.responses.stream(**options, extra_body={"stop": stop}) as stream:  # the client's own way to join events
        assert stream.get_final_response().output_text == expected[: expected.index(stop)]
