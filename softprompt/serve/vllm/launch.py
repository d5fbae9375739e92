"""`softprompt serve --engine vllm`: `vllm serve` with the connector and the plugin."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from tempfile import mkdtemp

from softprompt.errors import ConfigError
from softprompt.loading import resolve_model
from softprompt.serve.options import ServeOptions
from softprompt.serve.vllm.settings import ADMIN_KEY, Settings

RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
"""On a CPU vLLM leaves one core to its scheduler, and one more to any KV connector; this one has no use for it."""

GROUPS = ("general", "io_processor", "platform", "stat_logger")
"""Plugins of these kinds vLLM loads unless `VLLM_PLUGINS` is set, which it has to be for ours."""

NOT_HERE = {
    "device": "vLLM's installation decides the device",
    "max_cache_tokens": "write -- --kv-cache-memory-bytes N",
    "log_prompts": "write -- --enable-log-requests",
    "max_body": "put a proxy before it that limits bodies",
    "timeout": "put a proxy before it that limits the time, or have clients do so",
}


def launch(options: ServeOptions, engine_arguments: Sequence[str] = ()) -> None:
    """Become `vllm serve`; this process does not return. ConfigError for options that vLLM has no word for."""
    arguments, environment = command(options, engine_arguments)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def command(options: ServeOptions, engine_arguments: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """What Python runs, and the environment it runs in. ConfigError."""
    usual = {each.name: each.default for each in fields(options)}
    for name, remedy in NOT_HERE.items():
        if getattr(options, name) != usual[name]:
            raise ConfigError(f"{name}={getattr(options, name)!r} means nothing to the engine vllm; {remedy}.")
    objects, sole = options.objects, False
    if objects is None:
        objects, sole = Path(mkdtemp(prefix="softprompt-objects-")), True
    settings = Settings(options.prompts, objects, options.watch_seconds, options.keys, sole)
    arguments = [*_program(resolve_model(options.base)), "--host", options.host, "--port", str(options.port)]
    arguments += ["--dtype", options.dtype, "--max-num-seqs", str(options.max_batch)]
    arguments += ["--max-num-queued-reqs", str(options.max_batch + options.max_waiting)]
    arguments += ["--kv-transfer-config", json.dumps(settings.as_config())]
    if options.name is not None:
        arguments += ["--served-model-name", options.name]
    if options.max_length is not None:
        arguments += ["--max-model-len", str(options.max_length)]
    return [*arguments, *engine_arguments], _environment(options)


def _program(base: str) -> list[str]:
    """`vllm serve`; its server alone where the package has another name (vllm-cpu), for which `vllm` ends at once."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", base]
    return ["-m", "vllm.entrypoints.cli.main", "serve", base]


def _environment(options: ServeOptions) -> dict[str, str]:
    environment = dict(os.environ)
    if "VLLM_PLUGINS" in environment:
        names = [name for name in environment["VLLM_PLUGINS"].split(",") if name]
    else:
        names = [each.name for kind in GROUPS for each in entry_points(group=f"vllm.{kind}_plugins")]
    environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "softprompt"]))
    environment.setdefault(RESERVED, "1")
    if options.admin_key is not None:
        environment[ADMIN_KEY] = options.admin_key
    return environment
