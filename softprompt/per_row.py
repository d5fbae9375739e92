"""Which prompt each row of a batch gets: one adapter for all, or one by name for each, of any methods and lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt.config import EmbeddingConfig, Placement, PromptConfig
from softprompt.errors import ConfigError, RowsError, SoftPromptError, UnsupportedError
from softprompt.fold import Folded, fold_and_predict
from softprompt.fold_cache import frozen, stamp
from softprompt.join import Mixed, join_embeddings, join_folded, join_kv
from softprompt.probe import word_table
from softprompt.prompt import KV, Embeddings
from softprompt.running import Run, can_fold

if TYPE_CHECKING:
    from softprompt.model import SoftPromptModel

BASE = "__base__"
"""The name of no adapter: rows that the base model gets as they are."""

Unit = tuple[str, int | None]
"""One prompt: an adapter and, of an adapter of several tasks, the task."""


@dataclass(frozen=True)
class Chosen:
    """The prompt of one unit as it was found, and where its vectors stand in a row."""

    prompt: Embeddings | KV | Folded | None
    placement: Placement | None = None


def run_for(
    model: "SoftPromptModel",
    adapter_names: Sequence[str] | None,
    task_ids: Tensor | None,
    slots: Tensor | None,
    labelled: bool,
) -> Run | None:
    """How a call runs; None for the base model alone. `labelled`: it has a label for every token.

    RowsError where some rows' adapters cannot be used, before anything runs.
    """
    names = None if adapter_names is None else list(adapter_names)
    if names is None or len(set(names)) == 1:
        name = model.active_adapter if names is None else names[0]
        if name == BASE:
            return None
        if name in model.peft_config:
            return _run_of_one(model, name, task_ids, slots, labelled)
    units, rows = _distinct(model, names or [], task_ids)
    chosen = _choose(model, units, rows, labelled)
    placements = {each.placement for each in chosen if each.placement is not None}
    if len(placements) > 1:
        both = " and ".join(sorted(repr(each.value) for each in placements))
        raise ConfigError(f"prompts of placement {both} cannot share a batch; call the model for each kind of rows.")
    placement = placements.pop() if placements else Placement.FRONT
    check_slots(placement, slots)
    return Run(model.door, model.geometry, _joined(model, units, chosen, rows, placement), placement, slots)


def check_slots(placement: Placement, slots: Tensor | None) -> None:
    """ConfigError where slots are missing, or given to a prompt that stands elsewhere."""
    if (slots is None) == (placement is Placement.TEMPLATE):
        wanted = "needs slots (encode the rows with its template)" if slots is None else "takes no slots"
        raise ConfigError(f"a prompt with placement={placement.value!r} {wanted}; see EmbeddingConfig.placement.")


def placement_of(config: PromptConfig) -> Placement:
    placement = config.placement if isinstance(config, EmbeddingConfig) else Placement.FRONT
    assert isinstance(placement, Placement)
    return placement


def _run_of_one(
    model: "SoftPromptModel", name: str, task_ids: Tensor | None, slots: Tensor | None, labelled: bool
) -> Run:
    """One adapter for all rows, the prompt as it is now or, where it is frozen, as it was kept."""
    encoder = model.encoder(name)
    placement = placement_of(encoder.config)
    check_slots(placement, slots)
    prompt = _kept(model, (name, None), labelled) if task_ids is None else None
    return Run(model.door, model.geometry, encoder.prompt(task_ids) if prompt is None else prompt, placement, slots)


def _kept(model: "SoftPromptModel", unit: Unit, labelled: bool = False) -> Folded | None:
    """A frozen prompt, folded once; None where it is not frozen or cannot be kept."""
    name, task = unit
    encoder, base = model.encoder(name), model.base_model
    is_kv = not isinstance(encoder.config, EmbeddingConfig)
    sources = [encoder] if is_kv else [encoder, base]
    if not (is_kv or can_fold(model.geometry, placement_of(encoder.config))) or not frozen(sources):
        return None
    own = word_table(base)
    made_from = [*stamp(sources), (own, 0, own.data_ptr())]
    known = model.folds.get(unit, made_from)
    if known is None:
        prompt = encoder.prompt(None if task is None else torch.tensor([task]))
        if isinstance(prompt, KV):
            folded = Folded(prompt.map(lambda part: part.to(own)))
        else:
            folded = replace(fold_and_predict(model.door, prompt), context=prompt.context is not None)
        known = model.folds.keep(unit, made_from, folded.detach())
    return None if labelled and known.context else known


def _distinct(model: "SoftPromptModel", names: list[str], task_ids: Tensor | None) -> tuple[list[Unit], list[int]]:
    """The different prompts of the rows, in order, and which of them each row has."""
    tasks: list[int | None] = [None] * len(names) if task_ids is None else task_ids.tolist()
    if len(tasks) != len(names):
        raise ConfigError(f"{len(names)} adapter_names and {len(tasks)} task_ids; give one of each per row.")
    wanted = [(name, task if name in model.peft_config and model.encoder(name).num_tasks > 1 else None)
              for name, task in zip(names, tasks, strict=True)]  # fmt: skip
    units = list(dict.fromkeys(wanted))
    return units, [units.index(unit) for unit in wanted]


def _choose(model: "SoftPromptModel", units: list[Unit], rows: list[int], labelled: bool) -> list[Chosen]:
    """The prompts of the units; RowsError with every row whose prompt cannot be had."""
    failed: dict[str, SoftPromptError] = {}
    stored = {}
    others = [name for name, _ in units if name != BASE and name not in model.peft_config]
    if model.store is not None and others:
        stored, failed = model.store.load(others, model.geometry)
    chosen: list[Chosen] = []
    errors: dict[int, SoftPromptError] = {}
    for number, unit in enumerate(units):
        try:
            chosen.append(_chosen(model, unit, stored, failed, labelled))
        except SoftPromptError as error:
            errors |= {row: error for row, mine in enumerate(rows) if mine == number}
    if errors:
        raise RowsError(errors)
    return chosen


def _chosen(
    model: "SoftPromptModel", unit: Unit, stored: dict[str, Any], failed: dict[str, SoftPromptError], labelled: bool
) -> Chosen:
    name, task = unit
    if name == BASE:
        return Chosen(None)
    if name in failed:
        raise failed[name]
    if name in stored:
        return _from_store(model, name, stored[name])
    if name not in model.peft_config:
        raise ConfigError(f"there is no adapter named {name!r}; there are {_some([BASE, *model.peft_config])}.")
    encoder = model.encoder(name)
    prompt = _kept(model, unit) or encoder.prompt(None if task is None else torch.tensor([task]))
    context = prompt.context if isinstance(prompt, (Embeddings, Folded)) else None
    if labelled and context:
        raise UnsupportedError(
            f"the loss of {name!r} counts the answers in its prompt, which rows with other prompts cannot have; call "
            "the model for its rows alone."
        )
    vectors = isinstance(encoder.config, EmbeddingConfig)
    return Chosen(prompt, placement_of(encoder.config) if vectors else None)


def _from_store(model: "SoftPromptModel", name: str, loaded: Any) -> Chosen:
    raise NotImplementedError


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _joined(
    model: "SoftPromptModel", units: list[Unit], chosen: list[Chosen], rows: list[int], placement: Placement
) -> Folded | Mixed:
    """One prompt for the batch: keys and values where all can be that, else those and vectors side by side."""
    own = word_table(model.base_model)
    index = torch.tensor(rows, device=own.device)
    prompts = [each.prompt for each in chosen]
    if can_fold(model.geometry, placement):
        return join_folded(_all_folded(model, prompts), index)
    states = [each.kv if isinstance(each, Folded) else each if isinstance(each, KV) else None for each in prompts]
    first = next((each for each in states if each is not None), None)
    kv = None
    if first is not None:
        empty = first.map(lambda part: part[:1, :, :0])
        kv = join_kv([empty if each is None else each for each in states], index)
    vectors = None
    if any(isinstance(each, Embeddings) for each in prompts):
        nothing = Embeddings(own.new_zeros(1, 0, own.shape[1]))
        vectors = join_embeddings([each if isinstance(each, Embeddings) else nothing for each in prompts], index)
    return Mixed(kv, vectors)


def _all_folded(model: "SoftPromptModel", prompts: Sequence[Embeddings | KV | Folded | None]) -> list[Folded]:
    """Every prompt folded, those that still are vectors in one pass."""
    own = word_table(model.base_model)
    todo = [each for each in prompts if isinstance(each, Embeddings)]
    done: list[Folded] = []
    if todo:
        joined = join_embeddings(todo, torch.arange(len(todo), device=own.device))
        done = _apart(fold_and_predict(model.door, joined), [each.length for each in todo])
    fresh, nothing = iter(done), _nothing(model)
    found: list[Folded] = []
    for each in prompts:
        if isinstance(each, Embeddings):
            found.append(next(fresh))
        elif isinstance(each, KV):
            found.append(Folded(each))
        else:
            found.append(nothing if each is None else each)
    return found


def _apart(folded: Folded, lengths: list[int]) -> list[Folded]:
    """The prompts of `folded`, each by itself and without padding."""
    kv = replace(folded.kv, rows=None, lengths=None)
    return [
        Folded(
            kv.map(lambda part, n=number, p=length: part[n : n + 1, :, part.shape[2] - p :]),
            None if folded.logits is None else folded.logits[number : number + 1],
        )
        for number, length in enumerate(lengths)
    ]


def _nothing(model: "SoftPromptModel") -> Folded:
    own = word_table(model.base_model)
    return Folded(
        KV(tuple((own.new_zeros(1, each.heads, 0, each.key_size), own.new_zeros(1, each.heads, 0, each.value_size))
                 for each in model.geometry.layers))
    )  # fmt: skip
