"""`kv.safetensors`: a prompt as keys and values, for engines that cannot fold one themselves.

Tensors `k.<n>` and `v.<n>`, each `[h_kv, p, head size]` in the served number format, n counting the attention layers
that have keys of their own, in the order they run; keys as a cache holds them, after rotary embedding at positions
0…p−1. Metadata (text): `digest`, `length` (p), `layers`, `dtype`, `base` (its fingerprint), `format`: "pt".
"""

KV_NAME = "kv.safetensors"
