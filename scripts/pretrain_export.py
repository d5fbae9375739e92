"""Write the model folder for scripts/pretrain.py: half-precision weights, tokenizer, configuration, model card.

Every number in the card is measured here on the exported files, or read from the checkpoint and from data.json.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from pretrain_card import card
from pretrain_model import heldout_loss, model_config
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

PROMPTS = (
    "Once upon a time",
    "The little dog was hungry, so",
    "A healthy diet is",
    "User: I want to go to a concert this week.\nAssistant:",
)


def write_model(state: dict[str, Any], folder: Path) -> None:
    # The embedding is tied, so the output matrix is the same storage and is written once.
    weights = {name: t.half().contiguous() for name, t in state["model"].items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written readable by its owner only
    config = model_config()
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"  # stored in half precision to be small, computed in single precision
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


@torch.inference_mode()
def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    rows = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        torch.manual_seed(0)
        for how, options in {
            "greedy": {"do_sample": False},
            "sampled, temperature 0.7, top-p 0.9, seed 0": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        }.items():
            out = model.generate(**inputs, max_new_tokens=64, **options)
            text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            rows.append({"how": how, "prompt": prompt, "text": text})
    return rows


def measure(model: LlamaForCausalLM, work: Path, data: dict[str, Any]) -> dict[str, dict[str, float]]:
    results = {}
    for name, facts in data["heldout"].items():
        nats, tokens = heldout_loss(model, work / f"{name}.bin", bf16=False)
        results[name] = {
            **facts,
            "tokens": tokens,
            "nats_per_token": nats / tokens,
            "bits_per_byte": nats / math.log(2) / facts["bytes"],
        }
    return results


def export(work: Path, checkpoint: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(checkpoint, weights_only=True)
    data = json.loads((work / "data.json").read_text())
    write_model(state, out)
    for file in (work / "tokenizer").iterdir():
        shutil.copyfile(file, out / file.name)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    run = {
        "parameters": model.num_parameters(),
        **{key: state[key] for key in ("step", "tokens", "seconds", "settings", "machine", "history")},
        "complete": state["seconds"] >= 60 * state["settings"]["minutes"],
        "heldout": measure(model, work, data),
        "samples": samples(model, AutoTokenizer.from_pretrained(out)),
    }
    (out / "training.json").write_text(json.dumps(run, indent=1) + "\n")
    (out / "README.md").write_text(card(run, data, model.config))
    print(json.dumps(run["heldout"], indent=1))
