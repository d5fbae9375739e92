"""Soft prompts over frozen Hugging Face models: one frozen model, a few learned vectors per task."""

from softprompt.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from softprompt.checking import check
from softprompt.cloze import Cloze
from softprompt.cloze.verbalizer import Verbalizer
from softprompt.config import PromptConfig, TaskType
from softprompt.errors import CheckpointError, ConfigError, DataError, RowsError, SoftPromptError, UnsupportedError
from softprompt.initialize import (
    initialize_from_text,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from softprompt.methods import (
    METHODS,
    CartridgeConfig,
    CartridgeEncoder,
    CPTConfig,
    CPTEmbedding,
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PeftType,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_config,
)
from softprompt.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    SoftPromptModel,
    get_peft_model,
)
from softprompt.prompt import KV, Embeddings, SoftPrompt
from softprompt.start import initialize_from_examples
from softprompt.store import PromptStore
from softprompt.template import Template
from softprompt.together.compare import compare_prompts, initialize_from_prompt
from softprompt.together.compose import compose_cartridge_adapters, compose_prefixes
from softprompt.together.ensemble import PromptEnsemble
from softprompt.together.tasks import fold_task

PeftConfig = PromptConfig
__version__ = "0.1.0"

__all__ = [
    "KV",
    "METHODS",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "CheckpointError",
    "Cloze",
    "ConfigError",
    "DataError",
    "Embeddings",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptEnsemble",
    "PromptStore",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RowsError",
    "SoftPrompt",
    "SoftPromptError",
    "SoftPromptModel",
    "TaskType",
    "Template",
    "UnsupportedError",
    "Verbalizer",
    "__version__",
    "check",
    "compare_prompts",
    "compose_cartridge_adapters",
    "compose_prefixes",
    "fold_task",
    "get_peft_config",
    "get_peft_model",
    "initialize_from_examples",
    "initialize_from_prompt",
    "initialize_from_text",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values",
]
