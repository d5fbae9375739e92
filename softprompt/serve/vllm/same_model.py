"""Whether vLLM runs the model that prompts are folded with: the one that the base model's files describe."""

from typing import Any

from vllm.transformers_utils.config import iter_rope_parameters

from softprompt.errors import ConfigError, UnsupportedError

CHANGES = ("revision", "hf_overrides", "hf_config_path")  # of vLLM's `ModelConfig`


def check_same_model(config: Any) -> None:
    """`config` is vLLM's `ModelConfig`. ConfigError for settings that change the model; UnsupportedError for rotary
    embeddings of which vLLM has other numbers at the virtual tokens' positions than transformers has.
    """
    for name in CHANGES:
        if getattr(config, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(config, name)!r} changes the model, and prompts would be folded "
                "with what its files say; write the change into a copy of its files, and serve that."
            )
    for rope in iter_rope_parameters(config.hf_text_config):
        kind, own = rope.get("rope_type"), rope.get("original_max_position_embeddings", 0)
        if kind == "dynamic":
            raise UnsupportedError(
                f"rope_type {kind!r} depends on how long the text is in transformers and not in vLLM, so a prompt's "
                "keys would not fit; serve this model with --engine transformers."
            )
        if kind == "longrope" and config.max_model_len > own:
            raise UnsupportedError(
                f"with --max-model-len {config.max_model_len} vLLM takes longrope's factors for long texts everywhere, "
                f"which prompts were not trained with; give --max-model-len {own}."
            )
