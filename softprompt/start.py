"""Starting a prompt from training examples: the first tokens that fit, or the best of several draws by its loss.

Where a prompt starts is worth more than how it is trained (benchmarks/results/defaults.md), and the user's own training
data is the best text there is to start from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from softprompt.errors import ConfigError
from softprompt.initialize import initialize_from_text
from softprompt.model import SoftPromptModel
from softprompt.prompt import SoftPrompt, evaluating

DRAW = 1_000_003  # between the seeds of two draws


@final
@dataclass(frozen=True)
class Started:
    """Which start a prompt has, by name, and the losses of all that were compared (none where there was no choice).

    `misfit` is how far the prompt is from what it was started from, relative to its size: 0 but for an encoder (FFN,
    MLP, LSTM) with fewer hidden units than the prompt has tokens.
    """

    start: str
    losses: Mapping[str, float] = field(default_factory=dict)
    misfit: float = 0.0


def initialize_from_examples(
    model: SoftPromptModel,
    tokenizer: Any,
    examples: Sequence[str],
    *,
    instruction: str | None = None,
    candidates: int = 1,
    loss: Callable[[], float] | None = None,
    seed: int = 0,
    adapter_name: str | None = None,
) -> Started:
    """Start any prompt from training examples, each as it stands in your training text; then train it in your own loop.

    The text is `instruction` and then examples, one per line in an order drawn from `seed`, over again where they are
    few. Its first `num_virtual_tokens` tokens become word embeddings, or the base model's own keys and values: what the
    prompt is made of. An encoder (FFN, MLP, LSTM) stays as it was drawn but for its last layer, which is solved for to
    put out just that.

    With `candidates=N`, N draws of examples, random words of the vocabulary and the start that the prompt has now are
    compared by `loss`, and the best one is kept. `loss` gives the loss of the model as it is at the time, on a few
    training batches – of rows that are not among `examples`, for a prompt that holds a row predicts it. It is called
    N + 2 times, without gradient and without dropout: with four batches that costs about as much as 2·(N + 2) steps.

        batches = [collate(rows[n : n + 16]) for n in range(0, 64, 16)]
        loss = lambda: sum(float(model(**batch).loss) for batch in batches) / len(batches)
        initialize_from_examples(model, tokenizer, texts[64:], candidates=4, loss=loss)

    Raises ConfigError for examples without text, an instruction that leaves them no room, or candidates without a loss.
    A CPT prompt has labels in its context, which texts do not show: use `CPTConfig.with_examples` before the model.
    """
    encoder = model.encoder(adapter_name)
    count = virtual_tokens(encoder)
    texts = [
        examples_text([examples[n] for n in drawn(len(examples), seed, draw)], tokenizer, count, instruction)
        for draw in range(candidates)
    ]
    if candidates == 1:
        misfit = initialize_from_text(model, tokenizer, texts[0], adapter_name)
        return Started("examples", misfit=misfit)
    if loss is None:
        raise ConfigError(f"candidates={candidates} are compared by their loss; give a function as loss")
    begin = partial(initialize_from_text, model, tokenizer, adapter_name=adapter_name)
    starts = starts_of(texts, vocabulary_text(tokenizer, count, seed), begin)
    with evaluating(model):
        return best_of(encoder, starts, loss)


Begin = Callable[[], float]
"""Starts a prompt and gives its misfit."""


def starts_of(texts: Sequence[str], words: str, begin: Callable[[str], float]) -> dict[str, Begin]:
    """The starts to compare, by name: from texts, from words of the vocabulary, and as the prompt is."""
    named = {f"examples, draw {number}": partial(begin, text) for number, text in enumerate(texts)}
    return {**named, "vocabulary": partial(begin, words), "random": lambda: 0.0}


@torch.no_grad()
def best_of(encoder: SoftPrompt, starts: Mapping[str, Begin], loss: Callable[[], float]) -> Started:
    """Leave `encoder` with the start of the lowest loss, the first of equals; each begins from what it is now."""
    tensors = [*encoder.parameters(), *encoder.buffers()]
    fresh = _copies(tensors)
    losses: dict[str, float] = {}
    best, kept, least = Started(""), fresh, math.inf
    for name, begin in starts.items():
        _put(tensors, fresh)
        misfit = begin()
        losses[name] = float(loss())
        if not best.start or losses[name] < least or math.isnan(least):
            best, kept, least = Started(name, losses, misfit), _copies(tensors), losses[name]
    _put(tensors, kept)
    return best


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [each.detach().clone() for each in tensors]


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for each, value in zip(tensors, values, strict=True):
        each.copy_(value)


def virtual_tokens(encoder: SoftPrompt) -> int:
    """How many tokens of text the prompt takes."""
    return encoder.embedding.num_embeddings


def drawn(count: int, seed: int, draw: int = 0) -> list[int]:
    """The numbers of `count` examples in the order of one draw."""
    generator = torch.Generator().manual_seed((seed + DRAW * draw) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


def examples_text(texts: Sequence[str], tokenizer: Any, tokens: int, instruction: str | None = None) -> str:
    """`instruction` and then the texts, one per line, over again where they are few: more than `tokens` tokens.

    ConfigError for texts that hold no tokens, and for an instruction that leaves them no room.
    """
    text = f"{instruction}\n" if instruction else ""
    taken = length = _count(text, tokenizer)
    if taken >= tokens:
        raise ConfigError(
            f"the instruction takes {taken} tokens, so num_virtual_tokens={tokens} leaves no room for examples; "
            "shorten it, use more virtual tokens, or start from it alone (init: text)"
        )
    used = 0
    while used == 0 or length <= tokens:
        if (used >= len(texts) and length == taken) or not any(each.strip() for each in texts):
            raise ConfigError("there is no text in the training examples to start from; use init: vocab or random")
        text += texts[used % len(texts)] + "\n"
        used, length = used + 1, _count(text, tokenizer)
    return text


def vocabulary_text(tokenizer: Any, tokens: int, seed: int) -> str:
    """Random words of the vocabulary, at least ``tokens`` tokens of them."""
    special = set(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    words: list[int] = []
    while True:
        drawn_ids = torch.randint(len(tokenizer), (2 * tokens,), generator=generator).tolist()
        words += [number for number in drawn_ids if number not in special]
        text = str(tokenizer.decode(words))
        if _count(text, tokenizer) > tokens:
            return text


def _count(text: str, tokenizer: Any) -> int:
    """Tokens of a text without special ones; asked quietly, since a tokenizer warns of texts beyond its length."""
    ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return len(ids)
