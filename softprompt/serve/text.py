"""Between text and token ids, apart from the event loop: a megabyte of text takes a second."""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, final

from jinja2 import TemplateError

from softprompt.serve.errors import RequestError, shown
from softprompt.serve.filled import TextRow, in_template, template_of
from softprompt.serve.version import Version

T = TypeVar("T")


@final
class TextCoder:
    """A tokenizer in a thread of its own. It works on a copy: tokenizers are not safe under threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, "softprompt-text")

    async def rows(
        self, texts: Sequence[str] | Sequence[Sequence[int]], version: Version | None, conversation: bool
    ) -> list[TextRow]:
        """Token ids of each text; of ids, the ids. The template of a `version` that has one is filled with a text.

        `conversation`: it has the special tokens already, such as BOS. RequestError for what cannot fill a template.
        """

        def encode(text: str | Sequence[int], template: str | None) -> TextRow:
            if template is None:
                if not isinstance(text, str):
                    return TextRow(tuple(text))
                return TextRow(tuple(self._tokenizer(text, add_special_tokens=not conversation)["input_ids"]))
            if conversation or not isinstance(text, str):
                message = "This prompt stands in a template that a text fills; send one to /v1/completions."
                raise RequestError(400, message, param="model", code="template")
            return in_template(template, text, self._tokenizer)

        def encode_all() -> list[TextRow]:
            template = template_of(version)
            return [encode(text, template) for text in texts]

        return await self._apart(encode_all)

    async def text(self, ids: Sequence[int]) -> str:
        """RequestError for ids outside the vocabulary."""

        def decode() -> str:
            size = len(self._tokenizer)
            if (largest := max(ids)) >= size:
                raise RequestError(400, f"Token id {largest} is outside the vocabulary of {size}.", param="prompt")
            return self._tokenizer.decode(ids)

        return await self._apart(decode)

    async def conversation(self, messages: Sequence[dict[str, str]], param: str) -> str:
        """The text of a conversation up to where the answer begins. RequestError without a template that can say it."""
        if self._tokenizer.chat_template is None:
            message = "The base model's tokenizer has no chat template; use /v1/completions."
            raise RequestError(400, message, code="no_chat_template")

        def render() -> str:
            try:
                return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                message = f"The base model's chat template refuses the conversation: {shown(str(error), 300)}"
                raise RequestError(400, message, param=param, code="chat_template") from error

        return await self._apart(render)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _apart(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
