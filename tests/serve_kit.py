"""A base model with prompts of several methods, served by the transformers engine, and what offline generation says."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedModel

from softprompt import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)
from softprompt.serve.batching import TransformersEngine
from softprompt.serve.engine import Ask, Piece, Sampling
from softprompt.serve.version import Version
from softprompt.together.tasks import fold_task

LENGTHS = {"words": 4, "kv": 6, "ffn": 2, "mlp": 2, "first": 3, "task": 3}
BASE = None
TASK = 1


def configs() -> dict[str, Any]:
    """One per method and length, all for a causal model."""
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    return {
        "words": PromptTuningConfig(num_virtual_tokens=4, **shared),
        "kv": PrefixTuningConfig(num_virtual_tokens=6, **shared),
        "ffn": PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8, **shared),
        "mlp": PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **shared),
        "first": PromptTuningConfig(num_virtual_tokens=3, placement="after_bos", **shared),
        "task": MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, **shared),
    }


@dataclass
class Served:
    """`model` is for offline answers; the engine has a copy of its base model. `versions` by name."""

    model: SoftPromptModel
    engine: TransformersEngine
    versions: dict[str, Version] = field(default_factory=dict)

    def ask(self, name: str | None, ids: list[int], slots: tuple[int, ...] = (), **sampling: Any) -> Ask:
        options = Sampling(**{"max_tokens": 6, "temperature": 0.0, **sampling})
        return Ask("r", tuple(ids), options, None if name is None else self.versions[name], slots)

    def offline(self, name: str | None, ids: list[int], tokens: int = 6, **options: Any) -> list[int]:
        """What the prompt alone answers, greedily."""
        options = {"do_sample": False, "pad_token_id": tiny.PAD, "max_new_tokens": tokens, **options}
        rows = torch.tensor([ids])
        if name is None:
            with self.model.disable_adapter():
                output = self.model.generate(input_ids=rows, **options)
        else:
            self.model.set_adapter(name, inference_mode=True)
            task = {"task_ids": torch.tensor([TASK])} if name == "task" else {}
            output = self.model.generate(input_ids=rows, **task, **options)
        return output[0, len(ids) :].tolist()


def serve(base: PreTrainedModel, folder: Path, tokenizer: Any = None, **limits: Any) -> Served:
    """`base` with every prompt of `configs`, saved below `folder`."""
    found = configs()
    served_base = copy.deepcopy(base)
    model = get_peft_model(base, found["words"], "words")
    for name, config in found.items():
        if name != "words":
            model.add_adapter(name, config)
    torch.manual_seed(5)
    for parameter in model.prompt_encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval()
    engine = TransformersEngine(served_base, tokenizer or tiny.tokenizer(), **limits)
    served = Served(model, engine)
    for number, name in enumerate(found):
        served.versions[name] = saved(model, name, folder, number)
    return served


def saved(model: SoftPromptModel, name: str, folder: Path, number: int) -> Version:
    """The adapter as it is now, in a folder of its own."""
    model.save_pretrained(folder, selected_adapters=[name])
    place = folder / name
    if name == "task":  # of several, each is served as a prompt of its own
        place = folder / f"{name}-{TASK}"
        fold_task(folder / name, place, TASK)
    return Version(name, f"{number:064x}", place, place, "any", LENGTHS[name])


async def answer(engine: TransformersEngine, ask: Ask) -> list[Piece]:
    return [piece async for piece in engine.generate(ask)]


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def running(engine: TransformersEngine, what: Callable[[], Awaitable[Any]]) -> Any:
    """What the coroutine gives while the engine runs; afterwards nothing is left in it."""

    async def whole() -> Any:
        await engine.start()
        try:
            return await what()
        finally:
            await engine.stop()

    return asyncio.run(whole())


def together(engine: TransformersEngine, asks: list[Ask]) -> list[list[Piece]]:
    """All at once."""

    async def whole() -> list[list[Piece]]:
        return list(await asyncio.gather(*(answer(engine, ask) for ask in asks)))

    return running(engine, whole)


def rows(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Texts of 1 to `longest` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, tiny.VOCAB, (size,), generator=generator).tolist() for size in sizes]
