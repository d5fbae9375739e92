#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0: `generate` of a model with prefix tuning answers as if there were no
# prefix.
#
# Seen: token for token what the bare model generates, while `forward` of the same object has the prefix. With
# prompt tuning the first token is right and the later ones are not. Nothing is raised: transformers 5.24.0
# calls the model's argument `cache`, which was `past_key_values` up to 5.23.0, and PEFT 0.21.2 looks for the
# old name in what `generate` passes. With transformers 5.23.0 both are right. A forward pre-hook has the same
# trouble: it sees the name that the caller wrote, since the old name is translated further in.
#
# Why it matters: training goes on as before and its loss falls, but whoever evaluates by generating measures
# the bare model. With transformers 5.23.0 beside PEFT 0.21.2 this does not happen.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
install=("$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile)
"${install[@]}" torch==2.13.0
"${install[@]}" transformers==5.24.0 peft==0.21.2

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import inspect
import warnings

import peft
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
torch.set_num_threads(1)
IDS, NEW = torch.tensor([[3, 4, 5, 6]]), 8


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def stepwise(net):
    """Greedy, each token by a forward pass over everything."""
    ids = IDS
    for _ in range(NEW):
        logits = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, IDS.shape[1] :].tolist()


def generated(net):
    ids = net.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW, do_sample=False)
    return ids[0, IDS.shape[1] :].tolist()


print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
found = {}
with torch.no_grad():
    bare = generated(model())
    print(f"{'bare model':<32}", bare)
    for config in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        net = peft.get_peft_model(model(), config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        net.prompt_encoder["default"].embedding.weight.normal_(0, 2)
        found[config] = stepwise(net), generated(net)
        for name, tokens in zip(("step by step", "generate"), found[config]):
            print(f"{config.__name__:<19}{name:<13}", tokens)

    net, seen = model(), []
    net.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    net(input_ids=IDS, past_key_values=DynamicCache(config=net.config))
    net.generate(IDS, max_new_tokens=1, do_sample=False)
names = {"cache", "past_key_values"}
by_hand, by_generate = (sorted(kwargs & names) for kwargs in seen)
declared = sorted(names & set(inspect.signature(LlamaForCausalLM.forward).parameters))
print("forward declares", declared, "- a hook sees", by_hand, "of a caller with the old name,", by_generate, "of generate")

right, given = found[peft.PrefixTuningConfig]
assert given == bare != right, "prefix tuning generates with its prefix"
right, given = found[peft.PromptTuningConfig]
assert given[0] == right[0] and given != right, "prompt tuning generates what its forward says"
assert (declared, by_hand, by_generate) == (["cache"], ["past_key_values"], ["cache"])
print("as described")
PY
