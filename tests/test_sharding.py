"""A frozen base model shared out among processes: the same numbers, a part of the bytes in each."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from families import build
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import (
    CPTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
    initialize_from_text,
)
from softprompt.elsewhere import all_words
from softprompt.errors import ConfigError
from softprompt.recipe import Recipe
from softprompt.train.sharding import shard_base, shards

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["softprompt.train.sharding", "test_sharding", "torch.distributed.fsdp"])

COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
METHODS: dict[str, Any] = {
    "prompt_tuning": PromptTuningConfig(**COMMON, prompt_tuning_init="SAMPLE_VOCAB"),
    "p_tuning": PromptEncoderConfig(**COMMON, encoder_hidden_size=8),
    "ffn": PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=8),
    "cpt": CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4, 5, 6, 7, 8]),
    "behind": PromptTuningConfig(**COMMON, placement="after_bos"),
}
# family, head, method, whether layers are checkpointed
CASES: list[tuple[str, str, str, bool]] = [
    *[("llama", "CAUSAL_LM", method, False) for method in METHODS],
    ("gpt2", "CAUSAL_LM", "prompt_tuning", False),  # tied embeddings, and a table of positions
    ("gpt2", "CAUSAL_LM", "ffn", True),
    ("llama", "SEQ_CLS", "p_tuning", False),  # nothing uses what the last layer of a fold puts out
    ("llama", "CAUSAL_LM", "prompt_tuning", True),
    ("bloom", "CAUSAL_LM", "p_tuning", False),
    ("mixtral", "CAUSAL_LM", "prompt_tuning", False),
    ("bert", "SEQ_CLS", "prompt_tuning", False),
    ("bert", "SEQ_CLS", "ffn", True),
    ("t5", "SEQ_2_SEQ_LM", "prompt_tuning", False),
    ("t5", "SEQ_2_SEQ_LM", "ffn", False),
    ("bart", "SEQ_2_SEQ_LM", "ffn", True),
]


def config_of(method: str, task: str) -> Any:
    config = METHODS[method]
    names = [field for field in ("task_type", "num_virtual_tokens", "prompt_tuning_init", "encoder_hidden_size",
                                 "prefix_projection") if hasattr(config, field)]  # fmt: skip
    if task == "CAUSAL_LM":
        return copy.deepcopy(config)
    return type(config)(**{name: getattr(config, name) for name in names} | {"task_type": task})


def rows_for(task: str) -> dict[str, Tensor]:
    rows = tiny.ragged()
    if task == "SEQ_CLS":
        return {**rows, "labels": torch.tensor([0, 2, 1])}
    return {**rows, "labels": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)}


def run(case: tuple[str, str, str, bool], folder: Path, share: bool, size: int | None = None) -> dict[str, Any]:
    """Train, evaluate, generate, fold, save and load; what came of it."""
    family, task, method, checkpointed = case
    torch.manual_seed(0)
    base = build(family, task)
    model = get_peft_model(base, config_of(method, task))
    found: dict[str, Any] = {}
    if share:
        before = sum(each.nbytes for each in base.parameters() if not each.requires_grad)
        shard_base(model, "cpu", size)
        found["share"] = bytes_of(base) / before
    if checkpointed:
        enable: Any = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the first is the name in newer versions
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        loss = model(**rows_for(task)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found["losses"] = losses
    found["gradients"] = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    used(model.eval(), task, folder, found)
    if share:
        found["afterwards"] = bytes_of(base) / before
    return found


def used(model: SoftPromptModel, task: str, folder: Path, found: dict[str, Any]) -> None:
    base = model.get_base_model()
    with torch.no_grad():
        found["held out"] = model(**rows_for(task)).loss
        with model.disable_adapter():
            found["frozen"] = model(**rows_for(task)).logits
    if task != "SEQ_CLS":
        side = "left" if task == "CAUSAL_LM" else "right"
        rows = tiny.ragged(side=side)
        found["tokens"] = model.generate(**rows, max_new_tokens=4, do_sample=False)
        found["beams"] = model.generate(**rows, max_new_tokens=3, num_beams=2, do_sample=False)
        with model.disable_adapter():
            found["plain"] = model.generate(**rows, max_new_tokens=3, do_sample=False)
    if model.facts.foldable:
        found["folded"] = [part for pair in model.fold().pairs for part in pair] if may_fold(model) else []
    model.save_pretrained(folder, is_main_process=not dist.is_initialized() or dist.get_rank() == 0)
    if dist.is_initialized():
        dist.barrier()
    found["saved"] = load_file(folder / "adapter_model.safetensors")
    found["config"] = (folder / "adapter_config.json").read_text()
    model.load_adapter(folder, "kept")
    model.set_adapter("kept")
    with torch.no_grad():
        found["kept"] = [model(**rows_for(task)).loss for _ in range(2)]  # folded once
    found["words"] = all_words(base)


def may_fold(model: SoftPromptModel) -> bool:
    return getattr(model.active_peft_config, "placement", "front") == "front"


def bytes_of(base: PreTrainedModel) -> int:
    """What this process holds of the frozen weights."""
    found: dict[int, int] = {}
    for each in base.parameters():
        if not each.requires_grad:
            own: Any = each
            local = own.to_local() if type(each) is not nn.Parameter else each.data
            found[id(each)] = local.untyped_storage().nbytes()
    return sum(found.values())


def member(rank: int, size: int, port: int, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    work(*given)
    dist.barrier()
    dist.destroy_process_group()


def together(size: int, work: Callable[..., None], *given: Any) -> None:
    """Run `work` in so many processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [FORKS.Process(target=member, args=(rank, size, port, work, given)) for rank in range(size)]
    for each in members:
        each.start()
    for each in members:
        each.join(150)
        if each.is_alive():
            each.kill()
    assert [each.exitcode for each in members] == [0] * size


def all_cases(place: Path) -> None:
    for number, case in enumerate(CASES):
        found = run(case, place / f"shared-{number}", share=True)
        torch.save(found, place / f"{number}-{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shared")
    together(2, all_cases, place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_shared_out_trains_and_generates_the_same(
    results: Path, tmp_path: Path, case: tuple[str, str, str, bool]
) -> None:
    expected = run(case, tmp_path, share=False)
    for rank in range(2):
        found = torch.load(results / f"{CASES.index(case)}-{rank}.pt", weights_only=False)
        # one-dimensional weights outside the layers, and T5's table of distances, are whole in each
        assert 0.5 <= found.pop("share") < 0.55
        assert 0.5 <= found.pop("afterwards") < 0.55
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            if name == "config":
                assert found[name] == each
                continue
            torch.testing.assert_close(
                found[name], each, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


TEXT = "the cat sat on the mat and the dog ran to the red house"


def later(share: bool) -> list[Tensor]:
    """What else is done with a model that may be shared out: more prompts on it, started and mixed in a batch."""
    model = get_peft_model(build("gpt2", "CAUSAL_LM"), copy.deepcopy(METHODS["p_tuning"]))
    if share:
        shard_base(model)
        with pytest.raises(ConfigError, match="already"):
            shard_base(model)
    torch.manual_seed(3)
    model.add_adapter("words", copy.deepcopy(METHODS["prompt_tuning"]))
    found = [model.encoder("words").saved_vectors()]
    model.add_adapter("states", PrefixTuningConfig(**COMMON))
    for name in ("words", "states"):
        initialize_from_text(model, tiny.tokenizer(), TEXT, name)
        found.append(model.encoder(name).saved_vectors())
    with torch.no_grad():
        return [*found, model.eval()(**tiny.ragged(), adapter_names=["words", "states", "__base__"]).logits]


def later_together(place: Path) -> None:
    torch.save(later(share=True), place / f"{dist.get_rank()}.pt")


@pytest.mark.slow
def test_starts_and_mixed_rows_after_sharing(tmp_path: Path) -> None:
    together(2, later_together, tmp_path)
    expected = later(share=False)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-4, atol=1e-5)


def in_pairs(place: Path) -> None:
    found = run(CASES[0], place / "pairs", share=True, size=2)
    torch.save(found, place / f"{dist.get_rank()}.pt")


@pytest.mark.slow
def test_a_copy_for_each_two_of_four(tmp_path: Path) -> None:
    together(4, in_pairs, tmp_path)
    expected = run(CASES[0], tmp_path / "alone", share=False)
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert 0.5 <= found["afterwards"] < 0.55
        for name in ("losses", "gradients", "tokens", "saved"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asking = Recipe(), Recipe(shard=True)
    assert not shards(plain, 2)
    assert shards(asking, 2)
    with pytest.raises(ConfigError, match="torchrun"):
        shards(asking, 1)
    with pytest.raises(ConfigError, match="4 processes cannot share copies of the base model by 3"):
        shards(Recipe(shard=True, shard_size=3), 4)
    with pytest.raises(ConfigError, match="add shard: true"):
        Recipe(shard_size=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="--fsdp_version 2"):
        shards(plain, 2)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert shards(plain, 2)
    with pytest.raises(ConfigError, match="frozen"):
        shards(Recipe(base_learning_rate=1e-5), 2)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ConfigError, match="--fsdp_offload_params false"):
        shards(plain, 2)
    with pytest.raises(ConfigError, match=r"torch\.distributed is not started"):
        shard_base(get_peft_model(tiny.build("llama"), copy.deepcopy(METHODS["cpt"])))
