"""Saved prompts as they stand before one base model, without a module for each of them.

A method says what a prompt is by its module: `load_saved`, then `prompt`. One module serves all adapters whose configs
are alike, one after the other: what it gives is kept, and its parameters are the next adapter's. Where a method says
that its saved table is the prompt, not even that is needed.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from threading import Lock, RLock
from typing import Any, final

import torch
from torch import Tensor

from softprompt.checkpoint import SavedAdapter, check_fits, read_adapter
from softprompt.checkpoint.files import Find
from softprompt.checkpoint.promise import Alike, Promise
from softprompt.checkpoint.undrawn import Undrawn
from softprompt.config import KVConfig, PromptConfig
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.facts import Facts
from softprompt.fitting import fitted, method_of
from softprompt.heads import with_default_heads
from softprompt.pairs import from_checkpoint
from softprompt.prompt import KV, Embeddings, SoftPrompt

KEPT_BYTES = 1 << 20  # a larger module is made for each adapter anew: making it costs little beside filling it
KEPT_MOULDS = 16
KEPT_PLANS = 1024


@final
class LoadedPrompt:
    """A frozen prompt on the CPU in float32; it never changes.

    `config`: as filled in for the base model. `num_tasks`: of how many tasks it has a prompt each. `nbytes`: the memory
    it holds. `lock`: held while something is computed from it.
    """

    def __init__(self, name: str, config: PromptConfig, found: Embeddings | KV | SoftPrompt, nbytes: int) -> None:
        self.name = name
        self.config = config
        self.num_tasks = found.num_tasks if isinstance(found, SoftPrompt) else 1
        self.nbytes = nbytes
        self.lock = RLock()
        self._found = found

    def prompt(self, task: int | None = None) -> Embeddings | KV:
        """One prompt, `[1, p, d]` or `[1, h, p, k]`, without gradient. ConfigError for a task that is not there.

        The same object each time, but for prompts of several tasks: there `task` has to be given, and is computed.
        """
        if task is not None and type(task) is not int:
            raise ConfigError(f"task {task!r} of the prompt {self.name!r} is not a whole number; give the task's.")
        if isinstance(self._found, SoftPrompt):
            if task is None:
                raise ConfigError(f"the prompt {self.name!r} has {self.num_tasks} tasks; say which, by its number.")
            with self.lock, torch.no_grad():
                return self._found.prompt(torch.tensor([task]))
        if task not in (None, 0):
            raise ConfigError(f"the prompt {self.name!r} has a single task, so there is no task {task}; leave it out.")
        return self._found


@final
class Loader:
    """Loads prompts for one base model from the folders of adapters. Threads may share it."""

    def __init__(self, facts: Facts, mapped: bool = False) -> None:
        self.facts, self.mapped = facts, mapped
        self._lock = Lock()
        self._plans: OrderedDict[Promise, _Plan] = OrderedDict()
        self._moulds: OrderedDict[Alike, _Mould] = OrderedDict()

    def load(self, name: str, folder: Path, find: Find, check_bytes: Callable[[int], None]) -> LoadedPrompt:
        """The adapter in `folder`, whose files `find` finds, checked in all that `SoftPromptModel.load_adapter` checks.

        `check_bytes` is told how much memory the prompt needs before that is taken. Raises SoftPromptError.
        """
        plans: list[_Plan] = []

        def check(promised: Promise, source: str) -> None:
            check_bytes(promised.nbytes)
            plans.append(self._plan(promised, source))

        saved = read_adapter(find, folder, check, self.mapped)
        plan = plans[0]
        if plan.method.table_is_prompt:
            found, nbytes = _as_saved(plan.config, saved.tensors)
        else:
            found = self._mould(plan.alike).pour(saved.tensors)
            nbytes = size_of([*found.parameters(), *found.buffers()] if isinstance(found, SoftPrompt) else found)
        return LoadedPrompt(name, plan.config, found, nbytes)

    def _plan(self, promised: Promise, source: str) -> "_Plan":
        with self._lock:
            plan = self._plans.get(promised)
        if plan is None:
            plan = _plan(promised, source, self.facts)
            self._keep(self._plans, promised, plan, KEPT_PLANS)
        return plan

    def _mould(self, alike: Alike) -> "_Mould":
        with self._lock:
            mould = self._moulds.get(alike)
        if mould is None:
            mould = _Mould(alike.config)
            if mould.nbytes <= KEPT_BYTES:
                mould.shared = True
                self._keep(self._moulds, alike, mould, KEPT_MOULDS)
        return mould

    def _keep(self, kept: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
        with self._lock:
            kept[key] = value
            while len(kept) > limit:
                kept.popitem(last=False)


@dataclass(frozen=True)
class _Plan:
    """How an adapter stands before a base model: its method, its config filled in, and what its module depends on."""

    method: type[SoftPrompt]
    config: PromptConfig
    alike: Alike


def _plan(promised: Promise, source: str, facts: Facts) -> _Plan:
    """Raise SoftPromptError if what is promised at `source` cannot stand before this base model, or has heads."""
    heads = with_default_heads(promised.config)
    if heads:
        raise UnsupportedError(
            f"{source} was trained with a head of its own ({', '.join(heads)}), and the rows of a batch share the "
            "model's; load it with model.load_adapter."
        )
    check_fits(SavedAdapter(promised.config, {}, source=source), facts)
    try:
        config = fitted(promised.config, facts)
    except (ConfigError, UnsupportedError) as error:
        raise type(error)(f"{source}: {error}") from error
    return _Plan(method_of(config), config, Alike.of(config))


def _as_saved(config: PromptConfig, tensors: Mapping[str, Tensor]) -> tuple[Embeddings | KV, int]:
    """The prompt of a method whose table is the prompt, views of the table where that is in float32, and its bytes."""
    table = tensors["prompt_embeddings"].float()
    if isinstance(config, KVConfig):
        table = from_checkpoint(table, config)
        found = KV.from_flat(table, config)
    else:
        found = Embeddings(table[None, : config.num_virtual_tokens])
    return found, table.untyped_storage().nbytes()


@final
class _Mould:
    """The module of a method, which the tensors of adapters are poured into. `shared`: by more than one."""

    def __init__(self, config: PromptConfig) -> None:
        with Undrawn():
            self._encoder = method_of(config)(config).eval().requires_grad_(False)
        own = storages([*self._encoder.parameters(), *self._encoder.buffers()])
        self._own = {each.data_ptr() for each in own}
        self.nbytes = sum(each.nbytes() for each in own)
        self.shared = False
        self._lock = Lock()

    @torch.no_grad()
    def pour(self, tensors: Mapping[str, Tensor]) -> Embeddings | KV | SoftPrompt:
        """The prompt that the tensors of a checkpoint are; of several tasks, a module that has the prompts of all."""
        with self._lock:
            self._encoder.load_saved(tensors)
            if self._encoder.num_tasks > 1:
                return copy.deepcopy(self._encoder) if self.shared else self._encoder
            prompt = self._encoder.prompt()
            borrowed = self.shared and any(each.data_ptr() in self._own for each in storages(prompt))
            return copy.deepcopy(prompt) if borrowed else prompt


def size_of(value: Any) -> int:
    """Bytes of all tensors in a value made of dataclasses, mappings, lists and tuples; shared memory counts once."""
    return sum({each.data_ptr(): each.nbytes() for each in storages(value)}.values())


def storages(value: Any) -> list[torch.UntypedStorage]:
    """The memory of every tensor in such a value."""
    found: list[torch.UntypedStorage] = []
    waiting = [value]
    for each in waiting:  # which grows meanwhile
        if isinstance(each, Tensor):
            found.append(each.untyped_storage())
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif is_dataclass(each) and not isinstance(each, type):
            waiting += [getattr(each, part.name) for part in fields(each)]
    return found
