"""What is measured: models built from configs with random weights, methods of both libraries with the same settings."""

from __future__ import annotations

import gc
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from counts import flops, kv_bytes, step_counts
from measure import Arm, wait
from torch import Tensor
from transformers import StoppingCriteriaList

ROOM = 8192  # positions: the longest prompt and row
WORDS = {"vocab_size": 50257, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA = {**WORDS, "max_position_embeddings": ROOM, "tie_word_embeddings": True}
DROPOUT: dict[str, float] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY = {**WORDS, "vocab_size": 4096}  # that of the tokenizer in the package
SERVED = {**TINY, "max_position_embeddings": 4096, "tie_word_embeddings": True}
WIDE = {**WORDS, "vocab_size": 8192}  # the families of the cache door, all 512 wide and 6 layers deep

# Name → (config class, its arguments). "gpt2" is GPT-2 124M's shape, "llama" a grouped-query Llama of about its size.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {**WORDS, **DROPOUT, "n_positions": ROOM}),
    "llama": (
        "LlamaConfig",
        {**LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"num_key_value_heads": 4},
    ),
    "llama-1b": (
        "LlamaConfig",
        {**LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "tiny": ("GPT2Config", {**TINY, **DROPOUT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "tiny-llama": (
        "LlamaConfig",
        {**TINY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "max_position_embeddings": 1024},
    ),
    # Served models: the words of the tokenizer in the package, heads of 64, few of them with keys of their own.
    "llama-512": (
        "LlamaConfig",
        {**SERVED, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
        | {"num_key_value_heads": 2},
    ),
    "llama-2048": (  # as wide as the layers of a 1B model, so that a prompt weighs as little as there
        "LlamaConfig",
        {**SERVED, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32}
        | {"num_key_value_heads": 8},
    ),
    "gpt2-512": ("GPT2Config", {**WIDE, **DROPOUT, "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 2048}),
    "bloom-512": ("BloomConfig", {**WIDE, "hidden_size": 512, "n_layer": 6, "n_head": 8}),
    "mpt-512": ("MptConfig", {**WIDE, "d_model": 512, "n_layers": 6, "n_heads": 8, "max_seq_len": 2048}),
    "falcon-512": ("FalconConfig", {**WIDE, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}),
    "gptj-512": (
        "GPTJConfig",
        {**WIDE, **DROPOUT, "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 2048, "rotary_dim": 32},
    ),
}

# Name → (config class, its arguments); both libraries have both under the same names.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("PromptTuningConfig", {}),
    "P-tuning MLP": ("PromptEncoderConfig", {"encoder_reparameterization_type": "MLP"}),
    "P-tuning LSTM": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM"}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 4}),
    "multitask, 4 tasks": ("MultitaskPromptTuningConfig", {"num_tasks": 4}),
    "CPT": ("CPTConfig", {}),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix FFN 512": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 512}),
    "prefix FFN 800": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 800}),
}


def build(shape: str, dtype: str, device: str) -> Any:
    """The frozen model, seeded; the one in the package is trained, and never ends an answer by itself here."""
    import transformers

    if shape == "embedded":
        from softprompt.embedded import PATH

        model = transformers.AutoModelForCausalLM.from_pretrained(PATH, dtype=getattr(torch, dtype)).to(device)
        model.generation_config.eos_token_id = None
        return model.requires_grad_(False).eval()
    name, options = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        config = getattr(transformers, name)(**options)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def batch_of(base: Any, rows: int, length: int, padded: bool = False) -> dict[str, Tensor]:
    """Random `input_ids`, `attention_mask`, `labels`, `[rows, length]`; padded: the shortest row is half as long."""
    torch.manual_seed(1)
    ids = torch.randint(3, base.config.vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    if padded:
        ends = torch.linspace(length / 2, length, rows).long() if rows > 1 else torch.tensor([length])
        mask = (torch.arange(length) < ends[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    found = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {name: value.to(base.device) for name, value in found.items()}


def config_of(library: Any, method: str, length: int) -> Any:
    """The method's config in either library."""
    name, options = METHODS[method]
    if method == "CPT":  # a context of examples of ten tokens: nine of input and a label
        types = [4 * (n // 10 + 1) if n % 10 == 9 else 4 * (n // 10) + 2 for n in range(length)]
        types[-1] = 4 * ((length - 1) // 10 + 1)
        options = {"cpt_token_ids": [3 + n for n in range(length)], "cpt_mask": [1] * length} | {
            "cpt_tokens_type_mask": types
        }
    else:
        options = {"num_virtual_tokens": length, **options}
    return getattr(library, name)(task_type="CAUSAL_LM", **options)


def wrap(library: Any, base: Any, method: str, length: int) -> Any:
    """The base model, which is shared by all arms and never changed, with a new prompt that trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        return library.get_peft_model(base, config_of(library, method, length)).to(base.device).train()


def frozen(library: Any, base: Any, method: str, length: int) -> Any:
    """The same, saved and loaded, as it is used after training."""
    import softprompt

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(softprompt, base, method, length).save_pretrained(folder)
        return library.PeftModel.from_pretrained(base, folder).eval()


# ---- training step ---------------------------------------------------------------------------------------------------


def bare_step(base: Any, batch: dict[str, Tensor]) -> Arm:
    """The frozen model alone: forward, and backward to the embeddings of its inputs."""
    embedded = base.get_input_embeddings()(batch["input_ids"]).detach()
    rest = {name: value for name, value in batch.items() if name != "input_ids"}

    def run() -> None:
        base(inputs_embeds=embedded.requires_grad_(), **rest).loss.backward()
        embedded.grad = None

    return Arm(run, lambda: step_counts(run, base))


def prompt_step(library: Any, base: Any, method: str, length: int, batch: dict[str, Tensor]) -> Arm:
    """Forward with labels and backward to the prompt; no optimiser."""
    model = wrap(library, base, method, length)
    more: dict[str, Tensor] = {}
    if method.startswith("multitask"):
        rows = torch.arange(batch["input_ids"].shape[0], device=base.device)
        more["task_ids"] = rows % (4 if "4" in method else 1)

    def run() -> None:
        model(**batch, **more).loss.backward()
        model.zero_grad(set_to_none=True)

    return Arm(run, lambda: step_counts(run, model))


def step_arms(
    base: Any, method: str, length: int, batch: dict[str, Tensor], skip_peft: str | None = None
) -> dict[str, Callable[[], Arm]]:
    """bare, ours and PEFT; `skip_peft` says why PEFT is not run."""
    import peft

    import softprompt

    def theirs() -> Arm:
        if skip_peft:
            raise NotRun(skip_peft)
        return prompt_step(peft, base, method, length, batch)

    return {
        "bare": lambda: bare_step(base, batch),
        "ours": lambda: prompt_step(softprompt, base, method, length, batch),
        "PEFT": theirs,
    }


class NotRun(Exception):
    """A case that is left out on purpose."""


# ---- generation ------------------------------------------------------------------------------------------------------


class Clock:
    """Asked by `generate` after every token: when, and at the last one, if it is to count, what keys are held."""

    def __init__(self, device: str, count_at: int | None = None, head_width: int = 0) -> None:
        self.device, self.count_at, self.head_width = device, count_at, head_width
        self.times: list[float] = []
        self.kv = 0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        wait(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) == self.count_at:
            self.kv = kv_bytes(self.head_width)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def generate_arm(base: Any, make: Callable[[], Any], batch: dict[str, Tensor], new: int, **options: Any) -> Arm:
    """Greedy generation of `new` tokens: seconds to the first, per further one (median) and of all; tokens per second.

    Counted are the keys and values held at the last token that were not there before the model was made, and the FLOPs
    of the first token.
    """
    gc.collect()
    device, rows = str(batch["input_ids"].device), {name: batch[name] for name in ("input_ids", "attention_mask")}
    width = head_width(base)
    before = kv_bytes(width)
    model = make()

    def go(clock: Clock) -> None:
        with torch.no_grad():
            criteria = StoppingCriteriaList([clock])
            model.generate(**rows, max_new_tokens=new, do_sample=False, stopping_criteria=criteria, **options)

    def run() -> dict[str, float]:
        clock = Clock(device)
        begun = time.perf_counter()
        go(clock)
        whole = time.perf_counter() - begun
        steps = [later - one for one, later in itertools.pairwise(clock.times)]
        speed = new * rows["input_ids"].shape[0] / whole
        return {"prefill": clock.times[0] - begun, "decode": statistics.median(steps), "whole": whole, "speed": speed}

    def count() -> dict[str, int]:
        clock = Clock(device, new, width)
        go(clock)
        with torch.no_grad():
            first = flops(lambda: model.generate(**rows, max_new_tokens=1, do_sample=False, **options))
        return {"kv": clock.kv - before, "prefill_flops": first}

    return Arm(run, count)


def head_width(model: Any) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def prefix_bytes(base: Any, length: int) -> int:
    """What one copy of a prompt's keys and values takes."""
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * length * head_width(base) * base.dtype.itemsize
