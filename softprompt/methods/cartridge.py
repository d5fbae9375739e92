"""Cartridge: Lightweight and general-purpose long context representations via self-study, https://arxiv.org/abs/2506.06266

A cartridge is a trained cache: every layer's keys and values of p tokens, Z = (z_1 … z_p) with z_i ∈ R^{2×d} per
layer, usually started from the cache of a text's first p tokens. The first ones stay as they were started:
they are what attention falls back on, and training them is unstable. `softprompt.together.compose` puts cartridges
behind each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from softprompt.config import KVConfig
from softprompt.errors import ConfigError
from softprompt.prompt import KVPrompt, need_count


@dataclass(frozen=True, kw_only=True)
class CartridgeConfig(KVConfig):
    """Cartridge's one choice: the first `num_frozen_tokens` virtual tokens keep their keys and values."""

    PEFT_TYPE = "CARTRIDGE"

    num_frozen_tokens: int = field(default=1, metadata={"help": "virtual tokens at the front that are not trained"})

    def __post_init__(self) -> None:
        super().__post_init__()
        frozen = self.num_frozen_tokens
        if type(frozen) is not int or not 0 <= frozen <= self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens={frozen!r} of num_virtual_tokens={self.num_virtual_tokens}; it is a whole number "
                "from 0 to that."
            )


@final
class SinkTable(nn.Module):
    """A table `[n, width]` whose first rows are a buffer, out of every optimiser's reach; its state is one `weight`."""

    frozen: Tensor

    def __init__(self, rows: int, width: int, frozen: int) -> None:
        super().__init__()
        self.num_embeddings = rows
        start = torch.randn(rows, width)
        self.register_buffer("frozen", start[:frozen].clone())
        self.trained = nn.Parameter(start[frozen:].clone())

    @property
    def weight(self) -> Tensor:
        """All rows, `[n, width]`, with gradient for those that are trained."""
        return torch.cat([self.frozen, self.trained])

    def forward(self, indices: Tensor) -> Tensor:
        return self.weight[indices]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, expected = f"{prefix}weight", (self.num_embeddings, self.frozen.shape[1])
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key != name]
        weight = state_dict.get(name)
        if weight is None:
            missing_keys += [name] if strict else []
        elif tuple(weight.shape) != expected:
            error_msgs.append(f"size mismatch for {name}: {tuple(weight.shape)} given, {expected} needed.")
        else:
            count = len(self.frozen)
            self.frozen.copy_(weight[:count])
            self.trained.copy_(weight[count:])


@final
class CartridgeEncoder(KVPrompt):
    """Indices `[B, n]` → `[B, n, Σ h·(k+v)]`, ordered K0, V0, K1, V1, … within a row; the table is the prompt."""

    name = "cartridge"
    config_class = CartridgeConfig
    table_is_prompt = True
    embedding: SinkTable

    def __init__(self, config: CartridgeConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        need_count(config, "token_dim", "num_layers", "num_attention_heads")
        self.config = config
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = config.num_virtual_tokens - config.num_frozen_tokens
        self.embedding = SinkTable(  # pyright: ignore[reportIncompatibleVariableOverride]
            config.num_virtual_tokens, config.prefix_width, config.num_frozen_tokens
        )

    @property
    def frozen_embedding(self) -> Tensor | None:
        """The rows that are not trained, `[num_frozen_tokens, width]`; None if there are none."""
        return self.embedding.frozen if self.num_frozen_tokens else None

    @property
    def trainable_embedding(self) -> nn.Parameter:
        """The rows that are trained, `[num_trainable_tokens, width]`."""
        return self.embedding.trained

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.embedding(indices)

    def output_layer(self) -> None:
        return None

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Copy a flat prefix `[n, width]` into the table, frozen rows included. ConfigError for another shape."""
        expected = (self.embedding.num_embeddings, self.embedding.frozen.shape[1])
        if tuple(prompt_embeddings.shape) != expected:
            raise ConfigError(
                f"Invalid `prompt_embeddings` shape. Expected {expected}, got {tuple(prompt_embeddings.shape)}."
            )
        self.embedding.load_state_dict({"weight": prompt_embeddings})

    def start_from(self, target: Tensor) -> None:
        self.load_prompt_embeddings(target)
