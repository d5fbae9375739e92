#!/usr/bin/env bash
# transformers 5.24.0: T5Gemma's sequence classifier reads another token where a row has no padding.
#
# Seen: `T5GemmaForSequenceClassification` with its decoder shifts the text to the right for the decoder and
# classifies at the last real token's place plus one. A row without padding has no such place, and gets the one
# before it, where the decoder has not yet read the text's last token. The same text with one masked padding
# token behind it gets other logits, which are the same for any more padding. With the encoder alone padding
# changes nothing.
#
# Why it matters: the longest text of a batch is classified by another rule than the others, so its label
# depends on what it is batched with. A prompt that is trained on batches and asked one text at a time always
# meets the other rule.
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
from transformers import T5GemmaConfig, T5GemmaForSequenceClassification

torch.set_num_threads(1)
IDS = [5, 6, 7, 8]
PART = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip


def logits(net, padding):
    ids = torch.tensor([IDS + [0] * padding])
    return net(input_ids=ids, attention_mask=(ids != 0).long()).logits


print("torch", torch.__version__, "transformers", transformers.__version__)
apart = {}
with torch.no_grad():
    for decoder in (False, True):
        torch.manual_seed(0)
        config = T5GemmaConfig(
            encoder=PART, decoder=PART, vocab_size=50, is_encoder_decoder=decoder, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, num_labels=3,
        )  # fmt: skip
        net = T5GemmaForSequenceClassification(config, is_encoder_decoder=decoder).eval()
        none, one, three = (logits(net, padding) for padding in (0, 1, 3))
        apart[decoder] = (none - one).abs().max().item(), (one - three).abs().max().item()
        print("with" if decoder else "without", "decoder: no padding", none.tolist(), "one", one.tolist())
        print("  largest difference: none and one", apart[decoder][0], "- one and three", apart[decoder][1])
assert max(apart[False]) < 1e-4, "the encoder's classifier depends on padding"
assert apart[True][1] < 1e-4, "more padding changes it further"
assert apart[True][0] > 1e-2, "a row without padding is classified as others are"
print("as described")
PY
