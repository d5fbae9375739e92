"""What the plugin and the connector are told, in vLLM's own `--kv-transfer-config`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.errors import ConfigError

CONNECTOR, MODULE = "SoftPromptConnector", "softprompt.serve.vllm.connector"
ADMIN_KEY = "SOFTPROMPT_ADMIN_KEY"


@dataclass(frozen=True)
class Settings:
    """`kv_connector_extra_config`: `prompts`, the folder that is served; `objects`, for checked copies of them, which
    all processes of the server can read; `watch_seconds`; `keys`, a file of API keys; `sole`: nobody else uses
    `objects`. The administrator's key comes from the environment, where `ps` does not show it.
    """

    prompts: Path
    objects: Path
    watch_seconds: float = 2.0
    keys: Path | None = None
    sole: bool = False

    @staticmethod
    def of(transfer: Any) -> "Settings":
        """From vLLM's `KVTransferConfig`. ConfigError."""
        if transfer is None or transfer.kv_connector != CONNECTOR:
            raise ConfigError(
                f"VLLM_PLUGINS has softprompt, but --kv-transfer-config does not have the connector {CONNECTOR}; start "
                "the server by `softprompt serve`, or as docs/serving.md says."
            )
        extra = transfer.kv_connector_extra_config
        missing = [name for name in ("prompts", "objects") if not isinstance(extra.get(name), str)]
        if missing:
            raise ConfigError(f"kv_connector_extra_config has no {' and no '.join(missing)}; give a folder.")
        keys = extra.get("keys")
        return Settings(
            Path(extra["prompts"]),
            Path(extra["objects"]),
            float(extra.get("watch_seconds", 2.0)),
            None if keys is None else Path(keys),
            bool(extra.get("sole", False)),
        )

    def as_config(self) -> dict[str, Any]:
        """What `--kv-transfer-config` gets, as JSON."""
        extra = {
            "prompts": str(self.prompts.absolute()),
            "objects": str(self.objects.absolute()),
            "watch_seconds": self.watch_seconds,
            "keys": None if self.keys is None else str(self.keys.absolute()),
            "sole": self.sole,
        }
        return {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": extra,
        }

    @property
    def admin_key(self) -> str | None:
        return os.environ.get(ADMIN_KEY) or None
