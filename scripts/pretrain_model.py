"""The architecture, the loss and its measurement for scripts/pretrain.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_data import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 1024


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


class LinearCrossEntropy(torch.autograd.Function):
    """Mean next-token loss from hidden states, a chunk of rows at a time.

    The gradient is taken while the chunk's logits are still in cache, so the full (tokens, vocabulary) matrix is
    never written out: on a CPU that matrix costs more than all the layers' matrix products together.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, chunk: int = 512) -> Tensor:
        rows, matrix = hidden.bfloat16(), weight.bfloat16()
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        total, count = 0.0, hidden.shape[0]
        for start in range(0, count, chunk):
            part, wanted = rows[start : start + chunk], target[start : start + chunk, None]
            log_probs = torch.log_softmax((part @ matrix.T).float(), dim=-1)
            total -= float(log_probs.gather(1, wanted).sum())
            error = log_probs.exp_()
            error.scatter_add_(1, wanted, error.new_full(wanted.shape, -1.0))
            error = error.bfloat16()
            hidden_grad[start : start + chunk] = error @ matrix
            weight_grad += error.T @ part
        ctx.save_for_backward(hidden_grad.div_(count), weight_grad.div_(count))
        return hidden.new_tensor(total / count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, weight_grad * grad, None, None


@torch.inference_mode()
def heldout_loss(
    model: LlamaForCausalLM, file: Path, windows: int | None = None, bf16: bool = True
) -> tuple[float, int]:
    """Total nats and the number of tokens predicted over a held-out token file (or its first few windows)."""
    tokens = torch.from_numpy(np.fromfile(file, dtype=np.uint16).astype(np.int64))
    total, count = 0.0, 0
    for piece in list(tokens.split(CONTEXT - 1))[:windows]:
        ids = torch.cat([piece.new_tensor([BOS_ID]), piece])[None]
        labels = ids[0, 1:].masked_fill(ids[0, 1:] == BOS_ID, -100)  # between documents there is nothing to predict
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total, count
