"""What decides whether a prompt can stand before a base model, from their sizes alone."""

from softprompt.config import PromptConfig
from softprompt.errors import ConfigError
from softprompt.facts import Facts
from softprompt.prompt import METHODS, SoftPrompt


def method_of(config: PromptConfig) -> type[SoftPrompt]:
    """The method a config belongs to. Raises ConfigError naming what there is."""
    for method in METHODS.values():
        if type(config) is method.config_class:
            return method
    known = ", ".join(method.config_class.__name__ for method in METHODS.values())
    raise ConfigError(f"{type(config).__name__} belongs to no method here; use one of {known}.")


def fitted(config: PromptConfig, facts: Facts) -> PromptConfig:
    """The config with everything that the base model decides filled in; ConfigError where they do not go together."""
    method = method_of(config)
    context = facts.context
    if context is not None and config.num_virtual_tokens >= context:
        raise ConfigError(
            f"num_virtual_tokens={config.num_virtual_tokens} leaves no room in this model's context of {context} "
            "tokens; use fewer virtual tokens."
        )
    if config.num_transformer_submodules == 2 and not facts.encoder_decoder:
        raise ConfigError("num_transformer_submodules=2 is for encoder-decoders, which this model is not; use 1.")
    return method.fill(config, facts)
