"""Which prompt each row of a batch gets: one adapter for all, or one by name for each, of any methods and lengths."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softprompt.batch.find import BASE, Chosen, Finder, Unit, kept, placement_of
from softprompt.config import Placement, PromptConfig
from softprompt.elsewhere import sharded, word_table
from softprompt.errors import ConfigError
from softprompt.fold import Folded, fold_and_predict
from softprompt.join import Mixed, join_embeddings, join_folded, join_kv
from softprompt.prompt import KV, Embeddings
from softprompt.running import Run

if TYPE_CHECKING:
    from softprompt.model import SoftPromptModel


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
    finder = Finder(model, names or [], labelled)
    units, rows = _distinct(finder, names or [], task_ids)
    chosen = finder.all(units, rows)
    placements = {each.placement for each in chosen if each.placement is not None}
    if len(placements) > 1:
        both = " and ".join(sorted(repr(each.value) for each in placements))
        raise ConfigError(f"prompts of placement {both} cannot share a batch; call the model for each kind of rows.")
    placement = placements.pop() if placements else Placement.FRONT
    check_slots(placement, slots)
    return Run(model.way, model.facts, _joined(model, chosen, rows, placement), placement, slots)


def bare_run(model: "SoftPromptModel") -> Run | None:
    """How rows with labels run that all have no prompt: as those beside rows with one, so that no token is predicted by
    the padding before it. None where the model alone predicts none by another."""
    if not model.facts.causal:
        return None
    if model.facts.can_fold(Placement.FRONT):
        return Run(model.way, model.facts, _nothing(model))
    own = word_table(model.base_model)
    return Run(model.way, model.facts, Embeddings(own.new_zeros(1, 0, own.shape[1])))


def check_slots(placement: Placement, slots: Tensor | None) -> None:
    """ConfigError where slots are missing, or given to a prompt that stands elsewhere."""
    if (slots is None) == (placement is Placement.TEMPLATE):
        wanted = "needs slots (encode the rows with its template)" if slots is None else "takes no slots"
        raise ConfigError(f"a prompt with placement={placement.value!r} {wanted}; see EmbeddingConfig.placement.")


def run_with(
    model: "SoftPromptModel", config: PromptConfig, prompt: Embeddings | KV | Folded, slots: Tensor | None
) -> Run:
    """How a call runs with a prompt that was made already, by the method of `config`."""
    placement = placement_of(config)
    check_slots(placement, slots)
    return Run(model.way, model.facts, prompt, placement, slots)


def _run_of_one(
    model: "SoftPromptModel", name: str, task_ids: Tensor | None, slots: Tensor | None, labelled: bool
) -> Run:
    """One adapter for all rows, the prompt as it is now or, where it is frozen, as it was kept."""
    encoder = model.encoder(name)
    prompt = kept(model, (name, None), labelled) if task_ids is None else _kept_tasks(model, name, task_ids)
    return run_with(model, encoder.config, encoder.prompt(task_ids) if prompt is None else prompt, slots)


def _kept_tasks(model: "SoftPromptModel", name: str, task_ids: Tensor) -> Folded | None:
    """The prompts of the tasks, as they were kept; None where none can be kept, or these are no tasks."""
    whole = isinstance(task_ids, Tensor) and task_ids.ndim == 1 and task_ids.dtype in (torch.int64, torch.int32)
    if not whole or not len(task_ids) or model.encoder(name).num_tasks == 1 or torch.compiler.is_compiling():
        return None
    tasks = task_ids.tolist()
    number = {task: count for count, task in enumerate(dict.fromkeys(tasks))}
    if sharded(model.base_model):  # all processes have to run it alike, and may have rows of other tasks
        for task in range(model.encoder(name).num_tasks):
            kept(model, (name, task))
    parts = [kept(model, (name, task)) for task in number]
    if any(part is None for part in parts):
        return None
    index = torch.tensor([number[task] for task in tasks], device=word_table(model.base_model).device)
    return join_folded([part for part in parts if part is not None], index)


def _distinct(finder: Finder, names: list[str], task_ids: Tensor | None) -> tuple[list[Unit], list[int]]:
    """The different prompts of the rows, in order, and which of them each row has."""
    tasks: list[int | None] = [None] * len(names) if task_ids is None else task_ids.tolist()
    if len(tasks) != len(names):
        raise ConfigError(f"{len(names)} adapter_names and {len(tasks)} task_ids; give one of each per row.")
    several = {name: finder.tasks(name) > 1 for name in set(names)}
    wanted: list[Unit] = [(name, task if several[name] else None) for name, task in zip(names, tasks, strict=True)]
    number = {unit: count for count, unit in enumerate(dict.fromkeys(wanted))}
    return list(number), [number[unit] for unit in wanted]


def _joined(model: "SoftPromptModel", chosen: list[Chosen], rows: list[int], placement: Placement) -> Folded | Mixed:
    """One prompt for the batch: keys and values where all can be that, else those and vectors side by side."""
    own = word_table(model.base_model)
    index = torch.tensor(rows, device=own.device)
    prompts = [each.prompt for each in chosen]
    if model.facts.can_fold(placement):
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
        done = _apart(fold_and_predict(model.way, joined), [each.length for each in todo])
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
                 for each in model.facts.layers))
    )  # fmt: skip
