"""A KV connector for vLLM: a request's prompt enters its KV cache as if the virtual tokens had been computed there.

A request with a prompt of p virtual tokens begins with p placeholder ids, and its `kv_transfer_params` say which prompt
they stand for (`softprompt.serve.vllm.marks`). The scheduler's side says that these p tokens are computed elsewhere, so
vLLM gives them blocks and computes only what follows. The worker's side writes the folded keys and values into these
blocks before the step runs: after a preemption once more, and nothing for blocks that the prefix cache still has. They
are written by the attention layer itself, since only its backend knows how it packs them.

A request whose prompt cannot be read fails alone. vLLM fails it for the blocks of the step where blocks have numbers of
their own, and where several groups of layers number theirs alike (Gemma 3), only while it waits for a load between two
steps: there such loads are all of that kind, and the request starts one step later.

Which blocks requests share is decided by vLLM's hashes, and those have the request's cache salt in them. A request
whose salt does not carry the digest of its prompt is failed, as is one whose prompt cannot be read: without its prompt
it would get the answer to another question.

    --kv-transfer-config '{"kv_connector": "SoftPromptConnector", "kv_role": "kv_consumer",
        "kv_connector_module_path": "softprompt.serve.vllm.connector",
        "kv_connector_extra_config": {"objects": "…", "prompts": "…"}}'
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorTransferResults
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec, UniformTypeKVCacheSpecs

from softprompt.errors import CheckpointError, ConfigError, UnsupportedError
from softprompt.serve.folded import KV_NAME
from softprompt.serve.vllm.marks import DIGEST, LENGTH, is_digest, is_salt_of
from softprompt.serve.vllm.prefixes import Prefixes, read_header

LOGGER = logging.getLogger("vllm.softprompt")
MAX_BYTES = 1 << 30
NO_BLOCK = -1  # outside the sliding window: vLLM gives such tokens no block, and nobody looks at them


@dataclass(frozen=True)
class Load:
    """Virtual tokens `start` … `length` − 1 of a prompt, to be written into a request's blocks.

    `blocks`: for each group of layers the ids of the request's first blocks. `digest` None: what was asked for cannot
    be had, and the request is to fail. `waits`: the request waits for this, and the step goes on without it.
    """

    request_id: str
    digest: str | None
    start: int
    length: int
    blocks: tuple[list[int], ...]
    waits: bool


@dataclass
class Loads(KVConnectorMetadata):
    """What the workers do before the next step."""

    loads: list[Load] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """The prompt that a request asks for; `digest` None: one that cannot be had."""

    digest: str | None
    length: int


class SoftPromptConnector(KVConnectorBase_V1, SupportsHMA):
    """Settings in `kv_connector_extra_config`: `objects`, the folder of the checked prompts (`PromptLibrary` fills it),
    and `max_bytes` of folded prompts that each worker keeps in memory (1 GiB).
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _check(vllm_config, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._objects = Path(_setting(extra, "objects", str))
        self._max_bytes = _setting(extra, "max_bytes", int, MAX_BYTES)
        self._groups = [_Group(group.layer_names, group.kv_cache_spec.block_size) for group in
                        kv_cache_config.kv_cache_groups]  # fmt: skip
        self._wait = len(self._groups) > 1  # whether requests wait for their loads
        names = sorted((name for group in self._groups for name in group.layers), key=extract_layer_index)
        self._number = {name: number for number, name in enumerate(names)}
        self._asked: dict[str, Asked] = {}  # by request
        self._loads: list[Load] = []  # of the step that is being scheduled
        self._good: set[tuple[str, int]] = set()
        self._prefixes: Prefixes | None = None
        self._waited: set[str] = set()  # requests whose loads are over …
        self._failed: set[str] = set()  # … and which of them failed
        self._failed_blocks: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed on to anybody."""
        return False

    # ---- scheduler -----------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        asked = self._asks(request)
        if asked is not None:
            self._asked[request.request_id] = asked
            request.skip_reading_prefix_cache = False  # which would skip the prompt too

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        asked = self._asked.get(request.request_id)
        if asked is None:
            return 0, False
        if asked.digest is None:  # only a load that goes on between steps can fail for any model
            return request.num_tokens - num_computed_tokens, True
        missing = max(0, asked.length - num_computed_tokens)
        return missing, missing > 0 and self._wait

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        asked = self._asked.get(request.request_id)
        if asked is None or num_external_tokens == 0:
            return
        if asked.digest is None:
            self._loads.append(Load(request.request_id, None, 0, 0, (), waits=True))
            return
        first = tuple(
            [NO_BLOCK if block.is_null else block.block_id for block in there[: group.blocks(asked.length)]]
            for group, there in zip(self._groups, blocks.blocks, strict=True)
        )
        start = asked.length - num_external_tokens
        self._loads.append(Load(request.request_id, asked.digest, start, asked.length, first, self._wait))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads, self._loads = self._loads, []
        return Loads(loads)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._asked.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def _asks(self, request: Any) -> Asked | None:
        params = request.kv_transfer_params
        if not isinstance(params, dict) or not (DIGEST in params or LENGTH in params):
            return None
        digest, length = params.get(DIGEST), params.get(LENGTH)
        reason = self._wrong(request, digest, length)
        if reason is None:
            return Asked(digest, length)
        LOGGER.error("request %s cannot have its prompt: %s", request.request_id, reason)
        return Asked(None, 0)

    def _wrong(self, request: Any, digest: Any, length: Any) -> str | None:
        """Why the request cannot have this prompt, or None."""
        if not is_digest(digest):
            return "its digest is not one"
        if type(length) is not int or not 0 < length < request.num_prompt_tokens:
            return "its length does not leave a token to go on from"
        if request.prompt_embeds is not None or request.mm_features or request.resumable:
            return "a prompt of keys and values stands before token ids only"
        if not is_salt_of(digest, request.cache_salt):
            return "its cache salt does not carry the digest"
        if (digest, length) in self._good:
            return None
        try:
            found = read_header(self._objects / digest / KV_NAME)
        except CheckpointError as error:
            return str(error)
        if (found.get("digest"), found.get("length")) != (digest, str(length)):
            return "its file has another digest or length"
        self._good.add((digest, length))
        return None

    # ---- worker --------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """UnsupportedError for layers that cannot be given keys and values."""
        layers = self._vllm_config.compilation_config.static_forward_context
        for name in self._number:
            _check_layer(name, layers[name])

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for load in metadata.loads:
            if load.waits:
                self._waited.add(load.request_id)
            if load.digest is None:
                self._failed.add(load.request_id)
                continue
            try:
                self._write(load)
            except CheckpointError as error:
                LOGGER.error("request %s cannot have its prompt: %s", load.request_id, error)
                if load.waits:
                    self._failed.add(load.request_id)
                else:
                    self._failed_blocks |= set(load.blocks[0][load.start // self._groups[0].size :]) - {NO_BLOCK}

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        waited, self._waited, failed, self._failed = self._waited, set(), self._failed, set()
        return KVConnectorTransferResults(finished_recving=waited, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is written before the step begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    @torch.no_grad()
    def _write(self, load: Load) -> None:
        assert load.digest is not None
        pairs = self._own().get(load.digest)
        layers = self._vllm_config.compilation_config.static_forward_context
        for group, blocks in zip(self._groups, load.blocks, strict=True):
            tokens, slots = group.slots(blocks, load.start, load.length)
            for name in group.layers:
                layer, (key, value) = layers[name], pairs[self._number[name]]
                _check_shape(load.digest, layer, key, load.length)
                where = layer.kv_cache.device
                layer.impl.do_kv_cache_update(
                    layer,
                    key[tokens].to(where, self._vllm_config.model_config.dtype),
                    value[tokens].to(where, self._vllm_config.model_config.dtype),
                    layer.kv_cache,
                    slots.to(where),
                )

    def _own(self) -> Prefixes:
        if self._prefixes is None:
            ranks = self._vllm_config.parallel_config.tensor_parallel_size
            rank = get_tensor_model_parallel_rank()
            self._prefixes = Prefixes(self._objects, len(self._number), rank, ranks, self._max_bytes)
        return self._prefixes


@dataclass(frozen=True)
class _Group:
    """Layers that have the same blocks, of `size` tokens each."""

    layers: list[str]
    size: int

    def blocks(self, length: int) -> int:
        return -(-length // self.size)

    def slots(self, blocks: list[int], start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of tokens `start` … `length` − 1 those that have a block, and their places in the cache; both `[n]`."""
        tokens = torch.arange(start, length)
        block = torch.tensor(blocks)[tokens // self.size]
        tokens, block = tokens[block != NO_BLOCK], block[block != NO_BLOCK]
        return tokens, block * self.size + tokens % self.size


def _setting(extra: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = extra.get(name, default)
    if type(value) is not kind:
        raise ConfigError(f"kv_connector_extra_config has {name}={value!r}; give a {kind.__name__} there.")
    return value


def _check(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """ConfigError or UnsupportedError for what would put keys and values into the wrong place."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != "fail":
        raise ConfigError(
            f"kv_load_failure_policy={policy!r} would go on from placeholders where a prompt cannot be read; leave it "
            "out, or write 'fail'."
        )
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) != 1:
            raise ConfigError(f"{name}={getattr(parallel, name)}: prompts work with tensor and data parallelism only.")
    beside = getattr(vllm_config, "aux_output_config", None)  # (from 0.33 on)
    if beside is not None and beside.enabled:
        raise ConfigError(
            "--enable-return-routed-experts lets vLLM take back what it was told of a prompt's keys and values, and go "
            "on from placeholders; leave it out."
        )
    if speculative is not None and (speculative.uses_draft_kv_cache() or speculative.use_dspark()):
        raise UnsupportedError(
            f"the draft model of the speculative method {speculative.method!r} has layers of its own, for which a "
            "prompt has no keys and values; take the method 'ngram', or none."
        )
    layers = sum(len(group.layer_names) for group in kv_cache_config.kv_cache_groups)
    if layers > vllm_config.model_config.get_total_num_hidden_layers():
        raise UnsupportedError(
            f"{layers} layers keep keys and values, of which the model has "
            f"{vllm_config.model_config.get_total_num_hidden_layers()}: a prompt has none for the others; serve this "
            "model with --engine transformers."
        )
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        specs = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
        strange = [each for each in specs if type(each) not in (FullAttentionSpec, SlidingWindowSpec)]
        if strange:
            raise UnsupportedError(
                f"the layers {', '.join(group.layer_names[:3])} keep a {type(strange[0]).__name__}, which prompts of "
                "keys and values cannot enter; serve this model with --engine transformers."
            )


def _check_layer(name: str, layer: Any) -> None:
    if not isinstance(layer, Attention):
        raise UnsupportedError(
            f"the layer {name} is a {type(layer).__name__}, which prompts of keys and values cannot enter; serve this "
            "model with --engine transformers."
        )
    if layer.attn_backend.forward_includes_kv_cache_update:  # then it need not have `do_kv_cache_update`
        raise UnsupportedError(
            f"the attention backend {layer.attn_backend.get_name()} writes keys and values only as it computes, and "
            "cannot be given a prompt's; choose another with --attention-backend."
        )


def _check_shape(digest: str, layer: Any, key: torch.Tensor, length: int) -> None:
    if tuple(key.shape) != (length, layer.num_kv_heads, layer.head_size):
        raise CheckpointError(f"the keys of prompt {digest} have shape {tuple(key.shape)}, not what this model needs.")
