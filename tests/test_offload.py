"""A base model that is larger than memory trains a prompt: layers on disk, to the same numbers, in little memory."""

from __future__ import annotations

import copy
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import build
from safetensors.torch import load_file
from test_train import recipe, rows_of, workplace  # noqa: F401  (workplace is a fixture)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from softprompt import (
    CPTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
    initialize_from_text,
    initialize_kv_prefix_from_text,
)
from softprompt.cli.prompted import open_prompted
from softprompt.cli.use import facts_of
from softprompt.elsewhere import all_words, offloaded, place_of
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.loading import Dispatch, load_base
from softprompt.recipe import Recipe
from softprompt.train import train

# the first layer away too: lower versions of transformers then warn of a device that the model is not on
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")

LAYERS = {
    "llama": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk", "model.rotary_emb": "cpu"}
    | {"lm_head": "disk"},
    "gpt2": {"transformer.wte": "cpu", "lm_head": "cpu", "transformer.wpe": "disk", "transformer.h": "disk"}
    | {"transformer.ln_f": "cpu"},
}
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
# All weights away. (Lower versions of accelerate refuse that, unless something else, as these buffers, stays.)
ALL = LAYERS["llama"] | {"model.embed_tokens": "disk"}
BERT = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "disk", "classifier": "disk"}
CONFIGS: dict[str, Any] = {
    "prompt_tuning": PromptTuningConfig(**COMMON, prompt_tuning_init="SAMPLE_VOCAB"),
    "p_tuning": PromptEncoderConfig(**COMMON, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(**COMMON),
    "ffn": PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=8),
    "cpt": CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4, 5, 6, 7, 8]),
}
TEXT = "the cat sat on the mat and the dog ran to the red house"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of eight layers, saved."""
    place = tmp_path_factory.mktemp("bases")
    deep = {"llama": {"num_hidden_layers": 8}, "gpt2": {"n_layer": 8}}
    for family, more in deep.items():
        tiny.build(family, **more).save_pretrained(place / family)
        tiny.tokenizer().save_pretrained(place / family)
    return {family: place / family for family in deep}


def loaded(folder: Path, device_map: Any = None) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()


def batch() -> dict[str, Tensor]:
    rows = tiny.ragged()
    return {**rows, "labels": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)}


def checkpoint(model: Any, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # the first is the name in newer versions
    model.train()


def run(base: PreTrainedModel, config: Any, folder: Path, reentrant: bool | None = None) -> dict[str, Any]:
    """Everything that is done with a prompt; what came of it."""
    torch.manual_seed(0)
    model = get_peft_model(base, copy.deepcopy(config))
    if reentrant is not None:
        checkpoint(model, reentrant)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    found: dict[str, Any] = {"losses": []}
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        found["losses"].append(loss.detach())
    found["gradients"] = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    model.eval()
    rows = tiny.ragged(side="left")
    with torch.no_grad():
        found["held out"] = model(**batch()).loss
    found["tokens"] = model.generate(**rows, max_new_tokens=4, do_sample=False)
    found["beams"] = model.generate(**rows, max_new_tokens=3, num_beams=2, do_sample=False)
    found["folded"] = [part for pair in model.fold().pairs for part in pair]
    model.save_pretrained(folder)
    found["saved"] = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    again = SoftPromptModel.from_pretrained(base, folder)
    with torch.no_grad():
        found["again"] = again(**batch()).loss
        found["kept"] = again(**batch()).loss
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, expected in one.items():
        torch.testing.assert_close(
            other[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method"), [*[("llama", method) for method in CONFIGS], ("gpt2", "prompt_tuning"), ("gpt2", "ffn")]
)
def test_layers_on_disk_train_to_the_same_numbers(
    folders: dict[str, Path], tmp_path: Path, family: str, method: str
) -> None:
    expected = run(loaded(folders[family]), CONFIGS[method], tmp_path / "memory")
    base = loaded(folders[family], LAYERS[family] if method != "p_tuning" else ALL)
    assert offloaded(base)
    same(expected, run(base, CONFIGS[method], tmp_path / "disk"))
    assert offloaded(base)  # and nothing was left behind in memory
    assert sum(each.nbytes for each in base.parameters() if not each.is_meta) <= 4 * 32 * tiny.VOCAB + 8 * 32


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(folders: dict[str, Path], tmp_path: Path, reentrant: bool) -> None:
    for method in ("prompt_tuning", "ffn"):
        expected = run(loaded(folders["llama"]), CONFIGS[method], tmp_path / "memory", reentrant)
        base = loaded(folders["llama"], ALL)
        same(expected, run(base, CONFIGS[method], tmp_path / "disk", reentrant))
        assert all(each.is_meta for each in base.parameters())


@pytest.mark.slow
def test_models_that_the_caller_has_dispatched(folders: dict[str, Path], tmp_path: Path) -> None:
    """By any of accelerate's functions, from weights that were in memory before."""
    expected = run(loaded(folders["llama"]), CONFIGS["prompt_tuning"], tmp_path / "memory")
    ways = {
        "dispatch": lambda base: dispatch_model(base, LAYERS["llama"], offload_dir=str(tmp_path / "weights")),
        "cpu": lambda base: cpu_offload(base, torch.device("cpu")),
        "disk": lambda base: disk_offload(base, str(tmp_path / "more"), torch.device("cpu")),
    }
    for name, way in ways.items():
        base = loaded(folders["llama"])
        way(base)
        assert offloaded(base), name
        same(expected, run(base, CONFIGS["prompt_tuning"], tmp_path / name))


@pytest.mark.parametrize(("family", "task"), [("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS"), ("bloom", "CAUSAL_LM")])
def test_other_kinds_of_models(tmp_path: Path, family: str, task: str) -> None:
    """Vectors in an encoder, in rows, and keys and values in a cache; a head that trains."""
    rows = tiny.ragged()
    rows["labels"] = torch.tensor([0, 1, 2]) if task == "SEQ_CLS" else rows["input_ids"]
    found = []
    for place in ("memory", "disk"):
        base = build(family, task)
        if place == "disk":
            disk_offload(base, str(tmp_path), torch.device("cpu"))
        torch.manual_seed(0)
        config = PromptTuningConfig(task_type=task, num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
        model = get_peft_model(base, config)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
        losses = []
        for _ in range(2):
            loss = model(**rows).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        more = [] if task == "SEQ_CLS" else [model.generate(input_ids=rows["input_ids"], max_new_tokens=3)]
        found.append([*losses, *more, *[each.detach() for each in model.parameters() if each.requires_grad]])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_starts_from_text_and_nearest_words(folders: dict[str, Path]) -> None:
    tokenizer, bases = tiny.tokenizer(), [loaded(folders["llama"]), loaded(folders["llama"], ALL)]
    assert place_of(bases[1]) == torch.device("cpu")
    torch.testing.assert_close(all_words(bases[1]), bases[0].get_input_embeddings().weight.detach())
    for method in ("prompt_tuning", "prefix", "ffn"):
        models = [get_peft_model(base, copy.deepcopy(CONFIGS[method])) for base in bases]
        for model in models:
            torch.manual_seed(1)
            (initialize_kv_prefix_from_text if method == "prefix" else initialize_from_text)(
                model, tokenizer, text=TEXT
            )
            assert model.device == torch.device("cpu")
        if method != "ffn":  # (whose table is drawn)
            one, other = (model.encoder().saved_vectors() for model in models)
            torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_a_frozen_prompt_is_folded_once(folders: dict[str, Path]) -> None:
    base = loaded(folders["llama"], ALL)
    model = get_peft_model(base, copy.deepcopy(CONFIGS["prompt_tuning"])).eval().requires_grad_(False)
    rows, seen = tiny.ragged(), []
    base.get_submodule("model.layers.0").register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    for _ in range(3):
        model(**rows)
    assert seen == [5, 9, 9, 9]


# ---- memory --------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16, "head_dim": 64}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["softprompt.train", "accelerate", "test_offload", "transformers.models.llama.modeling_llama"]
)


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _growth(folder: str, methods: list[str], answer: Any) -> None:
    """In a process of its own: what training a prompt takes beyond what was there, in bytes, for each method."""
    torch.set_num_threads(1)
    found = {}
    for method in methods:
        kind, _, how = method.partition(" ")
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
        base = AutoModelForCausalLM.from_pretrained(folder, device_map=ALL).eval()
        model = get_peft_model(base, copy.deepcopy(CONFIGS[kind]))
        if how == "checkpointed":
            checkpoint(model, reentrant=False)
        if how == "kept":  # as it would be without us
            vectors = torch.randn(1, 4, 256, requires_grad=True)
            base(inputs_embeds=vectors, labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
        else:
            optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
            for _ in range(2):
                model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.backward()
                optimizer.step()
            model.generate(input_ids=torch.tensor([[5, 6, 7, 8]]), max_new_tokens=2)
            model.fold()
        found[method] = _peak() - before
    answer.send(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells what a process has needed")
def test_memory_stays_below_the_size_of_the_model(tmp_path: Path) -> None:
    base = tiny.build("llama", **WIDE)
    size = sum(each.nbytes for each in base.parameters())
    base.save_pretrained(tmp_path)
    del base
    methods = ["prompt_tuning kept", "prompt_tuning", "ffn", "prompt_tuning checkpointed"]
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=_growth, args=(str(tmp_path), methods, there))
    process.start()
    assert here.poll(120)
    found = here.recv()
    process.join()
    assert found.pop("prompt_tuning kept") > size  # which is why this is needed
    assert all(growth < 0.6 * size for growth in found.values()), (size, found)


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_recipes_say_where_the_layers_go(folders: dict[str, Path]) -> None:
    given = {"train": "x", "out": "y", "device_map": LAYERS["llama"], "max_memory": {0: "1GiB", "cpu": 1000}}
    recipe = Recipe.from_dict(given)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    dispatch = Dispatch.of(recipe)
    assert dispatch == Dispatch(LAYERS["llama"], None, {0: "1GiB", "cpu": 1000})
    base = load_base(str(folders["llama"]), tiny.tokenizer(), dispatch=dispatch)
    assert offloaded(base)
    assert Dispatch.of(Recipe()) is None
    auto = Recipe(device_map="auto", max_memory='{"cpu": "200KiB"}')
    assert offloaded(load_base(str(folders["llama"]), tiny.tokenizer(), dispatch=Dispatch.of(auto)))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_run_with_layers_on_disk(workplace: Path, tmp_path: Path, task: str) -> None:  # noqa: F811
    """From the recipe to answers with the saved prompt; a classifier is new, and so not on disk."""
    common: dict[str, Any] = {"steps": 3, "task": task, "method": "prompt_tuning", "device": "auto"}
    places = {"memory": {}, "disk": {"device_map": BERT if task == "SEQ_CLS" else ALL}}
    runs = [recipe(workplace, tmp_path / name, **common, **more) for name, more in places.items()]
    results = [train(run) for run in runs]
    assert results[1].best == pytest.approx(results[0].best, rel=1e-4)
    for one, other in zip(*(rows_of(Path(run.out)) for run in runs), strict=True):
        assert {**other, "tokens_per_s": 0} == pytest.approx({**one, "tokens_per_s": 0}, rel=1e-3, abs=1e-5)
    summaries = [json.loads((Path(run.out) / "summary.json").read_text()) for run in runs]
    assert summaries[1]["nearest"] == summaries[0]["nearest"] is not None
    opened = open_prompted(Path(runs[1].out), None)
    assert offloaded(opened.model.get_base_model())
    facts = [facts_of(Path(run.out), None, 2)[0].nearest for run in runs]
    assert facts[1] == facts[0] is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device_map": "sideways"}, "sideways"),
        ({"device_map": "{}"}, "it must be one of auto"),
        ({"device_map": '{"": [1]}'}, "a mapping such as"),
        ({"device_map": "auto", "max_memory": "much"}, "20GiB"),
        ({"max_memory": '{"cpu": 1}'}, "add device_map"),
        ({"offload_folder": "there"}, "add device_map"),
        ({"device_map": "auto", "device": "cpu"}, "leave device out"),
        ({"device_map": "auto", "shard": True}, "both shard and device_map"),
        ({"device_map": "auto", "base_learning_rate": 1e-5}, "frozen"),
        ({"shard": True, "base_learning_rate": 1e-5}, "frozen"),
    ],
)
def test_recipes_that_contradict_themselves(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe(**given)


def test_what_cannot_be_loaded_is_said_in_a_sentence(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = loaded(folders["gpt2"])
    torch.save(old.state_dict(), tmp_path / "pytorch_model.bin")  # weights that cannot be read one by one
    old.config.save_pretrained(tmp_path)
    apart = Dispatch(LAYERS["gpt2"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="give offload_folder"):
        load_base(str(tmp_path), tiny.tokenizer(), dispatch=apart)
    again = Dispatch(LAYERS["gpt2"], str(tmp_path / "weights"))  # pyright: ignore[reportArgumentType]
    assert offloaded(load_base(str(tmp_path), tiny.tokenizer(), dispatch=again))
    with pytest.raises(UnsupportedError, match="meta device"), torch.device("meta"):
        get_peft_model(AutoModelForCausalLM.from_config(old.config), copy.deepcopy(CONFIGS["prefix"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="shard: true"):
        Dispatch("auto").options()
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr("softprompt.loading.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"softprompt\[big\]"):
        Dispatch("auto").options()
