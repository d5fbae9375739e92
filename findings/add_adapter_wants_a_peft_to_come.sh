#!/usr/bin/env bash
# transformers 5.24.0 with PEFT 0.21.2, the newest of both on 2026-12-01: `model.add_adapter` always fails.
#
# Seen: `add_adapter(LoraConfig())`, transformers' own way to PEFT's layers, raises ValueError and asks for PEFT 0.22 or
# later, of which there is no release. `peft.get_peft_model` and `peft.inject_adapter_in_model` put the same layers into
# the same model. transformers declares no requirement on PEFT, so installing both tells of nothing.
#
# Why it matters: who follows transformers' documentation and has everything up to date has no adapters at all, and
# the advice in the message cannot be followed. Use PEFT's own functions, or transformers 5.23.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
install=("$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile)
"${install[@]}" torch==2.13.0
"${install[@]}" transformers==5.24.0 peft==0.21.2

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)


def build():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2))


lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
try:
    build().add_adapter(lora)
    said = ""
except ValueError as error:
    said = str(error)
print("add_adapter:", said or "accepted")
layers = [name for name, _ in peft.inject_adapter_in_model(lora, build()).named_parameters() if "lora_" in name]
wrapped = [name for name, _ in peft.get_peft_model(build(), lora).named_parameters() if "lora_" in name]
print("inject_adapter_in_model:", len(layers), "tensors; get_peft_model:", len(wrapped))
assert ">= 0.22.0" in said, "add_adapter takes this PEFT"
assert len(layers) == len(wrapped) == 4
print("as described")
PY
