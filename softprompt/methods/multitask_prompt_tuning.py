"""Multitask prompt tuning: Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, https://arxiv.org/abs/2303.02861

Task k's prompt is P_k = P* ∘ W_k, W_k = u_k v_kᵀ (equation 1): a table P* ∈ R^{p×d} that all tasks share, times its own
matrix of rank r. P* is learned on source tasks and goes on to a target task with the sources' u and v (section 3.3).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from softprompt.config import EmbeddingConfig, PromptConfig, TaskType, parse_enum
from softprompt.errors import CheckpointError, ConfigError, UnsupportedError
from softprompt.facts import Facts
from softprompt.methods.prompt_tuning import PromptEmbedding, PromptTuningConfig
from softprompt.prompt import EmbeddingPrompt, Embeddings, need_count


class MultitaskPromptTuningInit(str, Enum):
    """Where P*, u and v start.

    `AVERAGE_SOURCE_TASKS`, `EXACT_SOURCE_TASK` and `ONLY_SOURCE_SHARED` read a trained adapter: P* with the mean of its
    tasks' u and v, with those of one task, or alone. The others start P* as prompt tuning does.
    """

    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    TEXT = "TEXT"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"

    def __str__(self) -> str:
        return self.value

    @property
    def from_source(self) -> bool:
        return self.name in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(EmbeddingConfig):
    """MPT's choices. `prompt_tuning_init_state_dict_path` is an adapter's folder, or its tensor file as in PEFT.

    With `inference_mode` the start is history: a start from a source is forgotten, so that a saved adapter neither
    needs nor names the source's file. `task_names` are shown and accepted by the command line; PEFT has only numbers.
    """

    PEFT_TYPE = "MULTITASK_PROMPT_TUNING"

    prompt_tuning_init: MultitaskPromptTuningInit | str = field(
        default=MultitaskPromptTuningInit.RANDOM,
        metadata={"help": "start from RANDOM, SAMPLE_VOCAB, TEXT, AVERAGE_SOURCE_TASKS, EXACT_SOURCE_TASK, …"},
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "the text to start from"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "tokenizer for the text or the labels"})
    tokenizer_kwargs: dict[str, Any] | None = None
    prompt_tuning_init_state_dict_path: str | None = field(
        default=None, metadata={"help": "folder or tensor file of the source adapter"}
    )
    prompt_tuning_init_task: int | None = field(default=0, metadata={"help": "number of the source task, from 0"})
    num_ranks: int = field(default=1, metadata={"help": "rank r of a task's matrix"})
    num_tasks: int = field(default=1, metadata={"help": "number of tasks"})
    task_names: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        init = parse_enum(MultitaskPromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        self._set("prompt_tuning_init_task", self.prompt_tuning_init_task or 0)
        for name in ("num_ranks", "num_tasks"):
            self._check_count(name)
        if self.prompt_tuning_init_task < 0:  # pyright: ignore[reportOptionalOperand]
            raise ConfigError(f"prompt_tuning_init_task={self.prompt_tuning_init_task} must be 0 or more.")
        if self.inference_mode:
            init = MultitaskPromptTuningInit.RANDOM if init.from_source else init
            self._set("prompt_tuning_init_state_dict_path", None)
            self._set("prompt_tuning_init_task", 0)
        self._set("prompt_tuning_init", init)
        if init.from_source and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"prompt_tuning_init={init.value!r} needs prompt_tuning_init_state_dict_path, the source adapter."
            )
        if self.prompt_tuning_init_state_dict_path and not init.from_source:
            raise ConfigError(
                f"prompt_tuning_init_state_dict_path is set, but prompt_tuning_init={init.value!r} reads no source; "
                "use AVERAGE_SOURCE_TASKS, EXACT_SOURCE_TASK or ONLY_SOURCE_SHARED."
            )
        if not init.from_source:
            self._as_prompt_tuning()  # text and tokenizer are checked there
        names = self.task_names
        if names is not None and (len(names) != self.num_tasks or len(set(names)) != len(names)):
            raise ConfigError(f"task_names={names!r} must be {self.num_tasks} different names, one per task.")

    @property
    def saved_copies(self) -> int:
        """With two parts on an encoder-decoder each has rows of its own."""
        return 1

    def _as_prompt_tuning(self) -> PromptTuningConfig:
        """The same start as a config of plain prompt tuning."""
        return PromptTuningConfig(
            num_virtual_tokens=self.total_virtual_tokens,
            token_dim=self.token_dim,
            prompt_tuning_init=str(self.prompt_tuning_init),
            prompt_tuning_init_text=self.prompt_tuning_init_text,
            tokenizer_name_or_path=self.tokenizer_name_or_path,
            tokenizer_kwargs=self.tokenizer_kwargs,
        )

    def task_number(self, task: str | int) -> int:
        """The number of a task given by name or number. Raises ConfigError."""
        names = self.task_names or [str(number) for number in range(self.num_tasks)]
        if isinstance(task, str) and task in names:
            return names.index(task)
        number = int(task) if str(task).isdecimal() else -1
        if not 0 <= number < self.num_tasks:
            raise ConfigError(f"there is no task {task!r} in this prompt; there are {', '.join(names)}.")
        return number


@final
class MultitaskPromptEmbedding(EmbeddingPrompt):
    """P* `embedding` `[n, d]`, u `prefix_task_cols` `[T, n, r]`, v `prefix_task_rows` `[T, r, d]`.

    With `num_transformer_submodules=2` they have 2n rows, the second half for the decoder's input.

    u and v start so that every W_k is exactly 1, whatever r, and P_k is P*: v is all ones, and rank j's u is 1 at every
    r-th virtual token from j on and 0 elsewhere, so that the ranks differ from the first step. (PEFT draws both from
    N(0, 0.02), whose products start a prompt some 4,000 times too small.)
    """

    name = "multitask_prompt_tuning"
    config_class = MultitaskPromptTuningConfig
    saved_names = {  # noqa: RUF012 (a ClassVar of the base)
        "prompt_embeddings": "embedding.weight",
        "prefix_task_cols": "prefix_task_cols",
        "prefix_task_rows": "prefix_task_rows",
    }
    token_dims = {"prompt_embeddings": 0, "prefix_task_cols": 1}  # noqa: RUF012
    task_parameters = ("prefix_task_cols", "prefix_task_rows")
    example = {"num_tasks": 2, "num_ranks": 2}  # noqa: RUF012

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        need_count(config, "token_dim")
        assert config.token_dim is not None
        self.config = config
        self.num_tasks, self.num_ranks = config.num_tasks, config.num_ranks
        count, ranks = config.total_virtual_tokens, config.num_ranks
        self.embedding = nn.Embedding(count, config.token_dim)
        first = (torch.arange(count)[:, None] % ranks == torch.arange(ranks)).float()
        self.prefix_task_cols = nn.Parameter(first.repeat(config.num_tasks, 1, 1))
        self.prefix_task_rows = nn.Parameter(torch.ones(config.num_tasks, ranks, config.token_dim))
        if config.inference_mode:
            return
        init = config.prompt_tuning_init
        assert isinstance(init, MultitaskPromptTuningInit)
        if init.from_source:
            self._start_from_source(config)
        else:
            self.embedding = PromptEmbedding(config._as_prompt_tuning(), word_embeddings).embedding

    @classmethod
    def fill(cls, config: PromptConfig, facts: Facts) -> PromptConfig:
        """On an encoder-decoder the prompt stands before the encoder's input, as in the paper.

        PEFT by default (`num_transformer_submodules=2`) has n more virtual tokens, which its `forward` puts before the
        decoder's input and its `generate` leaves out. Asked for, or found in a checkpoint, they stand there in both.
        """
        return super().fill(replace(config, num_transformer_submodules=config.num_transformer_submodules or 1), facts)

    @torch.no_grad()
    def _start_from_source(self, config: MultitaskPromptTuningConfig) -> None:
        """Take P* and, unless `ONLY_SOURCE_SHARED`, u and v (one task's or the mean) from a trained adapter."""
        init, path = config.prompt_tuning_init, str(config.prompt_tuning_init_state_dict_path)
        tensors, count = read_source(path), config.total_virtual_tokens
        if config.task_type is TaskType.SEQ_2_SEQ_LM and len(tensors["prompt_embeddings"]) == 2 * count:
            tensors = {name: each.narrow(self.token_dims[name], 0, count) if name in self.token_dims else each
                       for name, each in tensors.items()}  # fmt: skip
        _take(self.embedding.weight, tensors["prompt_embeddings"], f"prompt_embeddings of the source {path}")
        if init is MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            return
        for name, own in (("prefix_task_cols", self.prefix_task_cols), ("prefix_task_rows", self.prefix_task_rows)):
            if name not in tensors:
                raise CheckpointError(
                    f"the source {path} has no {name}; give a multitask prompt, or use ONLY_SOURCE_SHARED."
                )
            tasks, task = tensors[name], config.prompt_tuning_init_task or 0
            if init is MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
                chosen = tasks.float().mean(0)
            elif task < len(tasks):
                chosen = tasks[task]
            else:
                raise ConfigError(f"prompt_tuning_init_task={task}, but the source has {len(tasks)} tasks, from 0.")
            _take(own, chosen.expand(len(own), *chosen.shape), f"{name} of the source {path}")

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Indices `[B, n]` → vectors `[B, n, d]`: of P_k with k of each row in `task_ids` `[B]`, of P* without."""
        shared = self.embedding(indices)
        if task_ids is None:
            return shared
        cols, rows = (
            embedding(task_ids, part.flatten(1)).unflatten(1, part.shape[1:])  # refuses numbers below 0 as well
            for part in (self.prefix_task_cols, self.prefix_task_rows)
        )
        return shared * (cols.gather(1, indices[..., None].expand(-1, -1, self.num_ranks)) @ rows)

    def prompt(self, task_ids: Tensor | None = None) -> Embeddings:
        """The prompts of the distinct tasks in `task_ids` `[B]`, and which of them each row has.

        Raises ConfigError for a task that is not there, or for none where there are several.
        """
        if task_ids is None:
            if self.num_tasks > 1:
                raise ConfigError(
                    f"this prompt has {self.num_tasks} tasks, so every call needs task_ids, one number per row."
                )
            task_ids = torch.zeros(1, dtype=torch.long)
        if torch.compiler.is_compiling():  # where values are unknown every row has a prompt to itself
            tasks, rows = task_ids.to(self.embedding.weight.device), None
        else:
            tasks, rows = self._distinct(task_ids)
        indices = torch.arange(self.config.total_virtual_tokens, device=tasks.device).expand(len(tasks), -1)
        parts = self(indices, tasks).split(self.config.num_virtual_tokens, dim=1)
        return Embeddings(parts[0], rows if len(tasks) > 1 else None, decoder=parts[1] if len(parts) > 1 else None)

    def _distinct(self, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The task numbers that occur `[N]`, and for each row which of them is its own `[B]`."""
        ids = torch.as_tensor(task_ids, device=self.embedding.weight.device)
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool or not len(ids):
            raise ConfigError(
                f"task_ids of shape {tuple(ids.shape)} and type {ids.dtype}: give one whole number per row, [B]."
            )
        tasks, rows = ids.long().unique(return_inverse=True)
        wrong = tasks[(tasks < 0) | (tasks >= self.num_tasks)].tolist()
        if wrong:
            last = self.num_tasks - 1
            raise ConfigError(f"task_ids name task {wrong[0]}, but this prompt has tasks 0…{last}.")
        return tasks, rows

    @torch.no_grad()
    def task_vectors(self, task: int = 0) -> Tensor:
        """Task `task`'s prompt as one table `[n, d]`, detached: what plain prompt tuning would have saved.

        Raises UnsupportedError where it has a part before the decoder's input too, which plain prompt tuning has not.
        """
        if self.config.num_transformer_submodules == 2:
            raise UnsupportedError(
                "half of this prompt stands before the decoder's input, so it is no ordinary prompt; train with "
                "num_transformer_submodules=1 to fold its tasks."
            )
        tasks, _ = self._distinct(torch.tensor([task]))
        indices = torch.arange(self.config.num_virtual_tokens, device=tasks.device)[None]
        return self(indices, tasks)[0]

    def output_layer(self) -> None:
        return None


def _take(own: Tensor, found: Tensor, name: str) -> None:
    if own.shape != found.shape:
        raise ConfigError(
            f"{name} has shape {tuple(found.shape[-2:])}, but this prompt needs {tuple(own.shape[-2:])}; use the same "
            "base model, num_virtual_tokens and num_ranks."
        )
    own.copy_(found)


def read_source(path: str) -> Mapping[str, Tensor]:
    """The tensors of a source adapter: its folder, or its `.safetensors` or `.bin` file. Raises CheckpointError."""
    from softprompt.checkpoint.guard import file_inside, read_any_tensors

    place = Path(path)
    if place.is_dir():
        found = file_inside(place, "adapter_model.safetensors") or file_inside(place, "adapter_model.bin")
    else:
        found = place if place.is_file() else None
    if found is None:
        raise CheckpointError(f"there is no source adapter at {path}; give its folder or its tensor file.")
    tensors = read_any_tensors(found, lambda layouts: None)
    if "prompt_embeddings" not in tensors:
        raise CheckpointError(f"{found} has no tensor 'prompt_embeddings'; give a trained multitask prompt.")
    return tensors
