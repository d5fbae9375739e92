"""P-tuning: GPT Understands, Too, https://arxiv.org/abs/2103.10385

Virtual tokens h_1 … h_p are the output of a small encoder over a table, h_i = MLP([LSTM(e_1…e_i); LSTM(e_i…e_p)])
(equation 6), or of an MLP alone; the encoder is dropped once trained. Here they stand in front of the input.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import final

from torch import Tensor, nn

from softprompt.config import EmbeddingConfig, PromptConfig, parse_enum
from softprompt.facts import Facts
from softprompt.prompt import EmbeddingPrompt, need_count


class PromptEncoderReparameterizationType(str, Enum):
    """The encoder over the table: an MLP of three linear layers, or a bidirectional LSTM and an MLP of two."""

    MLP = "MLP"
    LSTM = "LSTM"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(EmbeddingConfig):
    """P-tuning's choices. `encoder_hidden_size` defaults to `token_dim`; `encoder_num_layers` counts LSTM layers."""

    PEFT_TYPE = "P_TUNING"

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = field(
        default=PromptEncoderReparameterizationType.MLP, metadata={"help": "MLP or LSTM"}
    )
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "hidden units of the encoder"})
    encoder_num_layers: int = field(default=2, metadata={"help": "LSTM layers (an MLP always has three)"})
    encoder_dropout: float = field(default=0.0, metadata={"help": "dropout between LSTM layers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = parse_enum(
            PromptEncoderReparameterizationType, self.encoder_reparameterization_type, "encoder_reparameterization_type"
        )
        self._set("encoder_reparameterization_type", kind)
        self._check_count("encoder_num_layers")
        self._check_count("encoder_hidden_size") if self.encoder_hidden_size is not None else None
        self._check_dropout("encoder_dropout")


@final
class PromptEncoder(EmbeddingPrompt):
    """Indices `[B, n]` → `[B, n, token_dim]`. In `inference_mode` only the table is left and holds the result."""

    name = "p_tuning"
    config_class = PromptEncoderConfig
    table_is_prompt = True

    def __init__(self, config: PromptEncoderConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        need_count(config, "token_dim", *([] if config.inference_mode else ["encoder_hidden_size"]))
        assert config.token_dim is not None
        self.config = config
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size = config.encoder_hidden_size
        self.total_virtual_tokens = config.total_virtual_tokens
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(config.num_virtual_tokens, self.token_dim)
        if config.inference_mode:
            return
        hidden, width = config.encoder_hidden_size or self.token_dim, self.token_dim
        if self.encoder_type is PromptEncoderReparameterizationType.LSTM:
            layers = config.encoder_num_layers
            dropout = config.encoder_dropout if layers > 1 else 0.0  # dropout stands between layers
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
        linears = [nn.Linear(size, following) for size, following in pairwise(sizes)]
        steps: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            steps += [nn.ReLU(), linear]
        self.mlp_head = nn.Sequential(*steps)

    @classmethod
    def fill(cls, config: PromptConfig, facts: Facts) -> PromptConfig:
        filled = super().fill(config, facts)
        assert isinstance(filled, PromptEncoderConfig)
        return replace(filled, encoder_hidden_size=filled.encoder_hidden_size or filled.token_dim)

    def forward(self, indices: Tensor) -> Tensor:
        rows = self.embedding(indices)
        if self.config.inference_mode:
            return rows
        if self.encoder_type is PromptEncoderReparameterizationType.LSTM:
            rows = self.lstm_head(rows)[0]
        return self.mlp_head(rows)

    def output_layer(self) -> nn.Linear | None:
        if self.config.inference_mode:
            return None
        last = self.mlp_head[-1]
        assert isinstance(last, nn.Linear)
        return last
