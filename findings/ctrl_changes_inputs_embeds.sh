#!/usr/bin/env bash
# transformers 5.24.0 (and 5.23.0): CTRL multiplies the caller's `inputs_embeds` in place.
#
# Seen: after a call the tensor that was given holds the vectors times sqrt(n_embd), so a second call with it
# gives other hidden states than the first. A tensor that is itself trained cannot be given at all: autograd
# refuses the change in place of a leaf.
#
# Why it matters: virtual tokens are given as `inputs_embeds`. Whoever looks words up once and asks twice gets
# two answers, and the obvious training loop over one Parameter ends with an error about leaf variables. Give a
# copy (`inputs_embeds.clone()`).
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
install=("$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile)
"${install[@]}" torch==2.13.0
"${install[@]}" transformers==5.24.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import CTRLConfig, CTRLModel

torch.set_num_threads(1)
torch.manual_seed(0)
net = CTRLModel(CTRLConfig(vocab_size=50, n_embd=16, dff=32, n_layer=2, n_head=2, n_positions=32)).eval()
ids = torch.tensor([[3, 4, 5]])
print("torch", torch.__version__, "transformers", transformers.__version__)
with torch.no_grad():
    given = net.get_input_embeddings()(ids)
    before = given.clone()
    right = net(ids).last_hidden_state
    first = net(inputs_embeds=given).last_hidden_state
    second = net(inputs_embeds=given).last_hidden_state
    after = (given / before).mean().item()
print("the tensor after two calls, over what it was:", after)
print("first call against the ids:", (first - right).abs().max().item())
print("second call against the first:", (second - first).abs().max().item())
try:
    net(inputs_embeds=torch.nn.Parameter(before))
    refused = ""
except RuntimeError as error:
    refused = str(error)
print("a Parameter:", refused or "accepted")
assert torch.allclose(first, right, atol=1e-5)
assert abs(after - 16) < 1e-3, "the tensor is left alone"  # twice sqrt(16)
assert (second - first).abs().max() > 1e-2
assert "leaf Variable" in refused
print("as described")
PY
