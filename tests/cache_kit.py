"""What the tests of the cache door share: families, prompts, and what a padded batch must equal."""

import copy
from collections.abc import Callable
from typing import Any

import families
import families_cache
import naive
import tiny
import torch
from torch import Tensor

from softprompt import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, SoftPromptModel, get_peft_model

METHODS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=6, **more),
    "p_tuning": lambda **more: PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=16, **more),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=6, **more),
    "prefix_ffn": lambda **more: PrefixTuningConfig(
        num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=16, **more
    ),
}
TWO_KINDS = ("prompt_tuning", "prefix")
FAMILIES = ("bloom", "mpt", "falcon_multi_query", "falcon_gqa", "falcon_alibi", "gptj")
ALIBI_FROM_MASK = ("bloom", "falcon_alibi")  # their code takes no 4-D mask
WITH_POSITIONS = ("falcon_multi_query", "falcon_gqa", "gptj")
FEW = ("mpt", "falcon_multi_query", "gptj")


def make(family: str, method: str, eager: bool = False) -> SoftPromptModel:
    base = families_cache.build(family) if family in families_cache.OTHERS else families.build(family, "CAUSAL_LM")
    if eager:  # these families cannot change it later
        state = base.state_dict()
        base = type(base)._from_config(copy.deepcopy(base.config), attn_implementation="eager").eval()
        base.load_state_dict(state)
        assert base.base_model.config._attn_implementation == "eager"
    torch.manual_seed(0)
    return get_peft_model(base, METHODS[method]()).eval()


def ids_of(length: int, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)


def each_row_alone(model: SoftPromptModel, batch: dict[str, Tensor], got: Tensor) -> None:
    """`got` `[B, T, V]` is, at real tokens, what the plain formulation gives for each row alone."""
    for row, out, mask in zip(naive.rows(batch), got, batch["attention_mask"], strict=True):
        close(out[mask.bool()], naive.logits(model, row)[0][0])


OPTIONS: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": tiny.PAD,
    "use_cache": True,
}
