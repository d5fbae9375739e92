"""One module, `softprompt.transformers_api`, knows what other libraries call things; no other names any of it.

What is looked at is code: identifiers, attributes, arguments, and strings that are such a name and nothing more, as the
keys of dictionaries are. Docstrings and messages may name what they like.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

SEAM = "transformers_api.py"
OTHERS_OWN = "serve/vllm"  # vLLM has an environment and a seam of its own

NAMES = frozenset({
    # the cache
    "past_key_values", "past_key_value", "cache_params", "layer_past", "get_mask_sizes", "get_query_offset",
    "get_seq_length", "has_previous_state", "lazy_initialization",
    # attention
    "_global_mapping", "get_interface", "ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "AttentionInterface",
    "AttentionMaskInterface", "_attn_implementation", "_attn_implementation_internal", "eager_attention_forward",
    "mask_function", "allow_is_causal_skip", "local_size", "attention_chunk_size", "chunked_attention", "layer_types",
    # what a model is
    "_is_stateful", "embed_positions", "wpe", "inv_freq", "has_relative_attention_bias", "compute_bias",
    "_init_weights",
    "max_position_embeddings", "num_hidden_layers", "get_text_config", "max_seq_len", "_model_mapping",
    # training
    "_gradient_checkpointing_func", "gradient_checkpointing", "fused_lm_head", "loss_type", "_hf_peft_config_loaded",
    # accelerate, torch's FSDP and kernels, PEFT
    "_hf_hook", "hf_device_map", "_is_fsdp_managed_module", "FSDPModule", "DTensor", "remove_hook_from_module",
    "AlignDevicesHook", "SequentialHook", "aten", "_python_dispatch", "BaseTunerLayer", "ModulesToSaveWrapper",
    "AuxiliaryTrainingWrapper",
    # modules that are nobody's public API
    "masking_utils", "modeling_utils", "modeling_layers", "cache_utils", "modeling_auto", "integration_utils",
})  # fmt: skip

KEYS = frozenset({
    "sliding_window", "softcap", "s_aux", "position_bias", "scaling", "kernel_options", "is_causal", "is_decoder",
})  # fmt: skip
"""What layers tell their attention function: no keys elsewhere, though what they mean may have such a name."""

PUBLIC_MODULES = frozenset({"transformers", "transformers.utils"})
"""What of transformers is imported elsewhere: its documented names, and `transformers.utils.logging`."""

CACHE = ("get_seq_length", "get_mask_sizes")
ALLOWED = {
    ("model.py", "past_key_values"): "a parameter of forward, as PEFT's users name it",
    ("model.py", "hf_device_map"): "an attribute of the base model that a prompted one answers for",
    ("initialize.py", "past_key_values"): "a parameter, as PEFT's function has it",
    ("loops.py", "loss_type"): "Trainer asks a model for it",
    ("loops.py", "_hf_peft_config_loaded"): "Trainer asks a model for it",
    ("export/mlx.py", "num_hidden_layers"): "mlx-lm's kinds of models have it in their config",
    # A cache of our own is asked by these names, so its class has them; what it is asked for stands beside its tensors.
    **{("injection/prefixed_cache.py", name): "it stands in for a cache" for name in (*CACHE, "get_query_offset")},
    **{("serve/row_cache.py", name): "it is a layer of a cache" for name in (*CACHE, "lazy_initialization")},
}


@cache
def sources(root: Path) -> list[tuple[str, list[ast.AST]]]:
    """Each file of the package and all that stands in it."""
    package = root / "softprompt"
    named = {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}
    return [
        (name, list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
        for name, path in named.items()
        if name != SEAM and not name.startswith(OTHERS_OWN)
    ]


def named(node: ast.AST) -> list[str]:
    """The names that a node says."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.keyword(arg=str(name)) | ast.Constant(value=str(name)):
            return [name]
        case ast.Import(names=names):
            return [part for alias in names for part in alias.name.split(".")]
        case ast.ImportFrom(module=module, names=names):
            return [*(module or "").split("."), *(alias.name for alias in names)]
    return []


def test_nothing_else_names_what_other_libraries_keep_to_themselves(root: Path) -> None:
    found = [
        f"{source}:{getattr(node, 'lineno', 0)} {name}"
        for source, nodes in sources(root)
        for node in nodes
        for name in named(node)
        if (name in NAMES or (name in KEYS and isinstance(node, ast.Constant))) and (source, name) not in ALLOWED
    ]
    assert not found, "\n".join(found)


def test_nothing_else_imports_from_inside_other_libraries(root: Path) -> None:
    found = []
    for source, nodes in sources(root):
        for node in nodes:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                library = module.partition(".")[0]
                inside = library in ("peft", "trl", "accelerate") or (
                    library == "transformers" and module not in PUBLIC_MODULES
                )
                private = library == "torch" and any(part.startswith("_") for part in module.split("."))
                if inside or private:
                    found.append(f"{source}:{node.lineno} {module}")
    assert not found, "\n".join(found)


def test_nothing_else_looks_into_functions_and_modules_that_are_not_its_own(root: Path) -> None:
    """`inspect.signature` and `sys.modules` are for this package's own."""
    own = {("cli/flags.py", "signature"): "of commands", ("cli/output.py", "modules"): "the module of a method"}
    found = []
    for source, nodes in sources(root):
        for node in nodes:
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if (node.value.id, node.attr) in (("inspect", "signature"), ("sys", "modules")):
                found += [] if (source, node.attr) in own else [f"{source}:{node.lineno} {node.attr}"]
    assert not found, "\n".join(found)


def test_what_is_allowed_is_there(root: Path) -> None:
    """An exception that nothing needs any more goes."""
    there = {(source, name) for source, nodes in sources(root) for node in nodes for name in named(node)}
    assert ALLOWED.keys() <= there
