#!/usr/bin/env bash
# PEFT 0.21.2: with prompt tuning a left-padded row of a batch gets other logits than the same text alone, on
# Llama too.
#
# Seen (transformers 5.24.0): a bare Llama's logits do not change when padding stands before the text, since its
# positions are relative and the padding is masked. With a trained prompt they do, in `forward` and for the
# first token that `generate` finds. PEFT puts the virtual tokens before the padding, so that the padding stands
# between the prompt and its text, and hands on no positions: the text is as much further away from its prompt
# as it is padded.
#
# Why it matters: decoders are batched with padding on the left, as their tokenizers and `generate` ask for. The
# answers to a batch then depend on the longest text in it, and differ from the ones that were trained or
# measured one at a time.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
install=("$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile)
"${install[@]}" torch==2.13.0
"${install[@]}" transformers==5.24.0 peft==0.21.2

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import warnings

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
ids = torch.tensor([[5, 6, 7, 8]])
padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)


def logits(net, ids):
    return net(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, -1]


def first(net, ids):
    return net.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=1, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    ).logits[0]  # fmt: skip


def apart(ask, net):
    return (ask(net, ids) - ask(net, padded)).abs().max().item()


print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
with torch.no_grad():
    net = LlamaForCausalLM(config).eval()
    bare = apart(logits, net), apart(first, net)
    net = peft.get_peft_model(net, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    net.prompt_encoder["default"].embedding.weight.normal_(0, 1)
    prompted = apart(logits, net), apart(first, net)
print("largest difference of the last token's logits, text alone and behind 6 tokens of padding: forward, generate")
print("bare model ", bare)
print("with prompt", prompted)
assert max(bare) < 1e-4, "the bare model's logits depend on the padding"
assert min(prompted) > 1e-2, "the logits with a prompt do not depend on the padding"
print("as described")
PY
