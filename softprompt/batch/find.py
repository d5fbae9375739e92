"""Which prompt a name means: an adapter of the model or of its store, folded and kept where it can be."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from softprompt.config import EmbeddingConfig, Placement, PromptConfig
from softprompt.elsewhere import word_table
from softprompt.errors import ConfigError, RowsError, SoftPromptError, UnsupportedError
from softprompt.fold import Folded, fold_and_predict
from softprompt.fold_cache import Stamp, frozen
from softprompt.prompt import KV, Embeddings
from softprompt.store.loaded import LoadedPrompt

if TYPE_CHECKING:
    from softprompt.model import SoftPromptModel

BASE = "__base__"
"""The name of no adapter: rows that the base model gets as they are."""

Unit = tuple[str, int | None]
"""One prompt: an adapter and, of an adapter of several tasks, the task."""


@dataclass(frozen=True)
class Chosen:
    """The prompt of one unit as it was found, None for no prompt, and where its vectors stand in a row."""

    prompt: Embeddings | KV | Folded | None
    placement: Placement | None = None


class Finder:
    """Finds the prompts of a batch's rows. `labelled`: the call has a label for every token."""

    def __init__(self, model: "SoftPromptModel", names: list[str], labelled: bool) -> None:
        self.model = model
        self.labelled = labelled
        self.stored: dict[str, LoadedPrompt] = {}
        self.failed: dict[str, SoftPromptError] = {}
        others = {name for name in names if name != BASE and name not in model.peft_config}
        if model.store is not None and others:
            self.stored, self.failed = model.store.load(others, model.facts)

    def tasks(self, name: str) -> int:
        """Of how many tasks an adapter has a prompt each."""
        if name in self.stored:
            return self.stored[name].num_tasks
        return self.model.encoder(name).num_tasks if name in self.model.peft_config else 1

    def all(self, units: list[Unit], rows: list[int]) -> list[Chosen]:
        """The prompts of the units; RowsError with every row whose prompt cannot be had."""
        chosen: list[Chosen] = []
        errors: dict[int, SoftPromptError] = {}
        for number, unit in enumerate(units):
            try:
                chosen.append(self.one(unit))
            except SoftPromptError as error:
                errors |= {row: error for row, mine in enumerate(rows) if mine == number}
        if errors:
            raise RowsError(errors)
        return chosen

    def one(self, unit: Unit) -> Chosen:
        name, task = unit
        if name == BASE:
            return Chosen(None)
        if name in self.failed:
            raise self.failed[name]
        if name in self.stored:
            config, prompt = self.stored[name].config, self._of_store(self.stored[name], task)
        elif name in self.model.peft_config:
            encoder = self.model.encoder(name)
            config = encoder.config
            prompt = kept(self.model, unit) or encoder.prompt(None if task is None else torch.tensor([task]))
        else:
            known = [BASE, *self.model.peft_config]
            more = "" if self.model.store is None else f" and {len(self.model.store):,} in the store"
            raise ConfigError(f"there is no adapter named {name!r}; there are {', '.join(known[:10])}{more}.")
        if self.labelled and isinstance(prompt, (Embeddings, Folded)) and prompt.context:
            raise UnsupportedError(
                f"the loss of {name!r} counts the answers in its prompt, which rows with other prompts cannot have; "
                "call the model for its rows alone."
            )
        if isinstance(prompt, Embeddings) and self._has_own_words(config):
            with self.model.heads.for_rows([name]):  # not through the active adapter's head, nor together with others
                prompt = fold_and_predict(self.model.way, prompt)
        return Chosen(prompt, placement_of(config) if isinstance(config, EmbeddingConfig) else None)

    def _has_own_words(self, config: PromptConfig) -> bool:
        """Whether the last virtual token may predict words through another head than the batch's other prompts."""
        model = self.model
        words = model.heads.differ and model.base_model.get_output_embeddings() is not None
        return words and model.facts.can_fold(placement_of(config))

    def _of_store(self, loaded: LoadedPrompt, task: int | None) -> Embeddings | KV | Folded:
        """A stored prompt, folded where it can be; the store keeps that beside it, within its limit."""
        model = self.model
        assert model.store is not None
        if isinstance(loaded.config, EmbeddingConfig) and not model.facts.can_fold(placement_of(loaded.config)):
            prompt = loaded.prompt(task)
            assert isinstance(prompt, Embeddings)
            return replace(prompt, vectors=prompt.vectors.to(word_table(model.base_model).device))
        epoch = model.folds.epoch(model.base_model)
        if epoch is None:
            return _folded(model, loaded.name, loaded.prompt(task))
        key = ("folded", epoch, task)
        return model.store.derived(loaded, key, lambda: _lasting(_folded(model, loaded.name, loaded.prompt(task))))


def placement_of(config: PromptConfig) -> Placement:
    """Where in a row a prompt's vectors stand; keys and values are in front."""
    placement = config.placement if isinstance(config, EmbeddingConfig) else Placement.FRONT
    assert isinstance(placement, Placement)
    return placement


def kept(model: "SoftPromptModel", unit: Unit, labelled: bool = False) -> Folded | None:
    """A frozen prompt of the model, folded once; None where it is not frozen or cannot be folded.

    Nor is one kept that predicts words through a head of its own, whose changes nobody looks for.
    """
    (name, task), encoder = unit, model.encoder(unit[0])
    if model.heads.has_own(name) and model.base_model.get_output_embeddings() is not None:
        return None
    vectors = isinstance(encoder.config, EmbeddingConfig)
    if vectors and not model.facts.can_fold(placement_of(encoder.config)):
        return None
    own = word_table(model.base_model)
    key = unit if vectors else (*unit, own.dtype, own.device)  # keys and values come from no base model
    epoch = model.folds.epoch(model.base_model) if vectors else None
    if vectors and epoch is None:
        return None
    known = model.folds.get(key, encoder)
    if known is None:
        if torch.compiler.is_compiling() or not frozen(encoder):
            return None
        stamp = Stamp(encoder)
        known = _lasting(_folded(model, name, encoder.prompt(None if task is None else torch.tensor([task]))))
        if not vectors or model.folds.epoch(model.base_model) == epoch:  # else another thread has changed it meanwhile
            model.folds.keep(key, stamp, known)
    return None if labelled and known.context else known


def _lasting(folded: Folded) -> Folded:
    """What may be kept: autograd refuses tensors that were made in inference mode, in every later call."""
    with torch.inference_mode(False):
        logits = None if folded.logits is None else folded.logits.clone()
        own = folded.kv.map(lambda part: part.clone(memory_format=torch.contiguous_format))  # and nothing beside it
        return replace(folded, kv=own, logits=logits)


@torch.no_grad()
def _folded(model: "SoftPromptModel", name: str, prompt: Embeddings | KV) -> Folded:
    """An adapter's prompt as the base model takes it, on its device and in its type."""
    own = word_table(model.base_model)
    if isinstance(prompt, KV):
        return Folded(prompt.map(lambda part: part.detach().to(own)))
    with model.heads.for_rows([name]):
        folded = fold_and_predict(model.way, replace(prompt, vectors=prompt.vectors.to(own)))
    return replace(folded, context=prompt.context is not None)
