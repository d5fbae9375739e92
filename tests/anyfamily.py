"""Every language model class that the installed transformers knows, each built tiny from its own config's defaults.

``classes("causal")`` has the classes of a kind, ``build(name)`` makes one: seeded, in eval mode, every weight random.
Nothing here lists families that work. A config is made small by the names of its fields (`EXACT`, `ENDINGS`), layers
of every kind that the default model mixes are kept, and `EXCEPTIONS` has what some families want beside that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

KINDS: dict[str, str] = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
}
VOCAB, LABELS = 320, 3
PAD, BOS, EOS = 0, 1, 2
WORDS = range(10, 280)  # ids that mean nothing to any model here
WIDTH, HEADS, HEAD, INNER, EXPERTS, WINDOW = 32, 4, 8, 48, 4, 5

_WIDTHS = """hidden_size d_model n_embd dim emb_dim embedding_size embed_dim embedding_dim word_embed_proj_dim
    input_embedding_size output_embedding_size lru_width attention_hidden_size encoder_hidden_size hidden_size_global
    out_hidden_size projector_input_dim projector_output_dim vision_output_dim backbone_hidden_size input_size
    adapter_out_dim output_dim adapter_input_size d_latents true_hidden_size hidden_dim_out max_source_dim
    projection_dim lang_embed_dim unit_embed_dim prediction_head_size cross_attention_hidden_size"""
_LAYERS = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers depth num_blocks num_self_attends_per_block speech_encoder_layers t2u_encoder_layers
    t2u_decoder_layers num_hidden_layers_encoder num_layers_per_stack"""
_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
    num_encoder_attention_heads num_decoder_attention_heads attention_heads speech_encoder_attention_heads
    t2u_encoder_attention_heads t2u_decoder_attention_heads num_cross_attention_heads num_self_attention_heads
    swa_num_attention_heads linear_num_value_heads linear_num_heads conf_num_attention_heads"""
_KEY_HEADS = "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads"
_INNER = """intermediate_size n_inner d_ff ffn_dim d_inner dff dim_ff hidden_dim ffn_hidden_size encoder_ffn_dim
    decoder_ffn_dim feed_forward_size mlp_dim intermediate_size_mlp dense_intermediate_size
    speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim"""
_EXPERT_INNER = """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
    shared_experts_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size"""
_EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"
_CHOSEN = "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts num_experts_per_token top_k"
_HEAD_SIZES = """head_dim d_kv d_head dim_head kv_channels attention_head_size qk_nope_head_dim qk_rope_head_dim
    v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim index_head_dim qk_head_dim
    global_head_dim mamba_head_dim mamba_d_head attention_head_dim indexer_head_dim rotary_dim"""
_WINDOWS = """sliding_window attention_window_size sliding_window_size attention_chunk_size window_size
    local_attention keep_window_size"""
_CONTEXTS = """max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions
    max_target_positions max_encoder_position_embeddings max_decoder_position_embeddings t2u_max_position_embeddings"""
_VOCABULARIES = """vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input
    char_vocab_size audio_vocab_size unpadded_vocab_size entity_vocab_size output_vocab_size t2u_vocab_size
    encoder_hash_byte_group_vocab num_hash_buckets pronunciation_vocab_size shape_vocab_size unit_hifi_gan_vocab_size"""

EXACT: dict[str, int] = {
    name: value
    for names, value in (
        (_WIDTHS, WIDTH),
        (_LAYERS, 2),
        (_HEADS, HEADS),
        (_INNER, INNER),
        (_EXPERT_INNER, 16),
        (_EXPERTS, EXPERTS),
        (_CHOSEN, 2),
        (_HEAD_SIZES, HEAD),
        (_WINDOWS, WINDOW),
        (_CONTEXTS, 160),
        (_VOCABULARIES, VOCAB),
        ("kv_lora_rank", 12),
        ("q_lora_rank o_lora_rank", 16),
        ("n_group n_groups topk_group mamba_n_groups mamba_ngroups n_shared_experts num_shared_experts", 1),
        ("o_groups linear_num_key_heads", 2),
        ("state_size mamba_d_state ssm_state_size mamba_dt_rank time_step_rank", 4),
        ("chunk_size mamba_chunk_size block_multiple_of conv_kernel_size_attention", 8),
        ("image_size input_image_size", 16),
        ("patch_size", 4),
        ("num_mel_bins feature_size", 8),
        ("query_pre_attn_scalar hidden_size_per_layer_input index_topk", HEAD),
        ("first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
        ("relative_attention_num_buckets", 8),
        ("relative_attention_max_distance", 12),
        ("floor_scale log_scaling_n_floor", 4),
    )
    for name in names.split()
}
ENDINGS = ("_size", "_dim", "_rank", "_channels", "_features")  # of fields that `EXACT` does not know: at most 16
NAMED_IDS = {"pad": PAD, "bos": BOS, "eos": EOS, "unk": 3, "mask": 4, "cls": 5, "sep": 6}
_IDS = ("_token_id", "_token_index", "_index", "_token_ids")

Options = dict[str, Any]


def classes(kind: str) -> list[str]:
    """The names of the classes that transformers maps to a kind, in order; a class of two kinds is of the first."""
    earlier = [other for other in KINDS if list(KINDS).index(other) < list(KINDS).index(kind)]
    known = {name for other in earlier for name in _mapped(other)}
    return [name for name in _mapped(kind) if name not in known]


@functools.cache
def _mapped(kind: str) -> tuple[str, ...]:
    mapping = getattr(modeling_auto, KINDS[kind])._model_mapping._model_mapping
    names = {name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)}
    return tuple(sorted(names, key=str.lower))


def build(name: str, kind: str, seed: int = 0) -> PreTrainedModel:
    """A new tiny model of a class, the same weights in every process."""
    model_class = find(name)
    config = tiny_config(model_class.config_class, kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        randomize(model)
    return model.eval()


def find(name: str) -> Any:
    """The class of a name that transformers maps."""
    return getattr(hf, name)


# ---- weights -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Weights of a size at which layers matter: no zeros, no constants, attention that is far from uniform."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn_like(parameter)
        if parameter.dim() < 2 or _has_a_meaning(name):
            spread = 0.1 * noise
            parameter.copy_(torch.where(parameter.isfinite(), parameter, 0.0) + spread)
        else:
            parameter.copy_(noise * _scale(model, name, parameter))


def _has_a_meaning(name: str) -> bool:
    """Parameters whose starting values are not drawn: decay rates and the like."""
    return any(part in name for part in ("A_log", "dt_bias", "time_decay", "time_first", "time_mix", "recurrent_param"))


def _scale(model: nn.Module, name: str, parameter: Tensor) -> float:
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return 0.5
    inputs = max(parameter.shape[1:]) if parameter.dim() == 3 else parameter.shape[1:].numel()
    return 1 / math.sqrt(max(inputs, 1))


# ---- configs -----------------------------------------------------------------------------------------------------


def tiny_config(config_class: Any, kind: str) -> PreTrainedConfig:
    """The config of a class, made small."""
    model_type = config_class.model_type
    make = WHOLE.get(model_type)
    if make is not None:
        return make()
    return _tiny(config_class, config_class(), kind)


def _tiny(config_class: Any, default: PreTrainedConfig, kind: str) -> PreTrainedConfig:
    options = shrunk(default) | _of_kind(config_class, kind)
    options |= EXCEPTIONS.get(config_class.model_type, {})
    for name, part in _parts(default).items():
        if name not in options:
            options[name] = _tiny(type(part), part, kind)
    return config_class(**options)


def _names(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _values(default: PreTrainedConfig) -> Options:
    """A config's own fields, also those that differ from layer to layer (then of the layers that say nothing)."""
    own = _names(type(default)) - _names(PreTrainedConfig)
    return {name: vars(default).get(name) for name in own}


def _parts(default: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {name: value for name, value in _values(default).items() if isinstance(value, PreTrainedConfig)}


def _of_kind(config_class: Any, kind: str) -> Options:
    """What a head needs: labels, and of a family of both kinds that it decodes."""
    options: Options = {"num_labels": LABELS} if kind in ("sequence", "token") else {}
    names = _names(config_class)
    if kind == "causal" and "is_decoder" in names:
        options["is_decoder"] = True
    if kind == "causal" and config_class.model_type in ("xlm", "flaubert"):
        options["causal"] = True
    return options


def shrunk(default: PreTrainedConfig) -> Options:
    """The fields of a config that are to be smaller, by their names."""
    values = _values(default)
    options: Options = {}
    for name, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool):
            small = _small(name, value, values)
            if small is not None and small != value:
                options[name] = small
    options |= _special_ids(values)
    options |= _layers(values, options)
    options |= _rope(values, options)
    return options


def _small(name: str, value: int, values: Options) -> int | None:
    if name in _KEY_HEADS.split():
        many = values.get("num_attention_heads") or values.get("n_heads") or 0
        return HEADS if value == many else 1 if value == 1 else 2
    if name == "head_dim" and _wide_heads(values):
        return 2 * HEAD
    if name in EXACT:
        whole = name in _VOCABULARIES.split()  # every word that tests use must be there
        return EXACT[name] if whole else min(value, EXACT[name]) if value > 0 else None
    return 16 if name.endswith(ENDINGS) and value > 16 else None


def _wide_heads(values: Options) -> bool:
    """Whether heads are not the model's width divided by their number."""
    width, heads, head = (values.get(each) for each in ("hidden_size", "num_attention_heads", "head_dim"))
    return all(isinstance(each, int) for each in (width, heads, head)) and head * heads != width


def _special_ids(values: Options) -> Options:
    """Ids of special tokens inside the small vocabulary: known ones low, those of images and the like at its end."""
    options: Options = {}
    last = VOCAB
    for name in sorted(values):
        value, ending = values[name], next((end for end in _IDS if name.endswith(end)), None)
        if ending is None or name.endswith("layer_index") or "idx" in name:
            continue
        stem = name.removesuffix(ending)
        if stem in NAMED_IDS:
            options[name] = NAMED_IDS[stem]
        elif isinstance(value, int) and value >= VOCAB:
            last -= 1
            options[name] = last
    if isinstance(values.get("decoder_start_token_id"), int):
        options["decoder_start_token_id"] = EOS if values["decoder_start_token_id"] else PAD
    for name in ("forced_eos_token_id", "forced_bos_token_id"):
        if name in values:
            options[name] = None
    return options


_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _layers(values: Options, options: Options) -> Options:
    """As many layers as there are kinds of them, at least two, and the lists that say of which kind each is."""
    name = next((each for each in _COUNTS if isinstance(values.get(each), int)), None)
    if name is None:
        return {}
    count = values[name]
    lists = {key: value for key, value in values.items() if isinstance(value, list | tuple) and len(value) == count}
    lists = {key: value for key, value in lists.items() if count > 1 and not key.startswith(("conv", "attn_res"))}
    if not lists:
        return {}
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(repr([value[index] for value in lists.values()]), index)
    chosen = sorted(kinds.values())[:6]
    while len(chosen) < 2:
        chosen.append(chosen[-1])
    return {name: len(chosen)} | {key: [value[index] for index in chosen] for key, value in lists.items()}


def _rope(values: Options, options: Options) -> Options:
    """Rotary positions whose sections fit the small heads."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    return {"rope_parameters": _small_rope(rope)}


def _small_rope(rope: Options) -> Options:
    found: Options = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            found[name] = _small_rope(value)
        elif name == "mrope_section":
            found[name] = [1, 1, 2]
        elif name == "original_max_position_embeddings":
            found[name] = 160
        else:
            found[name] = value
    return found


# ---- the exceptions ----------------------------------------------------------------------------------------------

_EXPERTS_OF_FEW: Options = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1}
_SHARING: Options = {  # Gemma's smaller ones, whose last layers use the keys of earlier ones
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_REFORMER: Options = {
    "axial_pos_embds_dim": [16, 16],
    "axial_pos_shape": [10, 16],
    "attn_layers": ["local", "lsh"],
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4,
    "num_buckets": 4,
    "hash_seed": 0,
    "num_hidden_layers": 2,
}
_XMOD: Options = {"default_language": "en_XX"}

EXCEPTIONS: dict[str, Options] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": _EXPERTS_OF_FEW,
    "esm": {"vocab_size": VOCAB, "pad_token_id": PAD, "mask_token_id": 4},
    "esmc": {"pad_token_id": PAD},
    "gemma3n_text": {
        **_SHARING,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": [INNER] * 4,
    },
    "gemma4_text": {**_SHARING, "global_head_dim": 16},
    "gemma4_unified_text": {**_SHARING, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"],
        "num_hidden_layers": 2,
    },
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "led": {"max_encoder_position_embeddings": 160, "attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 4},
    "longcat_flash": {"head_dim": HEAD, "qk_head_dim": 2 * HEAD},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": HEAD},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 16, "hidden_size": 64},
    "nystromformer": {"conv_kernel_size": 3, "num_landmarks": 4, "segment_means_seq_len": 4},
    "perceiver": {"vocab_size": VOCAB, "num_latents": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 2 * HEAD,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": _REFORMER,
    "switch_transformers": {"decoder_start_token_id": PAD},
    "t5": {"decoder_start_token_id": PAD},
    "xlstm": {"qk_dim_factor": 1.0, "num_blocks": 2},
    "xmod": _XMOD,
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
    },
}


def _encoder_decoder() -> PreTrainedConfig:
    encoder, decoder = (tiny_config(hf.BertConfig, kind) for kind in ("masked", "causal"))
    decoder.add_cross_attention = True
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = BOS, PAD
    return config


WHOLE: dict[str, Any] = {"encoder-decoder": _encoder_decoder}
