"""A prompt as a prompt cache of mlx-lm, which its `load_prompt_cache` and `mlx_lm.generate --prompt-cache-file` read.

The file (https://github.com/ml-explore/mlx-lm, `mlx_lm/models/cache.py`, as of 0.32.1, which reads no older ones) is a
safetensors file with `<layer>.0` and `<layer>.1`, keys and values `[1, h, p, k]`, and `<layer>.2`, p; and metadata:
`0.<key>` what is known of the cache, `1.<layer>` its class, `2.<n>` which of the tensors are to become Python numbers,
from n = 1 on. Keys stand there as they do in transformers' cache, after rotary embedding. Layers with a sliding window
get a `KVCache` too, which holds more than the window needs and is masked all the same, so that a prompt may be longer
than the window.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from softprompt.checkpoint import write_files
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.loading import resolve_model
from softprompt.prompt import KV

MODEL_TYPES = ("gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Those whose tokens are compared with ours in tests; others may keep their keys in another order."""


def save_mlx_cache(kv: KV, path: Path, base: str) -> None:
    """Write `kv`, a prompt before the model `base` (a folder or a name on the hub), in that model's number format.

    ConfigError for a path that mlx-lm would not read and layers that are not the model's, UnsupportedError for models
    and prompts that mlx-lm is not known to treat as transformers does.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"--out {path} must end with .safetensors, by which mlx-lm knows the format.")
    config = _config_of(base)
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"{base} is a {config.model_type}; prompt caches of mlx-lm are written for {', '.join(MODEL_TYPES)}, with "
            "which they have been compared."
        )
    if kv.always_visible:
        raise UnsupportedError("mlx-lm masks a prompt beyond a sliding window, and this one has prefix_always_visible.")
    if len(kv.layers) != config.num_hidden_layers:
        raise ConfigError(
            f"the prompt is for {len(kv.layers)} layers and {base} has {config.num_hidden_layers}; give its base model."
        )
    dtype = config.dtype or torch.float32
    tensors: dict[str, torch.Tensor] = {}
    told = {"0.model": resolve_model(base), "0.tokenizer_config": "{}", "0.softprompt": f"{kv.length} virtual tokens"}
    told["2.0"] = ""
    for layer, (key, value) in enumerate(kv.layers):
        tensors[f"{layer}.0"] = key.detach().to("cpu", dtype).contiguous()
        tensors[f"{layer}.1"] = value.detach().to("cpu", dtype).contiguous()
        tensors[f"{layer}.2"] = torch.tensor(kv.length, dtype=torch.int32)
        told |= {f"1.{layer}": "KVCache", f"2.{layer + 1}.0": f"{layer}.2", f"2.{layer + 1}.1": "scalar"}
    write_files(path.parent, [(path.name, save(tensors, told))])


def _config_of(base: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model(base))
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"the config of {base} cannot be read ({line}); give its folder by --model.") from error
