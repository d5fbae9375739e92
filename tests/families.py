"""Every model family that the conformance tests run, each built tiny from its config, for every head it has.

``build("t5", "SEQ_CLS")`` gives a fresh, seeded copy in eval mode; ``FAMILIES["t5"].tasks`` are the heads that
transformers has for it. A new family is a new row of ``FAMILIES``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import tiny
import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

HEADS: dict[str, Any] = {
    "CAUSAL_LM": hf.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": hf.AutoModelForSeq2SeqLM,
    "MASKED_LM": hf.AutoModelForMaskedLM,  # not one of the task types: `task_type=None`
    "SEQ_CLS": hf.AutoModelForSequenceClassification,
    "TOKEN_CLS": hf.AutoModelForTokenClassification,
    "QUESTION_ANS": hf.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": hf.AutoModel,
}
LANGUAGE = {"encoder": "MASKED_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}  # everything else: CAUSAL_LM


@dataclass(frozen=True)
class Family:
    """`kind`: decoder, encoder, encoder-decoder, recurrent, hybrid or multimodal.

    `no_keys` is what the refusal of keys and values must say, for a family that cannot have them. `heads` limits the
    tasks where the config decides (a model that is told to be a decoder has one head).
    """

    kind: str
    config_class: type[PreTrainedConfig]
    options: dict[str, Any]
    no_keys: str | None = None
    heads: tuple[str, ...] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names in `HEADS` of the models that transformers has, the language model first."""
        language = LANGUAGE.get(self.kind, "CAUSAL_LM")
        others = [task for task in HEADS if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "MASKED_LM")]
        wanted = self.heads or (language, *others)
        return tuple(task for task in wanted if self.config_class in self.auto(task)._model_mapping)

    def auto(self, task: str) -> Any:
        return hf.AutoModelForImageTextToText if (self.kind, task) == ("multimodal", "CAUSAL_LM") else HEADS[task]


_NAMES = tiny.TOKENS
_GQA = tiny.GQA
_GPT = {**_NAMES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": tiny.CONTEXT} | {
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_ENCODER = tiny.ENCODER
_SEQ2SEQ: dict[str, Any] = {
    **_NAMES,
    "init_std": 0.2,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": tiny.CONTEXT,
    "dropout": 0.0,
    "decoder_start_token_id": tiny.EOS,
    "forced_eos_token_id": None,
    "num_labels": tiny.LABELS,
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_WINDOW = 5  # shorter than the tests' prompt and text together
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_YARN = {  # as in the real one, whose positions are stretched 32 times
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    | {"truncate": False, "original_max_position_embeddings": tiny.CONTEXT // 32}
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _known(name: str, kind: str) -> Family:
    return Family(kind, *tiny.CONFIGS[name])


_FALCON = {**_without(_GQA, "num_key_value_heads", "head_dim", "intermediate_size"), "bias": True}

FAMILIES: dict[str, Family] = {
    "gpt2": _known("gpt2", "decoder"),
    "gptj": Family("decoder", hf.GPTJConfig, {**_GPT, "rotary_dim": 4}),
    "gpt_neox": _known("gpt_neox", "decoder"),
    "opt": _known("opt", "decoder"),
    "bloom": Family("decoder", hf.BloomConfig, {**_NAMES, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": Family(
        "decoder", hf.MptConfig, {**_NAMES, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": tiny.CONTEXT}
    ),
    "falcon_multi_query": Family("decoder", hf.FalconConfig, _FALCON),
    "falcon_gqa": Family("decoder", hf.FalconConfig, {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": Family("decoder", hf.FalconConfig, {**_FALCON, "alibi": True, "multi_query": False}),
    "llama": _known("llama", "decoder"),
    "mistral_window": Family("decoder", hf.MistralConfig, {**_GQA, "sliding_window": _WINDOW}),
    "mixtral": Family("decoder", hf.MixtralConfig, {**_GQA, **_EXPERTS}),
    "qwen2": _known("qwen2", "decoder"),
    "qwen3": _known("qwen3", "decoder"),
    "gemma2": Family("decoder", hf.Gemma2Config, {**_GQA, "query_pre_attn_scalar": 8, "sliding_window": _WINDOW}),
    "gemma3": Family("decoder", hf.Gemma3TextConfig, {**tiny.CONFIGS["gemma3"][1], "sliding_window": _WINDOW}),
    "phi3": Family("decoder", hf.Phi3Config, _without(_GQA, "head_dim")),
    "cohere2": Family(
        "decoder",
        hf.Cohere2Config,
        {**_GQA, "sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 1.0},
    ),
    "olmo2": Family("decoder", hf.Olmo2Config, _without(_GQA, "head_dim")),
    "gpt_oss": Family("decoder", hf.GptOssConfig, {**_GQA, **_EXPERTS, **_YARN, "sliding_window": _WINDOW}),
    "deepseek_v3": Family(
        "decoder",
        hf.DeepseekV3Config,
        {
            **_without(_GQA, "head_dim"),
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "kv_lora_rank": 12,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "roberta_decoder": Family(
        "decoder", hf.RobertaConfig, {**tiny.CONFIGS["roberta"][1], "is_decoder": True}, heads=("CAUSAL_LM",)
    ),
    "qwen3_next": Family(
        "hybrid",
        hf.Qwen3NextConfig,
        {
            **_GQA,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "lfm2": Family(
        "hybrid",
        hf.Lfm2Config,
        {**_without(_GQA, "head_dim"), "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "jamba": Family(
        "hybrid",
        hf.JambaConfig,
        {
            **_without(_GQA, "head_dim"),
            "num_experts": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "mamba": Family(
        "recurrent",
        hf.MambaConfig,
        {**_NAMES, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
        no_keys="attention",
    ),
    "t5": Family(
        "encoder-decoder",
        hf.T5Config,
        {
            **_without(_NAMES, "initializer_range", "bos_token_id"),
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": tiny.PAD,
            "num_labels": tiny.LABELS,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
        },
    ),
    "bart": Family("encoder-decoder", hf.BartConfig, _SEQ2SEQ),
    "mbart": Family("encoder-decoder", hf.MBartConfig, {**_SEQ2SEQ, "scale_embedding": True}),
    "pegasus": Family("encoder-decoder", hf.PegasusConfig, _SEQ2SEQ),
    "blenderbot": Family("encoder-decoder", hf.BlenderbotConfig, {**_SEQ2SEQ, "encoder_no_repeat_ngram_size": 0}),
    "bert": _known("bert", "encoder"),
    "roberta": _known("roberta", "encoder"),
    "albert": Family(
        "encoder",
        hf.AlbertConfig,
        {**_ENCODER, "embedding_size": 16, "classifier_dropout_prob": 0.0},
    ),
    "distilbert": _known("distilbert", "encoder"),
    "electra": Family("encoder", hf.ElectraConfig, {**_ENCODER, "embedding_size": 16, "summary_last_dropout": 0.0}),
    "deberta_v2": Family(
        "encoder",
        hf.DebertaV2Config,
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
        no_keys="AttentionInterface",
    ),
    "modernbert": Family(
        "encoder",
        hf.ModernBertConfig,
        {
            **_without(_ENCODER, "hidden_dropout_prob", "attention_probs_dropout_prob"),
            "local_attention": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "cls_token_id": tiny.BOS,
            "sep_token_id": tiny.EOS,
        },
    ),
    "llava": Family(
        "multimodal",
        hf.LlavaConfig,
        {
            "text_config": {"model_type": "llama", **_GQA},
            "image_token_index": tiny.VOCAB - 1,
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 8, "patch_size": 4},
        },
    ),
    "qwen2_vl": Family(
        "multimodal",
        hf.Qwen2VLConfig,
        {
            "text_config": {**_without(_GQA, "head_dim"), **_MROPE},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
            "image_token_id": tiny.VOCAB - 1,
            "video_token_id": tiny.VOCAB - 2,
            "vision_start_token_id": tiny.VOCAB - 3,
            "vision_end_token_id": tiny.VOCAB - 4,
        },
    ),
}


def build(family: str, task: str, seed: int = 0) -> PreTrainedModel:
    """A fresh copy in eval mode, the same weights in every process; a model of `tasks`, else a KeyError."""
    return copy.deepcopy(_cached(family, task, seed))


@cache
def _cached(name: str, task: str, seed: int) -> PreTrainedModel:
    family = FAMILIES[name]
    config = family.config_class(**copy.deepcopy(family.options))
    config.get_text_config().num_labels = 2 if task == "QUESTION_ANS" else tiny.LABELS
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family.auto(task).from_config(config)
        tiny.perturb(model)
    return model.eval()
