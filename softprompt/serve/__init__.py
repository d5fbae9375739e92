"""A server for many prompts before one base model, with the OpenAI API. `softprompt serve BASE --prompts DIR`."""

from collections.abc import Sequence

from softprompt.errors import ConfigError
from softprompt.serve.options import ServeOptions

__all__ = ["ServeOptions", "serve"]


def serve(options: ServeOptions, engine_arguments: Sequence[str] = ()) -> None:
    """Serve until interrupted. `engine_arguments`: further flags of `vllm serve`. Raises SoftPromptError."""
    options = options.resolved()
    if options.engine == "vllm":
        from softprompt.serve.vllm.launch import launch

        launch(options, engine_arguments)
        return
    if engine_arguments:
        raise ConfigError(f"{engine_arguments[0]!r} is an argument for vLLM, and the engine is transformers.")
    from softprompt.serve.app import run

    run(options)
