"""A prompted model as the assistant that drafts for another one's `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from softprompt.config import EmbeddingConfig, Placement
from softprompt.injection.encoder_decoder import open_encoder
from softprompt.prompt import KV, evaluating

if TYPE_CHECKING:
    from softprompt.model import SoftPromptModel


@contextmanager
def drafting(assistant: "SoftPromptModel") -> Iterator[Any]:
    """Inside the block: what stands for the assistant.

    transformers runs an assistant's encoder once, outside of the assistant's own `generate`; so that it sees a prompt
    in front of its rows, the way into it is open throughout.
    """
    encoder = assistant.encoder()
    with evaluating(encoder):
        prompt = encoder.prompt()
    config = encoder.config
    if isinstance(prompt, KV) or not assistant.facts.encoder_decoder or not isinstance(config, EmbeddingConfig):
        yield assistant
        return
    with open_encoder(assistant.base_model, prompt, after_first=config.placement is Placement.AFTER_BOS):
        yield assistant.base_model
