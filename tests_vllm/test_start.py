"""What the connector refuses as the engine starts: each would go wrong later, and without a word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import SpeculativeConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from softprompt.errors import ConfigError, SoftPromptError, UnsupportedError
from softprompt.serve.vllm.connector import SoftPromptConnector


def start(
    policy: str = "fail", method: str | None = None, layers: int = 2, routed: bool | None = None, **parallel: int
) -> SoftPromptConnector:
    """Of a model with two layers; `routed`: whether vLLM 0.33 returns the experts it chose, None: an earlier one."""
    extra: dict[str, Any] = {"objects": "there"}
    transfer = SimpleNamespace(kv_connector_extra_config=extra, kv_load_failure_policy=policy)
    sizes = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
    speculative = object.__new__(SpeculativeConfig) if method is not None else None
    if speculative is not None:
        speculative.__dict__["method"] = method
    config = SimpleNamespace(
        kv_transfer_config=transfer,
        speculative_config=speculative,
        parallel_config=SimpleNamespace(**{**dict.fromkeys(sizes, 1), **parallel}),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2),
        **({} if routed is None else {"aux_output_config": SimpleNamespace(enabled=routed)}),
    )
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    group = KVCacheGroupSpec([f"model.layers.{number}.attn" for number in range(layers)], spec)
    cache = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[group])
    return SoftPromptConnector(config, KVConnectorRole.SCHEDULER, cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [None, "ngram", "suffix", "medusa"])
def test_what_works(method: str | None) -> None:
    assert not start(method=method).requires_kv_delivery
    assert not start(method=method, routed=False).requires_kv_delivery


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"policy": "recompute"}, ConfigError, "kv_load_failure_policy='recompute'"),
        ({"method": "eagle3"}, UnsupportedError, "'eagle3'"),
        ({"method": "mtp"}, UnsupportedError, "'mtp'"),
        ({"method": "draft_model"}, UnsupportedError, "'draft_model'"),
        ({"routed": True}, ConfigError, "--enable-return-routed-experts"),
        ({"layers": 3}, UnsupportedError, "3 layers"),
        ({"pipeline_parallel_size": 2}, ConfigError, "pipeline_parallel_size=2"),
        ({"decode_context_parallel_size": 2}, ConfigError, "decode_context_parallel_size=2"),
    ],
)
def test_what_does_not(options: Any, kind: type[SoftPromptError], message: str) -> None:
    with pytest.raises(kind, match=message):
        start(**options)
