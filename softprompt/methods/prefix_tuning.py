"""Prefix tuning: Prefix-Tuning: Optimizing Continuous Prompts for Generation, https://arxiv.org/abs/2101.00190

Every attention layer gets p extra keys and values, P_θ ∈ R^{p×2Ld} (equation 3). Training them directly is unstable,
so they may be the output of a feed-forward network over a smaller table, P_θ[i] = FFN(P'[i]) (section 4.3), which is
dropped once trained.
"""

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from softprompt.config import KVConfig, PromptConfig
from softprompt.errors import ConfigError
from softprompt.facts import Facts
from softprompt.prompt import KVPrompt, need_count


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(KVConfig):
    """Prefix tuning's choices. `encoder_hidden_size` is the FFN's width (default: `token_dim`)."""

    PEFT_TYPE = "PREFIX_TUNING"

    prefix_projection: bool = field(default=False, metadata={"help": "train through the two-layer tanh FFN"})
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "hidden units of the FFN"})
    init_weights: str | None = field(default=None, metadata={"help": "'zero' starts from all-zero keys and values"})
    prefix_dropout: float = field(default=0.0, metadata={"help": "dropout on the keys and values"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("encoder_hidden_size") if self.encoder_hidden_size is not None else None
        self._check_dropout("prefix_dropout")
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"init_weights={self.init_weights!r} is not known; leave it unset or use 'zero'.")


@final
class PrefixEncoder(KVPrompt):
    """Indices `[B, n]` → `[B, n, 2·layers·hidden]`, ordered K0, V0, K1, V1, … within a row.

    `embedding` is the table; `transform` the two-layer tanh FFN if `prefix_projection` (and not `inference_mode`).
    """

    name = "prefix_tuning"
    config_class = PrefixTuningConfig
    table_is_prompt = True

    def __init__(self, config: PrefixTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        need_count(config, "token_dim", "num_layers", *(["encoder_hidden_size"] if config.prefix_projection else []))
        assert config.token_dim is not None and config.num_layers is not None
        self.config = config
        self.prefix_projection = config.prefix_projection and not config.inference_mode
        self.dropout = nn.Dropout(config.prefix_dropout)
        width = config.prefix_width
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim if self.prefix_projection else width)
        last: nn.Module = self.embedding
        if self.prefix_projection:
            hidden = config.encoder_hidden_size or config.token_dim
            last = nn.Linear(hidden, width)
            self.transform = nn.Sequential(nn.Linear(config.token_dim, hidden), nn.Tanh(), last)
        if config.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def fill(cls, config: PromptConfig, facts: Facts) -> PromptConfig:
        filled = super().fill(config, facts)
        assert isinstance(filled, PrefixTuningConfig)
        return replace(filled, encoder_hidden_size=filled.encoder_hidden_size or filled.token_dim)

    def forward(self, indices: Tensor) -> Tensor:
        rows = self.embedding(indices)
        return self.dropout(self.transform(rows) if self.prefix_projection else rows)

    def output_layer(self) -> nn.Linear | None:
        if not self.prefix_projection:
            return None
        last = self.transform[-1]
        assert isinstance(last, nn.Linear)
        return last

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Copy a flat prefix `[n, 2·layers·hidden]` into the table.

        Raises ConfigError (a ValueError) with `prefix_projection=True`, where no table of that shape exists
        (`initialize_kv_prefix_from_past_key_values` fits the FFN instead), and for another shape.
        """
        if self.prefix_projection:
            raise ConfigError(
                "Cannot load flattened prompt embeddings when `prefix_projection=True`; use "
                "initialize_kv_prefix_from_past_key_values or start_from, which fit the FFN to them."
            )
        if prompt_embeddings.shape != self.embedding.weight.shape:
            raise ConfigError(
                f"Invalid `prompt_embeddings` shape. Expected {tuple(self.embedding.weight.shape)}, "
                f"got {tuple(prompt_embeddings.shape)}."
            )
        self.embedding.weight.copy_(prompt_embeddings)
