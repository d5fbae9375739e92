#!/usr/bin/env bash
# transformers 5.24.0: on Marian, Pegasus, MVP, BlenderbotSmall and ESM a text given as ids is another input
# than the same text given as its own word vectors.
#
# Seen: `model(inputs_embeds=model.get_input_embeddings()(ids))` is not `model(ids)`. Where `scale_embedding` is
# set the first four multiply by sqrt(d_model) what they look up themselves, outside of the module that looks
# up, and take `inputs_embeds` as they come; BART, MBart, M2M100 and PegasusX have the same switch and agree.
# ESM with `token_dropout` multiplies by 1 - 0.15 * 0.8 = 0.88, in evaluation too. Vectors multiplied by hand
# give what the ids give.
#
# Why it matters: virtual tokens reach a model as `inputs_embeds`, and the text with them. A program that looks
# the text up in `get_input_embeddings()` then hands it over several times too small (ESM: a seventh too large),
# and a prompt that starts from words' vectors does not start from these words. Nothing is raised; results are
# only worse.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
install=("$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile)
"${install[@]}" torch==2.13.0
"${install[@]}" transformers==5.24.0

HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import logging

import torch
import transformers
from transformers import AutoConfig, AutoModel

logging.disable(logging.WARNING)
torch.set_num_threads(1)
PAIR = {
    "vocab_size": 50, "decoder_vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "max_position_embeddings": 64, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 0, "forced_eos_token_id": None, "scale_embedding": True,
}  # fmt: skip
ESM = {
    "vocab_size": 33, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary", "token_dropout": True,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
FACTORS = {
    "marian": 4, "pegasus": 4, "mvp": 4, "blenderbot-small": 4, "esm": 0.88,
    "bart": 1, "mbart": 1, "m2m_100": 1, "pegasus_x": 1,
}  # fmt: skip
ids = torch.tensor([[5, 6, 7, 8, 9, 2]])


def apart(name, factor):
    """The largest difference of the outputs for the ids and for `factor` times their vectors."""
    torch.manual_seed(0)
    net = AutoModel.from_config(AutoConfig.for_model(name, **(ESM if name == "esm" else PAIR))).eval()
    more = {"attention_mask": torch.ones_like(ids)}
    if net.config.is_encoder_decoder:
        more["decoder_input_ids"] = ids
    with torch.no_grad():
        right = net(input_ids=ids, **more).last_hidden_state
        given = net(inputs_embeds=factor * net.get_input_embeddings()(ids), **more).last_hidden_state
    return (given - right).abs().max().item()


print("torch", torch.__version__, "transformers", transformers.__version__)
print("largest difference from the ids: of their vectors, of their vectors times a factor")
for name, factor in FACTORS.items():
    own, scaled = apart(name, 1), apart(name, factor)
    print(f"{name:<17} {own:.6f} {scaled:.6f} times {factor}")
    assert scaled < 1e-4, f"the factor of {name} is another"
    assert (own > 1e-2) == (factor != 1), f"the ids of {name} are their vectors"
print("as described")
PY
