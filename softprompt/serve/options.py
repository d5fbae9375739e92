"""What the operator of a server decides."""

from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from softprompt.errors import ConfigError

ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class ServeOptions:
    """One base model, a folder of prompts, and limits. `resolved` fills in and checks. Raises ConfigError.

    `base`: a folder or a name on the hub. `prompts`: every adapter below it is served, by its relative path.
    """

    base: str
    prompts: Path
    engine: str | None = field(
        default=None, metadata={"help": "transformers or vllm. [default: vllm where it is installed]"}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on. [default: 127.0.0.1]"})
    port: int = field(default=8000, metadata={"help": "Port; 0: any that is free. [default: 8000]"})
    name: str | None = field(
        default=None, metadata={"help": "What requests call the base model. [default: its path's last part]"}
    )
    dtype: str = field(default="auto", metadata={"help": "Number format of the base model. [default: auto]"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, … [default: what there is]"})
    objects: Path | None = field(
        default=None, metadata={"help": "Folder for checked copies of the prompts. [default: a temporary one]"}
    )
    watch_seconds: float = field(
        default=2.0, metadata={"help": "How often the folder is looked at; 0: never. [default: 2]"}
    )
    keys: Path | None = field(
        default=None,
        metadata={"help": "YAML file of API keys and the prompts that each may use, with *. [default: all]"},
    )
    admin_key: str | None = field(
        default=None, metadata={"help": "Lets its holder load and unload prompts. [default: $SOFTPROMPT_ADMIN_KEY]"}
    )
    log_prompts: bool = field(default=False, metadata={"help": "Write the texts of requests to the log."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of prompt, text and answer together. [default: the base model's]"}
    )
    max_batch: int = field(default=64, metadata={"help": "Requests that are answered at a time. [default: 64]"})
    max_cache_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that all of them may hold. [default: what fits]"}
    )
    max_waiting: int = field(
        default=256, metadata={"help": "Requests that may wait; more get status 429. [default: 256]"}
    )
    max_body: int = field(default=1 << 20, metadata={"help": "Bytes of a request. [default: 1048576]"})
    timeout: float = field(default=600.0, metadata={"help": "Seconds for an answer. [default: 600]"})

    def resolved(self) -> "ServeOptions":
        """The same with `engine` and `name` filled in."""
        engine = self.engine or ("vllm" if find_spec("vllm") else "transformers")
        if engine not in ENGINES:
            raise ConfigError(f"engine={engine!r} is not one of {', '.join(ENGINES)}.")
        if engine == "vllm" and not find_spec("vllm"):
            raise ConfigError("engine='vllm' needs vLLM, which is not installed; install it or use transformers.")
        if not self.prompts.is_dir():
            raise ConfigError(f"there is no folder {str(self.prompts)!r}; --prompts is the folder of the adapters.")
        for each in ("watch_seconds", "max_waiting"):
            if getattr(self, each) < 0:
                raise ConfigError(f"{each}={getattr(self, each)!r} must be at least 0.")
        for each in ("max_length", "max_batch", "max_cache_tokens", "max_body", "timeout"):
            value = getattr(self, each)
            if value is not None and value <= 0:
                raise ConfigError(f"{each}={value!r} must be more than 0.")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port={self.port!r} must be between 0 and 65535.")
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        name = self.name or Path(self.base).name or self.base
        return ServeOptions(**{**values, "engine": engine, "name": name})
