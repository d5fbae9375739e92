"""The way between vLLM's API and its engine: what a request with a prompt is turned into, and its answer back.

vLLM's handlers know names of LoRA adapters; a prompt's name is one to them, and means a `PromptModel`. `PromptClient`
stands in the place of their engine client. It puts placeholders before the text of a request for a prompt and takes
them off its answers, and lets nothing through that would reach a prompt past this way.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from copy import copy
from typing import Any, final
from uuid import uuid4

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from softprompt.serve.version import Version
from softprompt.serve.vllm.entered import Entered, check_free, check_room, enter, leave, token_ids
from softprompt.serve.vllm.slots import Slots


class PromptModel(LoRARequest, kw_only=True, weakref=True):
    """What vLLM's handlers hold for a prompt's name: one version of it. It never reaches the engine.

    `search`: the request is a step of a beam search for that model, which it holds as long as it is under way.
    """

    version: Version
    search: "PromptModel | None" = None


@final
class PromptClient:
    """An engine client with prompts. `counted` is told of each text: the prompt's name, and its virtual tokens.

    `fills`: what comes here are texts as clients wrote them, which may fill a prompt's template.
    """

    def __init__(
        self, engine: Any, counted: Callable[[str, int], None] = lambda name, virtual: None, fills: bool = True
    ) -> None:
        self._engine, self._counted, self._fills = engine, counted, fills
        self._slots = Slots(engine.vllm_config, engine.renderer.tokenizer)

    def __getattr__(self, name: str) -> Any:
        """All the rest is the engine's own."""
        return getattr(self._engine, name)

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        **more: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As the engine's; what is wrong with a request is raised here and not by the first step of the generator."""
        if not isinstance(lora_request, PromptModel):
            check_free(prompt, sampling_params)
            return self._engine.generate(prompt, sampling_params, request_id, lora_request=lora_request, **more)
        version, longest = lora_request.version, self._engine.model_config.max_model_len
        if version.slots:
            entered = self._slots.enter(prompt, sampling_params, version, longest, self._fills)
        else:
            entered = enter(prompt, sampling_params, version, longest)
        if lora_request.search is None:
            self._counted(version.name, entered.virtual)
        return self._answers(entered, request_id, lora_request, more)

    def encode(self, *args: Any, lora_request: LoRARequest | None = None, **more: Any) -> Any:
        if isinstance(lora_request, PromptModel):
            raise VLLMValidationError(f"the prompt {lora_request.lora_name!r} is there for generation only.")
        return self._engine.encode(*args, lora_request=lora_request, **more)

    def not_filling(self) -> "PromptClient":
        """The same for conversations and token ids."""
        return PromptClient(self._engine, self._counted, fills=False)

    def beams(self, search: Callable[..., AsyncGenerator[RequestOutput, None]]) -> Callable[..., Any]:
        """`search`, a handler's beam search, with prompts. Each of its steps comes to `generate` as a request."""

        def searching(
            *, prompt: Any, params: BeamSearchParams, lora_request: LoRARequest | None = None, **more: Any
        ) -> AsyncGenerator[RequestOutput, None]:
            if isinstance(lora_request, PromptModel):
                params = self._searched(prompt, params, lora_request.version)
                step = copy(lora_request)
                step.search, lora_request = lora_request, step
            return search(prompt=prompt, params=params, lora_request=lora_request, **more)

        return searching

    def _searched(self, prompt: Mapping[str, Any], params: BeamSearchParams, version: Version) -> BeamSearchParams:
        """Beams as long as there is room for, as other answers are. VLLMValidationError."""
        if version.slots:  # vLLM's steps go on from the text alone, and have lost the tokens that were found
            raise VLLMValidationError(
                f"there is no beam search with {version.name!r}, whose virtual tokens stand inside the text; ask "
                "without use_beam_search.",
                parameter="use_beam_search",
            )
        check_free(prompt, params)
        length = len(token_ids(prompt))
        room = self._engine.model_config.max_model_len - version.length - length
        check_room(room, version, length)
        self._counted(version.name, version.length)
        params = copy(params)
        params.max_tokens = min(params.max_tokens, room)
        return params

    async def _answers(
        self, entered: Entered, request_id: str, model: PromptModel, more: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """`model` is held until the end, and with it the prompt's file."""
        scores = None
        if entered.params.prompt_logprobs is not None:
            scores = await self._prompt_logprobs(entered, request_id, more)
            entered.params.prompt_logprobs = None
        once = entered.params.output_kind is RequestOutputKind.DELTA
        outputs = self._engine.generate(entered.prompt, entered.params, request_id, **more)
        try:
            async for output in outputs:
                output = leave(output, entered)
                output.lora_request = model
                output.prompt_logprobs = scores
                yield output
                scores = None if once else scores
        finally:
            await outputs.aclose()

    async def _prompt_logprobs(self, entered: Entered, request_id: str, more: dict[str, Any]) -> list[Any]:
        """Of each real token the log-probabilities at its place, as vLLM gives them; the first has none.

        They come from a request of its own. vLLM's runner leaves what it has not computed, here the virtual tokens'
        part, as whatever was in memory: numbers that no tokenizer must see. And blocks from the cache have none, so
        the request shares none. A token that is part of a character reads "�", without regard to its neighbours.
        """
        asked, params = entered.params, entered.params.clone()
        params.n, params.max_tokens, params.min_tokens, params.logprobs, params.logprob_token_ids = 1, 1, 0, None, None
        params.detokenize, params.stop, params.structured_outputs = False, [], None
        params.flat_logprobs, params.output_kind = False, RequestOutputKind.FINAL_ONLY
        params.skip_reading_prefix_cache = False
        prompt = {**entered.prompt, "cache_salt": f"{entered.prompt['cache_salt']}@{uuid4().hex}"}
        outputs = [output async for output in self._engine.generate(prompt, params, f"{request_id}-scores", **more)]
        count = len(entered.ids) - 1
        found = list(outputs[-1].prompt_logprobs or [])[-count:] if outputs and count else []
        if len(found) != count:
            raise VLLMValidationError("the engine gave no log-probabilities for the text; ask again without them.")
        tokenizer = self._engine.renderer.tokenizer if asked.detokenize else None
        for place in found:
            words = convert_ids_list_to_tokens(tokenizer, list(place)) if tokenizer is not None else [None] * len(place)
            for entry, word in zip(place.values(), words, strict=True):
                entry.decoded_token = word
        return [None, *found]
