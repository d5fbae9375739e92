"""More decoders that attend in code of their own, each built tiny from its config: the cache door is for any of them.

`tests/families.py` has the ones that are promised; these show that nothing in the door is made for those alone.
"""

from __future__ import annotations

from typing import Any

import tiny
import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

_GPT: dict[str, Any] = {**tiny.TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": tiny.CONTEXT}
_PLAIN: dict[str, Any] = {
    **tiny.TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": tiny.CONTEXT,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

OTHERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt_neo": (  # learned positions, and a layer that sees the last five columns only
        hf.GPTNeoConfig,
        {**tiny.TOKENS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": tiny.CONTEXT}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    ),
    "codegen": (hf.CodeGenConfig, {**_GPT, **_NO_DROPOUT, "rotary_dim": 4}),
    "gpt_neox_japanese": (hf.GPTNeoXJapaneseConfig, {**_PLAIN, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "xglm": (
        hf.XGLMConfig,
        {**tiny.TOKENS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "dropout": 0.0}
        | {"max_position_embeddings": tiny.CONTEXT, "attention_dropout": 0.0, "init_std": 0.2},
    ),
}
REFUSED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "roformer": (  # rotates by column, padding included, and takes no positions
        hf.RoFormerConfig,
        {**_PLAIN, "embedding_size": 32, "is_decoder": True},
    ),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A fresh, seeded copy in eval mode."""
    config_class, options = {**OTHERS, **REFUSED}[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config_class(**options))
        tiny.perturb(model)
    return model.eval()
