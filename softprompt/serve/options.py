"""What the operator of a server decides."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ServeOptions:
    """`base`: a folder or a name on the hub. `prompts`: the folder whose adapters are served, each by its relative path.

    `engine` None: vLLM where it is installed, else transformers. `objects`: where checked copies of the prompts are kept;
    None: a temporary folder. `watch_seconds`: how often `prompts` is looked at; 0: never. `keys`: a YAML file that maps
    API keys to the names (with `*`) of the prompts each may use; None: everybody may use all. `admin_key`: lets its
    holder load and unload prompts over HTTP; None: nobody can. `log_prompts`: write the texts of requests to the log.

    Limits of the transformers engine: `max_length` tokens per request (None: the base model's), `max_batch` rows at a
    time, `max_cache_tokens` of all rows together, `max_waiting` requests before 429, `max_body` bytes of a request,
    `timeout` seconds for an answer.
    """

    base: str
    prompts: Path
    engine: Literal["transformers", "vllm"] | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    dtype: str = "auto"
    device: str | None = None
    objects: Path | None = None
    watch_seconds: float = 2.0
    keys: Path | None = None
    admin_key: str | None = None
    log_prompts: bool = False
    max_length: int | None = None
    max_batch: int = 64
    max_cache_tokens: int | None = None
    max_waiting: int = 256
    max_body: int = 1 << 20
    timeout: float = 600.0
