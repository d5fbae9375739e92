"""Models that vLLM's CPU backend takes (heads of 32), prompts of every method, and what transformers answers with them.

`engine(family, folder)` runs one in this process, prompts and all; `Engine.ask` and `Engine.expect` give answers of the
same form, from vLLM and from transformers, to be compared by `assert_same`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedModel
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group

from softprompt import METHODS, SoftPromptModel, get_peft_model
from softprompt.serve.base import FolderBase
from softprompt.serve.library import PromptLibrary
from softprompt.serve.vllm.connector import Load
from softprompt.serve.vllm.entered import Entered, enter, leave
from softprompt.serve.vllm.marks import DIGEST, LENGTH
from softprompt.serve.vllm.settings import Settings
from softprompt.serve.vllm.slots import Slots

CONTEXT = 256
WINDOW = 24  # shorter than the longer prompts
ROPE = {"head_dim": 32, "max_position_embeddings": CONTEXT}
OVERRIDES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 2, "n_positions": CONTEXT},
    "llama": ROPE,
    "qwen3": ROPE,
    "mistral": {**ROPE, "sliding_window": WINDOW},
    "gemma3": {**ROPE, "query_pre_attn_scalar": 32, "sliding_window": WINDOW},
}
FAMILIES = tuple(OVERRIDES)
LENGTHS = {"prefix_tuning": 40, "prompt_tuning": 7, "p_tuning": 33, "multitask_prompt_tuning": 12, "cartridge": 64}
BLOCK, BLOCKS = 32, {"mistral": 64}  # of the others, and of those


def build(family: str) -> PreTrainedModel:
    """The seeded model, which never ends an answer by itself."""
    model = tiny.build(family, **OVERRIDES[family])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tiny.PAD
    return model


def save_base(family: str, folder: Path) -> Path:
    model = build(family)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def config_of(method: str, length: int | None = None, **options: Any) -> Any:
    made = METHODS[method]
    count = length or LENGTHS.get(method, 4)
    return made.config_class(task_type="CAUSAL_LM", num_virtual_tokens=count, **{**made.example, **options})


def save_prompt(base: PreTrainedModel, config: Any, folder: Path, seed: int = 0, change: float = 0.0) -> Path:
    """A prompt drawn at random; `change` is added to a single number of it."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    encoder = model.encoder()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        encoder.embedding.weight.view(-1)[3] += change
    model.save_pretrained(folder)
    return folder


def save_every_method(base: PreTrainedModel, folder: Path) -> None:
    for seed, method in enumerate(METHODS):
        save_prompt(base, config_of(method), folder / method, seed)


@dataclass(frozen=True)
class Answer:
    """Token ids, and of each place the log-probabilities of the five likeliest tokens."""

    ids: list[int]
    top: list[dict[int, float]] = field(repr=False)


def assert_alike(found: Answer, expected: Answer, tolerance: float) -> int:
    """As far as both take the same words; where they part, these are even. How many places that were."""
    for place, (mine, theirs) in enumerate(zip(found.top, expected.top, strict=True)):
        shared = set(mine) & set(theirs)
        assert len(shared) >= 3
        assert max(abs(mine[token] - theirs[token]) for token in shared) < tolerance
        one, other = found.ids[place], expected.ids[place]
        if one != other:
            assert theirs[other] - theirs.get(one, -100.0) < 2 * tolerance
            return place + 1
    return len(found.ids)


def assert_same(found: Answer, expected: Answer, tolerance: float = 2e-4) -> None:
    assert found.ids == expected.ids
    for mine, theirs in zip(found.top, expected.top, strict=True):
        shared = sorted(set(mine) & set(theirs))
        assert len(shared) >= 4, (mine, theirs)  # the fifth and the sixth may be even
        for token in shared:
            assert abs(mine[token] - theirs[token]) < tolerance, (token, mine, theirs)


def texts(count: int, lengths: Sequence[int] = (1, 9, 60), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [lengths[number % len(lengths)] for number in range(count)]
    return [torch.randint(3, tiny.VOCAB, (size,), generator=generator).tolist() for size in sizes]


Ask = tuple[str | None, list[int]]


class Engine:
    """A running vLLM, the library before it, and the same model in transformers. `None` asks without a prompt."""

    def __init__(self, llm: LLM, library: PromptLibrary, base: PreTrainedModel, prompts: Path) -> None:
        self.llm, self.library, self.base, self.prompts = llm, library, base, prompts
        self.slots = Slots(llm.llm_engine.vllm_config, llm.get_tokenizer()) if llm is not None else None
        self._expected: dict[tuple[str | None, tuple[int, ...], int], Answer] = {}

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def block(self) -> int:
        return self.llm.llm_engine.vllm_config.cache_config.block_size

    @property
    def prefixes(self) -> Any:
        """What the worker holds in memory."""
        return get_kv_transfer_group()._own()

    def forget(self) -> None:
        """Nothing is held in the worker's memory or in the prefix cache."""
        self.prefixes._held.clear()
        self.prefixes._nbytes = 0
        assert self.llm.reset_prefix_cache()

    @contextmanager
    def loads(self) -> Iterator[list[Load]]:
        """What the scheduler asks the worker to write meanwhile, in order."""
        connector, seen = self.scheduler.connector, []

        def told(output: Any, build: Any = connector.build_connector_meta) -> Any:
            metadata = build(output)
            seen.extend(metadata.loads)
            return metadata

        connector.build_connector_meta = told
        yield seen
        del connector.build_connector_meta

    def metric(self, name: str) -> float:
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def names(self) -> list[str | None]:
        return [None, *self.library.names()]

    def ask(self, asks: Sequence[Ask], count: int = 10, versions: Any = None, **options: Any) -> list[Answer]:
        """All at once. `versions` are those to use in place of what the names mean now."""
        params = SamplingParams(**{"max_tokens": count, "temperature": 0, "logprobs": 5, "ignore_eos": True} | options)
        entered = []
        for number, (name, ids) in enumerate(asks):
            prompt = {"type": "token", "prompt_token_ids": ids}
            if name is None:
                entered.append((prompt, params, None))
                continue
            version = versions[number] if versions else self.library.get(name)
            found = self.enter(prompt, params, version)
            entered.append((found.prompt, found.params, found))
        # As `LLM.generate`, which takes no requests that are ready for the engine.
        self.llm._render_and_add_requests([each[0] for each in entered], [each[1] for each in entered])
        outputs = self.llm._run_engine(RequestOutput, use_tqdm=False)
        answers = []
        for (_, ids), (_, _, found), output in zip(asks, entered, outputs, strict=True):
            output = output if found is None else leave(output, found)
            assert output.prompt_token_ids == ids
            answers.append(_answer(output.outputs[0]))
        return answers

    def enter(self, prompt: dict[str, Any], params: SamplingParams, version: Any) -> Entered:
        place = self.slots.enter if version.slots else enter
        return place(prompt, params, version, CONTEXT)

    def raw(self, asks: Sequence[tuple[Any, Any, str, list[int]]]) -> list[str | None]:
        """How requests end that say themselves what `enter` would say: digest, length, salt and text."""
        prompts, params = [], []
        for digest, length, salt, ids in asks:
            virtual = length if type(length) is int and 0 < length < 200 else 5
            prompts.append({"prompt_token_ids": [0] * virtual + ids, "cache_salt": salt})
            transfer = {DIGEST: digest, LENGTH: length}
            params.append(SamplingParams(max_tokens=3, temperature=0, extra_args={"kv_transfer_params": transfer}))
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].finish_reason for output in outputs]

    def expect(self, name: str | None, ids: list[int], count: int = 10) -> Answer:
        """What transformers answers, one row alone."""
        key = (name, tuple(ids), count)
        if key not in self._expected:
            self._expected[key] = self._expect(name, ids, count)
        return self._expected[key]

    def penalised(self, name: str, ids: list[int], penalty: float) -> torch.Tensor:
        """The next token's logits by the formula of the repetition penalty (1909.05858, 4.1) over the real tokens."""
        model = SoftPromptModel.from_pretrained(self.base, self.prompts / name)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        seen = torch.tensor(sorted(set(ids)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        return logits

    def _expect(self, name: str | None, ids: list[int], count: int) -> Answer:
        if name is None:
            return greedy(self.base, ids, count)
        folder, _, task = name.partition(":")
        model = SoftPromptModel.from_pretrained(self.base, self.prompts / folder)
        return greedy(model, ids, count, **({"task_ids": torch.tensor([int(task)])} if task else {}))


def greedy(model: Any, ids: list[int], count: int, **options: Any) -> Answer:
    row = torch.tensor([ids])
    out = model.generate(
        input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    top = []
    for logits in out.logits:
        scores, tokens = logits[0].float().log_softmax(-1).topk(5)
        top.append(dict(zip(tokens.tolist(), scores.tolist(), strict=True)))
    return Answer(out.sequences[0, len(ids) :].tolist(), top)


def _answer(output: Any) -> Answer:
    top = [
        {token: entry.logprob for token, entry in place.items() if entry.rank is not None and entry.rank <= 5}
        for place in output.logprobs or []
    ]
    return Answer(list(output.token_ids), top)


@contextmanager
def engine(family: str, folder: Path, prompts: Path | None = None, **options: Any) -> Iterator[Engine]:
    """`prompts`: a folder of adapters for this base; by default one of every method."""
    base = build(family)
    save_base(family, folder / "base")
    if prompts is None:
        prompts = folder / "prompts"
        save_every_method(build(family), prompts)
    dtype = options.pop("dtype", "float32")
    library = PromptLibrary(prompts, FolderBase(str(folder / "base"), "base", dtype), folder / "objects", folded=True)
    changes = library.scan()
    assert not changes.refused, changes.refused
    transfer = Settings(prompts, folder / "objects").as_config()
    llm = LLM(
        **{
            "model": str(folder / "base"), "dtype": dtype, "enforce_eager": True, "seed": 0,
            "block_size": BLOCKS.get(family, BLOCK),
            "max_model_len": CONTEXT, "max_num_seqs": 16, "kv_cache_memory_bytes": 32 << 20, "disable_log_stats": False,
            "kv_transfer_config": KVTransferConfig(**transfer), **options,
        }
    )  # fmt: skip
    try:
        yield Engine(llm, library, base.to(getattr(torch, dtype)), prompts)
    finally:
        llm.llm_engine.engine_core.shutdown()
        library.close()
        cleanup_dist_env_and_memory()
