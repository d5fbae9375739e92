"""One file per method. Importing this package registers them; `METHODS` is the registry by name."""

from importlib import import_module
from pkgutil import iter_modules

from softprompt.methods.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from softprompt.methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from softprompt.methods.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from softprompt.prompt import METHODS

__all__ = [
    "METHODS",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
]

for _module in iter_modules(__path__):  # a new file here is a new method: nothing to list
    import_module(f"{__name__}.{_module.name}")
