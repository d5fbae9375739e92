"""A request with a prompt as vLLM's engine gets it, and the engine's answer as the client gets it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from softprompt.serve.version import Version
from softprompt.serve.vllm.marks import DIGEST, LENGTH, SALT, salt_of

PLACEHOLDER = 0  # an id that every vocabulary has


@dataclass(frozen=True)
class Entered:
    """A request as the engine gets it. `ids`: its real token ids; `virtual`: how many tokens it has besides.

    `prompt`: the engine's input, with the virtual tokens.
    """

    prompt: dict[str, Any]
    params: SamplingParams
    ids: list[int]
    virtual: int


def enter(prompt: Mapping[str, Any], params: SamplingParams, version: Version, max_length: int) -> Entered:
    """A request for token ids behind the prompt `version`; `prompt` and `params` stay as they are.

    `max_length`: of virtual tokens, text and answer; the answer's `max_tokens` becomes what there is room for.
    VLLMValidationError for what cannot be answered with this prompt.
    """
    check_free(prompt, params)
    ids = token_ids(prompt)
    params = within(params, max_length - version.length - len(ids), version, len(ids))
    # The penalty for repetition counts what stands in the prompt: there a placeholder must not be a new word.
    placeholder = PLACEHOLDER if params.repetition_penalty == 1.0 else ids[0]
    extra = params.extra_args or {}
    transfer = {**(extra.get("kv_transfer_params") or {}), DIGEST: version.digest, LENGTH: version.length}
    params.extra_args = {**extra, "kv_transfer_params": transfer}
    entered = {
        **{name: value for name, value in prompt.items() if name != "prompt_token_offsets"},
        "prompt_token_ids": [placeholder] * version.length + ids,
        "cache_salt": salt_of(version.digest, prompt.get("cache_salt")),
    }
    return Entered(entered, params, ids, version.length)


def check_free(prompt: Any, params: Any) -> None:
    """VLLMValidationError for a request that says itself what only this way says."""
    extra = params.extra_args if isinstance(params, SamplingParams) else None
    transfer = (extra or {}).get("kv_transfer_params")
    if transfer is not None and not isinstance(transfer, dict):
        raise VLLMValidationError("kv_transfer_params must be an object.", parameter="kv_transfer_params")
    if transfer and (DIGEST in transfer or LENGTH in transfer):
        raise VLLMValidationError(
            f"kv_transfer_params may not have {DIGEST!r} or {LENGTH!r}; ask for a prompt by its name, as the model.",
            parameter="kv_transfer_params",
        )
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if isinstance(salt, str) and salt.startswith(SALT):
        raise VLLMValidationError(f"a cache_salt may not begin with {SALT!r}.", parameter="cache_salt")


def token_ids(prompt: Mapping[str, Any]) -> list[int]:
    """Of a text; VLLMValidationError for anything else, and for none."""
    if not isinstance(prompt, Mapping) or prompt.get("type", "token") != "token":
        raise VLLMValidationError("a prompt stands before text only, not before images, sound or embeddings.")
    ids = prompt.get("prompt_token_ids")
    if not ids:
        raise VLLMValidationError("the text is empty; a prompt needs at least one token behind it to go on from.")
    return list(ids)


def check_room(room: int, version: Version, length: int) -> None:
    """VLLMValidationError where a text of `length` tokens leaves none for the answer."""
    if room < 1:
        raise VLLMValidationError(
            f"the text has {length} tokens, which with the {version.length} virtual ones of {version.name!r} leaves no "
            "room for an answer; shorten it.",
            parameter="prompt",
        )


def within(params: SamplingParams, room: int, version: Version, length: int) -> SamplingParams:
    """A copy that asks for at most `room` tokens. VLLMValidationError where there is none, or not enough."""
    check_room(room, version, length)
    params = params.clone()
    if params.prompt_logprob_token_ids is not None:
        raise VLLMValidationError("prompt_logprob_token_ids is not there for requests with a prompt.")
    if params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, room)
    if params.min_tokens > room:
        raise VLLMValidationError(f"min_tokens={params.min_tokens}, but there is room for {room} tokens only.")
    return params


def leave(output: RequestOutput, entered: Entered) -> RequestOutput:
    """The engine's output without the virtual tokens."""
    output = copy.copy(output)
    output.prompt_token_ids = entered.ids
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = max(0, output.num_cached_tokens - entered.virtual)
    if output.num_cache_creation_tokens is not None:
        output.num_cache_creation_tokens = max(0, output.num_cache_creation_tokens - entered.virtual)
    output.kv_transfer_params = None
    return output
