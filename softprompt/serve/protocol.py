"""What requests may say: OpenAI's fields one by one, and vLLM's `top_k`, `min_tokens` and `ignore_eos`.

A field that OpenAI has and this server has not is listed with the reason, and refused unless its value asks for
nothing. A field that nobody has is refused too: a misspelt `temprature` that is silently left out gives wrong answers.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from softprompt.serve.engine import Sampling

MOST_STOPS, MOST_CHOICES, MOST_LOGPROBS = 16, 128, 20
LONGEST_STOP = 1024  # characters
MOST_METADATA = 16  # as OpenAI has it


class Refused:
    """Annotates a field that this server has not: only null and `harmless` values, which ask for nothing, pass."""

    def __init__(self, reason: str, *harmless: Any) -> None:
        self.reason, self.harmless = reason, (None, *harmless)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"enum": list(self.harmless), "description": f"Refused: {self.reason}"}

    def _check(self, value: Any) -> None:
        if not any(type(value) is type(each) and value == each for each in self.harmless):
            raise PydanticCustomError("unsupported", "{reason}", {"reason": self.reason})


def _wrong(message: str, field: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("invalid", "{message}", {"message": message, "field": field})


def _text(value: str) -> str:
    """JSON can hold half a surrogate pair, which is no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong("The text contains half of a surrogate pair, which is no character") from None
    return value


def _texts(value: Any) -> list[str] | list[list[int]]:
    """One or several texts, each as a string or as token ids."""
    if isinstance(value, str):
        return [_text(value)]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return [_text(each) for each in value]
        if _ids(value):
            return [value]
        if all(isinstance(each, list) and each and _ids(each) for each in value):
            return value
    raise _wrong("Must be a string, a list of strings, a list of token ids (whole numbers from 0), or a list of those")


def _ids(value: list[Any]) -> bool:
    return all(type(each) is int and 0 <= each < 1 << 31 for each in value)


def _stops(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value or []
    if not isinstance(given, list) or len(given) > MOST_STOPS or not all(isinstance(s, str) and s for s in given):
        raise _wrong(f"Must be a string or a list of up to {MOST_STOPS} strings, none of them empty")
    if any(len(each) > LONGEST_STOP for each in given):
        raise _wrong(f"A stop string may have {LONGEST_STOP:,} characters")
    return tuple(_text(each) for each in given)


def _parts(*kinds: str) -> Callable[[Any], str]:
    """A validator for the content of a message: a string, or a list of text parts, which become lines."""

    def content(value: Any) -> str:
        if isinstance(value, str):
            return _text(value)
        if not isinstance(value, list) or not value:
            raise _wrong("Must be a string or a list of text parts")
        for part in value:
            if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
                raise _wrong(f"This server reads text only: parts of type {' or '.join(kinds)} with a text")
        return "\n".join(_text(part["text"]) for part in value)

    return content


Texts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_texts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)]
Content = Annotated[str, PlainValidator(_parts("text"), json_schema_input_type=str | list[dict[str, Any]])]
InputContent = Annotated[
    str, PlainValidator(_parts("input_text", "output_text"), json_schema_input_type=str | list[dict[str, Any]])
]


class Strict(BaseModel):
    """Nothing is converted and nothing unknown is let through."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; nothing is obfuscated."""


class GenerationRequest(Strict):
    """What all three routes share."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops = ()
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    metadata: dict[str, str] | None = Field(None, max_length=MOST_METADATA)
    user: str | None = None
    """Accepted, like the next four, and without effect."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Annotated[Any, Refused("there are no tiers here.", "auto", "default")] = None
    logit_bias: Annotated[Any, Refused("tokens cannot be favoured here.", {})] = None
    store: Annotated[Any, Refused("nothing is stored here.", False)] = None
    moderation: Annotated[Any, Refused("there is no moderation here.")] = None
    tools: Annotated[Any, Refused("there are no tools here.", [])] = None
    tool_choice: Annotated[Any, Refused("there are no tools here.", "auto", "none")] = None

    @model_validator(mode="after")
    def _streams(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options may be given only with stream: true", "stream_options")
        return self

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """How to choose tokens; fields that were left out have OpenAI's defaults."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            stop=self.stop,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logprobs=logprobs,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Texts
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    best_of: Annotated[Any, Refused("every answer is sent; use n.", 1)] = None
    suffix: Annotated[Any, Refused("nothing can be written before a given ending.", "")] = None

    @model_validator(mode="after")
    def _echoes(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise _wrong("echo cannot be had with logprobs: the text's own tokens get none here", "echo")
        if self.max_tokens == 0 and not self.echo:
            raise _wrong("max_tokens must be at least 1, or 0 with echo", "max_tokens")
        return self


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    tool_calls: Annotated[Any, Refused("there are no tools here.", [])] = None
    function_call: Annotated[Any, Refused("there are no tools here.")] = None
    refusal: Annotated[Any, Refused("a refusal is to be given as content.")] = None
    audio: Annotated[Any, Refused("this server reads text only.")] = None
    annotations: list[Any] | None = None
    """Accepted, as clients send back what they got, and without effect."""


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: Annotated[Any, Refused("answers are text here.", {"type": "text"})] = None
    modalities: Annotated[Any, Refused("answers are text here.", ["text"])] = None
    audio: Annotated[Any, Refused("answers are text here.")] = None
    prediction: Annotated[Any, Refused("predicted outputs are not used here.")] = None
    reasoning_effort: Annotated[Any, Refused("there is no reasoning to be set here.", "none")] = None
    verbosity: Annotated[Any, Refused("there is no verbosity to be set here.", "medium")] = None
    web_search_options: Annotated[Any, Refused("there is no web search here.")] = None
    functions: Annotated[Any, Refused("there are no tools here.", [])] = None
    function_call: Annotated[Any, Refused("there are no tools here.", "none", "auto")] = None

    @model_validator(mode="after")
    def _scores(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs may be given only with logprobs: true", "top_logprobs")
        return self


class InputItem(Strict):
    """A message of `input`; `id`, `status` and `phase` are accepted, as clients send back what they got."""

    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _once(value: Any) -> Any:
    if isinstance(value, list) and len(value) > 1:
        raise _wrong("There is one thing to include, so the list has one item at most")
    return value


class ResponseRequest(GenerationRequest):
    """POST /v1/responses"""

    input: Annotated[
        list[InputItem],
        FailFast(),
        Field(min_length=1),
        BeforeValidator(_items, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: Annotated[str, AfterValidator(_text)] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    include: Annotated[list[Literal["message.output_text.logprobs"]] | None, BeforeValidator(_once)] = None
    text: Annotated[Any, Refused("answers are text here.", {}, {"format": {"type": "text"}})] = None
    truncation: Annotated[Any, Refused("nothing is left out of a text here.", "disabled")] = None
    background: Annotated[Any, Refused("answers are not made in the background here.", False)] = None
    previous_response_id: Annotated[Any, Refused("nothing is stored here; send the whole conversation.")] = None
    conversation: Annotated[Any, Refused("nothing is stored here; send the whole conversation.")] = None
    context_management: Annotated[Any, Refused("nothing is left out of a text here.", [])] = None
    prompt: Annotated[Any, Refused("there are no stored templates here; `model` names the soft prompt.")] = None
    reasoning: Annotated[Any, Refused("there is no reasoning to be set here.", {})] = None
    max_tool_calls: Annotated[Any, Refused("there are no tools here.")] = None
    image: Annotated[Any, Refused("this server reads text only.")] = None
    access_programs: Annotated[Any, Refused("there are no such programs here.")] = None
