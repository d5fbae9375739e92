"""Prompts whose virtual tokens stand inside the text (P-tuning's "anywhere"): they reach vLLM as `prompt_embeds`.

Such a prompt is no prefix of keys and values, since words stand before some of it. The text of a request fills the
prompt's template as `softprompt generate` fills it: the only field, or a JSON object of several.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import embeds_input
from vllm.sampling_params import SamplingParams

from softprompt.config import EmbeddingConfig, Placement
from softprompt.errors import SoftPromptError, UnsupportedError
from softprompt.serve.filled import in_template
from softprompt.serve.version import Version
from softprompt.serve.vllm.entered import Entered, check_free, token_ids, within
from softprompt.serve.vllm.marks import salt_of

KEPT = 256  # prompts


@dataclass(frozen=True)
class _Prompt:
    """`vectors` `[p, d]` in the model's type; `template` None: they stand behind the first token of any text."""

    vectors: Tensor
    template: str | None


@final
class Slots:
    """Lays requests out for the engine whose `VllmConfig` is given; `tokenizer` is the base model's."""

    def __init__(self, vllm_config: Any, tokenizer: Any) -> None:
        self._config, self._tokenizer = vllm_config.model_config, tokenizer
        self._zeroed = vllm_config.use_v2_model_runner  # it takes the ids in the slots for words, as zeros
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()

    def enter(
        self, prompt: Mapping[str, Any], params: SamplingParams, version: Version, max_length: int, fills: bool = True
    ) -> Entered:
        """As `softprompt.serve.vllm.entered.enter`, for a prompt with slots; `fills`: texts may fill templates."""
        check_free(prompt, params)
        if not self._config.enable_prompt_embeds:
            raise VLLMValidationError(
                f"the prompt {version.name!r} stands inside the text, which needs --enable-prompt-embeds when the "
                "server is started."
            )
        try:
            found = self._prompt(version)
            if found.template is not None and not fills:
                raise VLLMValidationError(_fill(version), parameter="model")
            self._check(params, version)
            ids, slots = self._row(found, prompt, version)
        except SoftPromptError as error:
            raise VLLMValidationError(str(error)) from error
        real = [token for token, slot in zip(ids, slots, strict=True) if slot < 0]
        virtual = len(ids) - len(real)
        params = within(params, max_length - len(ids), version, len(real))
        embeds = torch.zeros(len(ids), found.vectors.shape[1], dtype=found.vectors.dtype)
        places = torch.tensor(slots)
        embeds[places >= 0] = found.vectors[places[places >= 0]]
        row = embeds_input(
            embeds,
            prompt=prompt.get("prompt"),
            cache_salt=salt_of(version.digest, prompt.get("cache_salt")),
            prompt_token_ids=[token if slot < 0 else real[0] for token, slot in zip(ids, slots, strict=True)],
            is_token_ids=[slot < 0 for slot in slots],
        )
        return Entered(dict(row), params, real, virtual)

    def _check(self, params: SamplingParams, version: Version) -> None:
        if params.prompt_logprobs is not None:
            raise VLLMValidationError(f"there are no log-probabilities of a text with {version.name!r} inside.")
        if self._zeroed and params.repetition_penalty != 1.0:
            raise VLLMValidationError(
                f"repetition_penalty={params.repetition_penalty} would count the virtual tokens of {version.name!r} as "
                "the word with id 0; send 1, or start the server with VLLM_USE_V2_MODEL_RUNNER=0.",
                parameter="repetition_penalty",
            )

    def _prompt(self, version: Version) -> _Prompt:
        if version.digest not in self._prompts:
            self._prompts[version.digest] = _read(version, self._config.dtype)
            if len(self._prompts) > KEPT:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(version.digest)
        return self._prompts[version.digest]

    def _row(self, found: _Prompt, prompt: Mapping[str, Any], version: Version) -> tuple[list[int], list[int]]:
        """Token ids, and for each the virtual token that stands in its place, or −1."""
        if found.template is None:
            ids, virtual = token_ids(prompt), list(range(len(found.vectors)))
            plain = [-1] * (len(ids) - 1)
            return [ids[0], *[0] * len(virtual), *ids[1:]], [-1, *virtual, *plain]
        ids, text = list(prompt.get("prompt_token_ids") or []), prompt.get("prompt")  # an empty text may fill it too
        if not isinstance(text, str):
            raise VLLMValidationError(_fill(version), parameter="prompt")
        if not any(ids == self._tokenizer.encode(text, add_special_tokens=special) for special in (True, False)):
            raise VLLMValidationError(
                f"{_fill(version)} The token ids of this request are not those of its text, as after "
                "truncate_prompt_tokens: shorten the text itself.",
                parameter="prompt",
            )
        row = in_template(found.template, text, self._tokenizer)
        return list(row.ids), list(row.slots) or [-1] * len(row.ids)


def _fill(version: Version) -> str:
    return (
        f"the prompt {version.name!r} has a template, which the whole text of a request fills: send it to "
        "/v1/completions as `prompt`, in words and not as token ids."
    )


def _read(version: Version, dtype: torch.dtype) -> _Prompt:
    from softprompt.checkpoint import load_adapter
    from softprompt.methods import PromptEncoderConfig, PromptTuningConfig

    saved = load_adapter(version.folder)
    config = saved.config
    if not isinstance(config, EmbeddingConfig) or type(config) not in (PromptTuningConfig, PromptEncoderConfig):
        raise UnsupportedError(
            f"{version.name!r} is a {version.method} prompt, which cannot stand inside the text here."
        )
    vectors = saved.tensors["prompt_embeddings"][: config.num_virtual_tokens].to(dtype)
    return _Prompt(vectors, config.template if config.placement is Placement.TEMPLATE else None)
