"""One task out of a saved prompt of several (https://arxiv.org/abs/2303.02861): its number, and its prompt alone."""

from dataclasses import fields, replace
from pathlib import Path

from softprompt.checkpoint import SavedAdapter, load_adapter, save_adapter
from softprompt.config import EmbeddingConfig, PromptConfig
from softprompt.errors import ConfigError
from softprompt.inspect_prompt import tasks_of
from softprompt.methods import MultitaskPromptEmbedding, MultitaskPromptTuningConfig, PromptTuningConfig


def task_of(config: PromptConfig, task: str | int | None, where: str | Path = "this prompt") -> int | None:
    """The number of the task that is meant; None where the prompt has no tasks to choose from.

    ConfigError for a task that is not there, none given where there are several, or one where there is only one.
    """
    several = isinstance(config, MultitaskPromptTuningConfig) and config.num_tasks > 1
    if not several:
        if task is not None:
            raise ConfigError(f"{where} has a single task, so task {task!r} cannot be chosen; leave it out.")
        return None
    assert isinstance(config, MultitaskPromptTuningConfig)
    if task is None:
        raise ConfigError(f"{where} has {config.num_tasks} tasks; choose one of {', '.join(tasks_of(config))}.")
    return config.task_number(task)


def task_prompt(saved: SavedAdapter, task: str | int | None = None) -> SavedAdapter:
    """One task's prompt P_k = P* ∘ (u_k v_kᵀ) as an ordinary prompt-tuning adapter, `[n, d]`; heads come along.

    ConfigError for a prompt that is not multitask, and as in `task_of`.
    """
    config = saved.config
    if not isinstance(config, MultitaskPromptTuningConfig):
        raise ConfigError(f"{saved.source} is a {config.peft_type} prompt, which has no tasks to fold.")
    number = task_of(config, task, saved.source) or 0
    encoder = MultitaskPromptEmbedding(replace(config, inference_mode=True))
    encoder.load_saved(saved.tensors)
    shared = {each.name for each in fields(EmbeddingConfig)} - {"peft_type"}
    plain = PromptTuningConfig(**{name: getattr(config, name) for name in shared})
    heads = {name: tensor for name, tensor in saved.tensors.items() if name not in encoder.saved_names}
    vectors = encoder.task_vectors(number).repeat(plain.saved_copies, 1)
    return SavedAdapter(plain, {"prompt_embeddings": vectors, **heads}, source=saved.source)


def fold_task(path: str | Path, out: str | Path, task: str | int | None = None) -> None:
    """Write one task of the saved multitask prompt at `path` as an ordinary prompt-tuning adapter in the folder `out`.

    It loads anywhere, in PEFT too, and gives the same outputs as the multitask prompt for that task.
    """
    folded = task_prompt(load_adapter(path), task)
    save_adapter(Path(out), folded.config, folded.tensors)
