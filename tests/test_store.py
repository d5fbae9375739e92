"""The store gives what `load_adapter` gives, or a reason by name."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, final

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from store_kit import BYTES, CONFIG, GEOMETRY, TOKENS, WEIGHTS, WIDTH, error_of, folder, table, vectors, write
from torch import Tensor, nn

from softprompt import (
    KV,
    METHODS,
    CheckpointError,
    ConfigError,
    Embeddings,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptStore,
    SoftPromptError,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)
from softprompt.checkpoint import save_adapter
from softprompt.config import EmbeddingConfig
from softprompt.prompt import EmbeddingPrompt, KVPrompt, SoftPrompt, need_count
from softprompt.store.loaded import storages

# ---- what it gives -----------------------------------------------------------------------------------------------


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of a prompt, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Embeddings | KV):
        value = [getattr(value, each.name) for each in fields(value)]
    elif hasattr(value, "ids"):
        value = [value.ids, value.types]
    return [each for part in value for each in tensors_of(part)] if isinstance(value, list | tuple) else []


__all__ = ["folder"]  # a fixture

CELLS = [
    (family, task, name)
    for family, task in (("gpt2", "CAUSAL_LM"), ("gemma2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"))
    for name, method in METHODS.items()
    if task in [str(each) for each in method.task_types]
]


@pytest.mark.pairwise
@pytest.mark.parametrize(("family", "task", "method"), CELLS)
@pytest.mark.parametrize(
    ("dtype", "mapped"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_every_method_is_what_load_adapter_makes_of_it(
    tmp_path: Path, family: str, task: str, method: str, dtype: torch.dtype, mapped: bool
) -> None:
    torch.manual_seed(0)
    options = {"prefix_tuning": {"prefix_dropout": 0.5, "prefix_projection": True}}.get(method, {})
    config = METHODS[method].config_class(
        task_type=task, num_virtual_tokens=TOKENS, **METHODS[method].example, **options
    )
    model = get_peft_model(families.build(family, task), config)
    for parameter in model.encoder().parameters():
        parameter.data += torch.randn_like(parameter) / 10
    model.save_pretrained(tmp_path / "one")
    path = tmp_path / "one" / WEIGHTS
    save_file({name: each.to(dtype) for name, each in load_file(path).items()}, path)
    again = SoftPromptModel.from_pretrained(families.build(family, task), tmp_path / "one")
    state, store = torch.get_rng_state(), PromptStore({"one": tmp_path / "one"}, mapped=mapped)
    good, bad = store.load(["one"], again.facts)
    assert not bad
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    loaded, encoder = good["one"], again.encoder()
    assert loaded.config == replace(again.peft_config["default"], modules_to_save=None)
    assert loaded.num_tasks == encoder.num_tasks
    for number in range(encoder.num_tasks):
        chosen = number if encoder.num_tasks > 1 else None
        expected = tensors_of(encoder.prompt(None if chosen is None else torch.tensor([chosen])))
        found = tensors_of(loaded.prompt(chosen))
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            assert not one.requires_grad
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert store.nbytes == loaded.nbytes > 0


def test_adapters_that_are_alike_have_memory_of_their_own(folder: Path) -> None:
    good, bad = PromptStore(folder).load([f"p{number}" for number in range(8)], GEOMETRY)
    assert not bad
    for number in range(8):
        prompt = good[f"p{number}"].prompt()
        assert isinstance(prompt, Embeddings)
        assert torch.equal(prompt.vectors[0], table(number))
        assert good[f"p{number}"].nbytes == BYTES


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_leaves_the_first_as_it_was(tmp_path: Path, method: str) -> None:
    config = METHODS[method].config_class(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **METHODS[method].example)
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        model = get_peft_model(families.build("gpt2", "CAUSAL_LM"), config)
        model.save_pretrained(tmp_path / name)
    store = PromptStore(tmp_path)
    task = 0 if METHODS[method].task_parameters else None
    first = store.load(["a"], model.facts)[0]["a"]
    before = [each.clone() for each in tensors_of(first.prompt(task))]
    second = store.load(["b"], model.facts)[0]["b"]
    second.prompt(task)
    after = tensors_of(first.prompt(task))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    shared = {each.data_ptr() for each in storages(first.prompt(task))}
    assert not shared & {each.data_ptr() for each in storages(second.prompt(task))}


@pytest.fixture
def squashed() -> Iterator[type[SoftPrompt]]:
    """A method that nobody foresaw: what it saves is not yet the prompt."""

    @dataclass(frozen=True, kw_only=True)
    class SquashedConfig(EmbeddingConfig):
        PEFT_TYPE = "SQUASHED"

        by: float = 2.0

    @final
    class Squashed(EmbeddingPrompt):
        name = "squashed"
        config_class = SquashedConfig

        def __init__(self, config: SquashedConfig, word_embeddings: nn.Module | None = None) -> None:
            super().__init__()
            need_count(config, "token_dim")
            self.config = config
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim or 0)

        def forward(self, indices: Tensor) -> Tensor:
            assert isinstance(self.config, SquashedConfig)
            return (self.embedding(indices) / self.config.by).tanh()

        def output_layer(self) -> None:
            return None

    yield Squashed
    del METHODS["squashed"]


def test_a_method_in_one_file_works_here(tmp_path: Path, squashed: type[SoftPrompt]) -> None:
    config = squashed.config_class(num_virtual_tokens=TOKENS, token_dim=WIDTH, num_layers=2, num_attention_heads=4)
    found = vectors(PromptStore({"a": write(tmp_path, 1, config)}), "a")
    torch.testing.assert_close(found[0], (table(1) / 2).tanh(), rtol=0, atol=0)


def test_tasks(tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(num_virtual_tokens=TOKENS, num_tasks=3)
    model = get_peft_model(families.build("gpt2", "CAUSAL_LM"), config)
    model.save_pretrained(tmp_path / "several")
    write(tmp_path / "single", 0)
    good, bad = PromptStore(tmp_path).load(["several", "single"], model.facts)
    assert not bad
    several, single = good["several"], good["single"]
    assert single.prompt(0) is single.prompt()
    for loaded, task, message in (
        (several, None, "has 3 tasks; say which"),
        (several, 3, "has tasks 0…2"),
        (several, True, "is not a whole number"),
        (single, 1, "has a single task"),
    ):
        with pytest.raises(ConfigError, match=message):
            loaded.prompt(task)


def test_prefixes_too(tmp_path: Path) -> None:
    """Keys and values on real files, with more layers than one."""
    config = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("llama"), config)
    model.save_pretrained(tmp_path)
    prompt = PromptStore({"a": tmp_path}).load(["a"], model.facts)[0]["a"].prompt()
    encoder = model.encoder()
    assert isinstance(prompt, KV)
    assert isinstance(encoder, KVPrompt)
    assert torch.equal(prompt.flat(), encoder.saved_vectors())


# ---- names -------------------------------------------------------------------------------------------------------


def test_folders_are_named_by_their_place_and_not_opened(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path / "fr" / "news", 1)
    write(tmp_path / "fr", 2)
    (tmp_path / "fr" / "news" / WEIGHTS).write_bytes(b"damaged")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fr")
    store = PromptStore(tmp_path)
    assert list(store) == ["default", "fr", "fr/news"]
    assert len(store) == 3
    assert "fr/news" in store
    assert "link" not in store
    assert torch.equal(vectors(store, "fr")[0], table(2))
    assert isinstance(error_of(store, "fr/news"), CheckpointError)
    write(tmp_path / "default", 3)
    with pytest.raises(ConfigError, match="are both adapters called 'default'"):
        PromptStore(tmp_path)


def test_names_come_and_go(folder: Path) -> None:
    store = PromptStore({"a": folder / "p0"})
    assert torch.equal(vectors(store, "a")[0], table(0))
    store.register("a", str(folder / "p1"))
    assert store.nbytes == 0
    assert torch.equal(vectors(store, "a")[0], table(1))
    store.remove("a")
    assert (len(store), store.nbytes, store.held) == (0, 0, [])
    assert "there is no prompt 'a' among the 0" in str(error_of(store, "a"))
    with pytest.raises(ConfigError, match="there is no prompt 'a'"):
        store.remove("a")


@pytest.mark.parametrize("name", ["", None, 3, "__base__"])
def test_names_that_cannot_be(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a prompt cannot be called"):
        PromptStore({name: tmp_path})


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    for path in ("", "a\0b", 3):
        with pytest.raises(ConfigError, match="is not the path of the prompt 'a'"):
            PromptStore({"a": path})  # pyright: ignore[reportArgumentType]
    for limit in (0, -1, 1.5, True, "1"):
        with pytest.raises(ConfigError, match="max_bytes="):
            PromptStore({}, max_bytes=limit)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="there is no folder"):
        PromptStore(tmp_path / "nothing")


def test_registered_adapters_cost_next_to_nothing() -> None:
    names = {f"customer-{number}": f"/srv/prompts/customer-{number}/adapter" for number in range(10_000)}
    tracemalloc.start()
    store = PromptStore(names)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(store) == 10_000
    assert held < 5_000_000


# ---- what is wrong, and only that --------------------------------------------------------------------------------


def with_config(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


def poison(folder: Path) -> None:
    values = table(0)
    values[1, 1] = float("nan")
    save_file({"prompt_embeddings": values}, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(200)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"prompt_embeddings": Path("/")}, folder / "adapter_model.bin")


def link_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / f"elsewhere-{folder.name}")
    (folder / WEIGHTS).symlink_to(folder.parent / f"elsewhere-{folder.name}")


def narrow(folder: Path) -> None:
    config = replace(CONFIG, token_dim=16)
    save_adapter(folder, config, {"prompt_embeddings": table(0)[:, :16]})


def long(folder: Path) -> None:
    config = replace(CONFIG, num_virtual_tokens=tiny.CONTEXT)
    save_adapter(folder, config, {"prompt_embeddings": torch.ones(tiny.CONTEXT, WIDTH)})


def stray_encoder(folder: Path) -> None:
    save_file({"embedding.weight": table(0)}, folder / "encoder.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], None], type[SoftPromptError], str]] = {
    "deleted": (shutil.rmtree, CheckpointError, "there is no folder"),
    "emptied": (lambda folder: (folder / WEIGHTS).unlink(), CheckpointError, "but neither"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), CheckpointError, "has no adapter_config"),
    "lora": (with_config({"peft_type": "LORA"}), CheckpointError, "is no soft prompt known here"),
    "field": (with_config({"brand_new": 1}), CheckpointError, "the field 'brand_new' is unknown"),
    "promise": (with_config({"num_virtual_tokens": 5}), CheckpointError, "do not belong together"),
    "heads": (with_config({"modules_to_save": ["score"]}), UnsupportedError, "with model.load_adapter"),
    "task head": (with_config({"task_type": "SEQ_CLS"}), UnsupportedError, "head of its own (classifier, score)"),
    "poisoned": (poison, CheckpointError, "are NaN or infinite"),
    "truncated": (truncate, CheckpointError, "damaged, cut short"),
    "pickled": (pickled, CheckpointError, "could run code"),
    "link": (link_out, CheckpointError, "is a link out of its folder"),
    "alien": (narrow, CheckpointError, "made for another base model: width 16 in the adapter, 32 here"),
    "layers": (with_config({"num_layers": 7}), CheckpointError, "layers 7 in the adapter, 2 here"),
    "long": (long, ConfigError, "leaves no room in this model's context"),
    "encoder": (stray_encoder, CheckpointError, "was not saved together with the prompt"),
}


def test_what_is_broken_fails_alone(tmp_path: Path) -> None:
    store = PromptStore(tmp_path)
    for name, (damage, _, _) in BROKEN.items():
        damage(write(tmp_path / name, 0))
        store.register(name, tmp_path / name)
    store.register("hub", "somebody/some-adapter")
    store.register("fine", write(tmp_path / "fine", 1))
    for _ in range(2):
        good, bad = store.load(["fine", *BROKEN, "hub", "unknown", "fine"], GEOMETRY)
        assert list(good) == ["fine"]
        assert set(bad) == {*BROKEN, "hub", "unknown"}
        for name, (_, kind, message) in BROKEN.items():
            assert type(bad[name]) is kind
            assert message in str(bad[name])
            assert str(tmp_path / name) in str(bad[name])
        assert "folders on this machine only" in str(bad["hub"])
        assert "there is no prompt 'unknown'" in str(bad["unknown"])
        assert store.held == ["fine"]
        assert store.nbytes == BYTES


def test_each_base_model_has_its_own_say(tmp_path: Path) -> None:
    store = PromptStore({"a": write(tmp_path / "a", 0)})
    other = replace(GEOMETRY, hidden_size=48)
    assert torch.equal(vectors(store, "a")[0], table(0))
    assert "width 32 in the adapter, 48 here" in str(error_of(store, "a", other))
    longer = replace(GEOMETRY, context=None)
    good, bad = store.load(["a"], longer)
    assert not bad
    assert good["a"] is not store.load(["a"], GEOMETRY)[0]["a"]
    assert store.nbytes == 2 * BYTES
    assert store.held == ["a"]
