"""`AutoPeftModelFor…`: the base model that a saved prompt names, loaded with the prompt before it. Names are PEFT's.

The name comes out of `adapter_config.json`, so a prompt from a stranger decides which model is loaded. It is loaded as
transformers loads any: no code of the model's own runs unless the caller passes `trust_remote_code=True`.
"""

from pathlib import Path
from typing import Any, ClassVar, final

from softprompt.checkpoint import load_config
from softprompt.config import PromptConfig, TaskType
from softprompt.errors import ConfigError
from softprompt.model import SoftPromptModel

_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
_OF_THE_HUB = ("cache_dir", "token", "local_files_only")


class AutoPeftModel:
    """Of any task: the prompt says which. A prompt without a task says the class of its base model."""

    task_type: ClassVar[TaskType | None] = None

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        **options: Any,
    ) -> SoftPromptModel:
        """The base model and the prompt in the folder (or hub id) `model_id`.

        `revision` and `subfolder` are the prompt's; `options` go to the base model's `from_pretrained`. Raises
        CheckpointError for the prompt, ConfigError for a base model that is not named or cannot be loaded.
        """
        for_hub: dict[str, Any] = {name: options[name] for name in _OF_THE_HUB if name in options} | {
            "subfolder": subfolder
        }
        config = load_config(model_id, revision, **for_hub)
        if config.base_model_name_or_path is None:
            raise ConfigError(
                f"{model_id} names no base model; load one, and the prompt with SoftPromptModel.from_pretrained."
            )
        kind = _base_class(cls.task_type, config, model_id)
        name, own = config.base_model_name_or_path, {} if config.revision is None else {"revision": config.revision}
        try:
            base = kind.from_pretrained(name, **own, **options)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise ConfigError(
                f"{model_id} is a prompt for {name}, which cannot be loaded ({reason}); load it yourself and put the "
                "prompt on it with SoftPromptModel.from_pretrained."
            ) from error
        return SoftPromptModel.from_pretrained(base, model_id, adapter_name, is_trainable, revision=revision, **for_hub)


def _base_class(task_type: TaskType | None, config: PromptConfig, where: str | Path) -> Any:
    """The transformers class to load the base model with."""
    import transformers

    saved = config.task_type
    if isinstance(saved, TaskType):
        if task_type not in (None, saved):
            raise ConfigError(f"{where} is a prompt for {saved}, not for {task_type}; load it with AutoPeftModel.")
        return getattr(transformers, _CLASSES[saved])
    if task_type is not None:
        return getattr(transformers, _CLASSES[task_type])
    kind = getattr(transformers, str((config.auto_mapping or {}).get("base_model_class")), None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    raise ConfigError(f"{where} says neither its task nor a class of transformers for its base model; load it with the "
                      "class for your task, such as AutoPeftModelForCausalLM.")  # fmt: skip


@final
class AutoPeftModelForCausalLM(AutoPeftModel):
    task_type = TaskType.CAUSAL_LM


@final
class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task_type = TaskType.SEQ_2_SEQ_LM


@final
class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task_type = TaskType.SEQ_CLS


@final
class AutoPeftModelForTokenClassification(AutoPeftModel):
    task_type = TaskType.TOKEN_CLS


@final
class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task_type = TaskType.QUESTION_ANS


@final
class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task_type = TaskType.FEATURE_EXTRACTION
