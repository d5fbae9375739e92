"""Task heads that are trained and saved along with a prompt (`modules_to_save`): one copy per adapter.

The active adapter's copies stand in the base model in place of its own modules; without an adapter the base model has
its own back. Nothing is wrapped, so the base model's module names never change.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock, RLock
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.config import PromptConfig, TaskType
from softprompt.elsewhere import copied
from softprompt.errors import CheckpointError, ConfigError
from softprompt.stacking import trained_by_peft

_HEADS_OF_TASK = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}


_LOCKS_LOCK = Lock()
_LOCKS: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()
"""One for each base model whose prompts have heads."""


class HeadOfRows(nn.Module):
    """Heads side by side: each row of what comes in, `[B, …]`, goes through its own."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__["heads"] = list(heads)  # they belong to others

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads: list[nn.Module] = self.__dict__["heads"]
        if len(states) != len(heads):
            raise ConfigError(f"{len(heads)} adapter_names, but a head is called with {len(states)} rows.")
        parts: dict[int, Tensor] = {}
        for head in dict.fromkeys(heads):
            rows = [row for row, mine in enumerate(heads) if mine is head]
            parts |= zip(rows, head(states[rows], *args, **kwargs), strict=True)
        return torch.stack([parts[row] for row in range(len(heads))])


class Heads(nn.Module):
    """The copies of all adapters, by adapter and by the module's path in the base model ('/' for '.')."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.copies = nn.ModuleDict()
        self.__dict__["base"] = base
        self.__dict__["originals"] = {}

    def add(self, adapter: str, config: PromptConfig) -> None:
        """Copy the modules this adapter trains. ConfigError if `modules_to_save` names something that is not there."""
        base: PreTrainedModel = self.__dict__["base"]
        found = nn.ModuleDict()
        for path in self.paths(config):
            original = self.__dict__["originals"].setdefault(path, base.get_submodule(path))
            found[path.replace(".", "/")] = _in_float32(copied(original))
        self.copies[adapter] = found

    def paths(self, config: PromptConfig) -> list[str]:
        """The paths in the base model of the modules that a config asks to save.

        A head that PEFT trains beside LoRA stays PEFT's, to train and to save.
        """
        base: PreTrainedModel = self.__dict__["base"]
        all_paths = [path for path, _ in base.named_modules() if path]
        paths: list[str] = []
        for wanted in config.modules_to_save or []:
            matching = [path for path in all_paths if path == wanted or path.endswith(f".{wanted}")]
            if not matching and wanted not in default_heads(config):
                raise ConfigError(f"modules_to_save names {wanted!r}, but {type(base).__name__} has no such module.")
            own = [path for path in matching if not trained_by_peft(base.get_submodule(path))]
            paths += [path for path in own if path not in paths]
        return paths

    def use(self, adapter: str | None) -> None:
        """Put this adapter's copies into the base model; None puts the base model's own modules back."""
        originals: dict[str, nn.Module] = self.__dict__["originals"]
        with self.alone():
            chosen = self._of(adapter) if adapter is not None else {}
            for path, original in originals.items():
                self._put(path, chosen.get(path, original))

    def has_own(self, adapter: str) -> bool:
        """Whether an adapter brings heads along."""
        return adapter in self.copies and bool(self._of(adapter))

    @property
    def differ(self) -> bool:
        """Whether adapters may have different heads."""
        return bool(self.__dict__["originals"])

    @contextmanager
    def for_rows(
        self, adapters: Sequence[str] | None, active: Callable[[], str] | None = None
    ) -> Iterator[Sequence[str]]:
        """Inside the block each row goes through the heads of its own adapter; one without any, the base model's.

        Without names all rows have the `active` adapter's. The block has the names. While adapters have heads, which
        stand in the model itself, threads wait for each other here.
        """
        base: PreTrainedModel = self.__dict__["base"]
        originals: dict[str, nn.Module] = self.__dict__["originals"]
        with self.alone():
            names = [active()] if adapters is None and active is not None else list(adapters or ())
            if not originals:
                yield names
                return
            before = {path: base.get_submodule(path) for path in originals}
            own = {name: self._of(name) if name in self.copies else {} for name in set(names)}
            try:
                for path, original in originals.items():
                    heads = [own[name].get(path, original) for name in names]
                    self._put(path, HeadOfRows(heads) if len(set(heads)) > 1 else heads[0])
                yield names
            finally:
                for path, module in before.items():
                    self._put(path, module)

    def alone(self) -> AbstractContextManager[Any]:
        """Inside the block no other thread uses or changes the heads in the model; nothing where there are none."""
        if not self.__dict__["originals"] or torch.compiler.is_compiling():
            return nullcontext()
        with _LOCKS_LOCK:
            return _LOCKS.setdefault(self.__dict__["base"], RLock())

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.__dict__["base"].get_submodule(parent), name, module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Modules that wait outside the base model move along with it (`.to`, `.half()`, …)."""
        for original in self.__dict__["originals"].values():
            original._apply(fn)
        return super()._apply(fn, recurse)

    def requires_grad(self, adapter: str, trains: bool) -> None:
        self.copies[adapter].requires_grad_(trains)

    def remove(self, adapter: str) -> None:
        del self.copies[adapter]

    def state(self, adapter: str) -> dict[str, Tensor]:
        """The copies' tensors by their checkpoint names, `base_model.<path>.<name>`, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors(adapter).items()}

    def check(self, config: PromptConfig, saved: dict[str, Tensor]) -> None:
        """CheckpointError unless `saved` holds exactly the head tensors this base model needs, in their shapes."""
        base: PreTrainedModel = self.__dict__["base"]
        needed = {
            f"base_model.{path}.{name}": tensor
            for path in self.paths(config)
            for name, tensor in base.get_submodule(path).state_dict().items()
        }
        given = {name: tensor for name, tensor in saved.items() if name.startswith("base_model.")}
        for name in sorted(needed.keys() ^ given.keys()):
            where = "is missing from the saved prompt" if name in needed else "is saved, but not part of this model"
            raise CheckpointError(
                f"head tensor {name!r} {where} ({type(base).__name__}); load the model it belongs to."
            )
        for name, tensor in needed.items():
            if tensor.shape != given[name].shape:
                raise CheckpointError(
                    f"head tensor {name!r} is {tuple(given[name].shape)} in the saved prompt and {tuple(tensor.shape)} "
                    "in this model; load it with the same number of labels and the same width."
                )

    def load(self, adapter: str, saved: dict[str, Tensor]) -> None:
        """Copy saved head tensors into the adapter's copies; `check` has passed before."""
        for name, tensor in self._tensors(adapter).items():
            tensor.detach().copy_(saved[name])

    def _of(self, adapter: str) -> dict[str, nn.Module]:
        found = self.copies[adapter]
        assert isinstance(found, nn.ModuleDict)
        return {key.replace("/", "."): module for key, module in found.items()}

    def _tensors(self, adapter: str) -> dict[str, Tensor]:
        return {
            f"base_model.{path}.{name}": tensor
            for path, module in self._of(adapter).items()
            for name, tensor in module.state_dict(keep_vars=True).items()
        }


def _in_float32(head: nn.Module) -> nn.Module:
    """A head to be trained: of a half-precision model in float32, where small steps are not lost; it takes any type."""
    halves = (torch.bfloat16, torch.float16)
    if any(parameter.dtype in halves for parameter in head.parameters()):
        head.float().register_forward_pre_hook(_as_its_own)
    return head


def _as_its_own(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a head is called with, in the head's own type."""
    own = next(head.parameters()).dtype
    return tuple(each.to(own) if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs)


def default_heads(config: PromptConfig) -> list[str]:
    """The head names that a task type brings along (a model has one of them)."""
    return _HEADS_OF_TASK.get(config.task_type, []) if isinstance(config.task_type, TaskType) else []


def with_default_heads(config: PromptConfig) -> list[str] | None:
    """`modules_to_save` with the task's heads added, as PEFT writes it."""
    wanted = [*(config.modules_to_save or []), *default_heads(config)]
    return list(dict.fromkeys(wanted)) or None
