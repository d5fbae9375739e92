"""Tiny models and a tiny tokenizer, built from configs: no download, a few milliseconds each, never degenerate.

``build("llama")`` gives a fresh, seeded copy in eval mode; parametrise over ``DECODERS`` or ``ENCODERS`` (``MORE_…``).
Every weight is random, biases and norms included, so that a bias or a norm that is applied twice or not at all shows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

VOCAB = 320
CONTEXT = 160
PAD, BOS, EOS = 0, 1, 2
LABELS = 3

TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
GQA: dict[str, Any] = {  # what Llama and its relatives share: two key/value heads for four query heads
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}
ENCODER: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": LABELS,
}

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (
        GPT2Config,
        {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": (LlamaConfig, GQA),
    "mistral": (MistralConfig, {**GQA, "sliding_window": 4 * CONTEXT}),
    "qwen2": (Qwen2Config, {k: v for k, v in GQA.items() if k != "head_dim"}),
    "qwen3": (Qwen3Config, {**GQA, "head_dim": 16}),  # heads wider than hidden_size / heads, as in the real ones
    "gemma3": (
        Gemma3TextConfig,
        {**GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4 * CONTEXT}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "opt": (
        OPTConfig,
        {**TOKENS, "init_std": 0.2, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT},
    ),
    "gpt_neox": (
        GPTNeoXConfig,
        {**TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": CONTEXT},
    ),
    "bert": (BertConfig, ENCODER),
    "roberta": (RobertaConfig, {**ENCODER, "max_position_embeddings": CONTEXT + 2}),
    "distilbert": (
        DistilBertConfig,
        {**TOKENS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": CONTEXT}
        | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": LABELS},
    ),
}
DECODERS = ("gpt2", "llama", "mistral", "qwen3", "gemma3")  # the families that the exactness statement is made for
MORE_DECODERS = ("qwen2", "opt", "gpt_neox")
ENCODERS = ("bert", "roberta")
MORE_ENCODERS = ("distilbert",)


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A fresh copy of the seeded model of ``family``; ``overrides`` change its config (then nothing is cached)."""
    if overrides:
        return _make(family, seed, overrides)
    return copy.deepcopy(_cached(family, seed))


@cache
def _cached(family: str, seed: int) -> PreTrainedModel:
    return _make(family, seed, {})


def _make(family: str, seed: int, overrides: dict[str, Any]) -> PreTrainedModel:
    config_class, options = CONFIGS[family]
    config = config_class(**{**options, **overrides})
    encoder = family in ENCODERS + MORE_ENCODERS
    auto: Any = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        perturb(model)
    return model.eval()


@torch.no_grad()
def perturb(model: PreTrainedModel) -> None:
    """Move biases off 0 and norms off 1, their values straight after construction."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


_CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_WORDS = "the cat sat on the mat and the dog ran to the red house by the river while it rained all night long "


def _corpus() -> Iterator[str]:
    yield from [_WORDS * 4, "name[The Mill], food[French], area[riverside] => The Mill serves French food. " * 4]


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``VOCAB`` pieces with pad, bos, eos and a chat template; a fresh copy."""
    return copy.deepcopy(_tokenizer())


def ragged(lengths: tuple[int, ...] = (5, 9, 7), side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """Random rows of the given lengths padded on ``side``: ``input_ids`` and ``attention_mask``, both ``[B, T]``."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, where] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}
