"""Comparing prompts of several tasks, and starting one from another."""

import json
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from cli_kit import ROWS, Shell, save_base, save_prompt, write_rows
from torch import Tensor

from softprompt import (
    CartridgeConfig,
    ConfigError,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    compare_prompts,
    get_peft_model,
    initialize_from_prompt,
)
from softprompt.together.compare import read_prompts, similarity

P, D = 4, 32


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def saved(folder: Path, vectors: Tensor | None = None, config: Any = None, family: str = "llama") -> Path:
    model = get_peft_model(tiny.build(family), config or PromptTuningConfig(num_virtual_tokens=P))
    if vectors is not None:
        model.encoder().start_from(vectors)
    model.save_pretrained(folder)
    return folder


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / one.norm() / other.norm())


# ---- similarity --------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    one = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    assert similarity(one, other) == pytest.approx(4 / (4**2 + 2**2) ** 0.5)
    assert similarity(one, other, "per-token") == pytest.approx(2 / 3)
    assert similarity(one, -one) == pytest.approx(-1)
    assert similarity(one, torch.zeros(1, 2)) == 0


def test_it_is_the_mean_over_all_pairs_of_tokens() -> None:
    one, other = torch.randn(3, D), torch.randn(5, D)
    pairs = [cosine(e, f) for e in one for f in other]
    assert similarity(one, other, "per-token") == pytest.approx(sum(pairs) / 15, abs=1e-6)
    assert similarity(one, other) == pytest.approx(cosine(one.mean(0), other.mean(0)), abs=1e-6)


def test_the_matrix_of_saved_prompts(tmp_path: Path) -> None:
    tables = [torch.randn(count, D) for count in (P, P, 6)]  # lengths may differ
    folders = [
        saved(tmp_path / str(number), table, PromptTuningConfig(num_virtual_tokens=len(table)))
        for number, table in enumerate(tables)
    ]
    found = compare_prompts(folders)
    assert found.names == [str(folder) for folder in folders]
    for one, row in zip(tables, found.similarity, strict=True):
        assert row == pytest.approx([cosine(one.mean(0), other.mean(0)) for other in tables], abs=1e-6)


@pytest.mark.parametrize("config", [PrefixTuningConfig, CartridgeConfig])
def test_keys_and_values_compare_too(config: Any, tmp_path: Path) -> None:
    one, two = (saved(tmp_path / name, config=config(num_virtual_tokens=P)) for name in "ab")
    row = compare_prompts([one, two]).similarity[0]
    assert row[0] == pytest.approx(1)
    tables = [read_prompts(folder)[0].vectors for folder in (one, two)]
    assert row[1] == pytest.approx(cosine(tables[0].mean(0), tables[1].mean(0)), abs=1e-6)


def test_every_task_of_a_prompt_of_several_is_one(tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=3, num_ranks=1, task_names=["a", "b", "c"]
    )
    model = get_peft_model(tiny.build("llama"), config)
    torch.nn.init.normal_(model.encoder().prefix_task_cols)
    model.save_pretrained(tmp_path)
    prompts = read_prompts(tmp_path)
    assert [prompt.name for prompt in prompts] == [f"{tmp_path}:{name}" for name in "abc"]
    for task, prompt in enumerate(prompts):
        assert torch.equal(prompt.vectors, model.encoder().task_vectors(task))
    assert len(compare_prompts([tmp_path]).names) == 3


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    table, prefix = saved(tmp_path / "t"), saved(tmp_path / "p", config=PrefixTuningConfig(num_virtual_tokens=P))
    wide = save_prompt(tmp_path / "w", PromptTuningConfig(num_virtual_tokens=P), hidden_size=64)
    heads = save_prompt(tmp_path / "h", PrefixTuningConfig(num_virtual_tokens=P), num_key_value_heads=1, head_dim=16)
    for paths, message in (
        ([table], "1 prompts"),
        ([table, prefix], "t is made of vectors in input space, .*p of keys and values"),
        ([table, wide], "t has virtual tokens of width 32, .*w of 64"),
        ([prefix, heads], r"width 64, .*h of 64; their layers have \[\[2, 8, 8\].*and \[\[1, 16, 16\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_prompts(paths)
    with pytest.raises(ConfigError, match="average or per-token"):
        compare_prompts([table, table], "euclidean")


# ---- starting from another task's prompt -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, P, 11])
def test_a_prompt_starts_from_another_cut_or_repeated(count: int, tmp_path: Path) -> None:
    table = torch.randn(P, D)
    source = saved(tmp_path, table)
    model = get_peft_model(tiny.build("llama"), PromptTuningConfig(num_virtual_tokens=count))
    initialize_from_prompt(model, source)
    assert torch.equal(model.encoder().saved_vectors(), table.repeat(3, 1)[:count])


def test_through_an_encoder_and_back(tmp_path: Path) -> None:
    """P-tuning's MLP is fitted to a table; a table starts from what an MLP puts out."""
    table = torch.randn(P, D)
    encoder = PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=64)
    model = get_peft_model(tiny.build("llama"), encoder)
    initialize_from_prompt(model, saved(tmp_path / "table", table))
    torch.testing.assert_close(model.encoder().saved_vectors(), table, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "mlp")
    again = get_peft_model(tiny.build("llama"), PromptTuningConfig(num_virtual_tokens=P))
    initialize_from_prompt(again, tmp_path / "mlp")
    assert torch.equal(again.encoder().saved_vectors(), model.encoder().saved_vectors())


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_starts_from_the_first_keys_and_values(projection: bool, tmp_path: Path) -> None:
    source = saved(tmp_path, config=CartridgeConfig(num_virtual_tokens=P))
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=projection, encoder_hidden_size=16)
    model = get_peft_model(tiny.build("llama"), config)
    initialize_from_prompt(model, source)
    expected = read_prompts(source)[0].vectors[:3]
    torch.testing.assert_close(model.encoder().saved_vectors(), expected, rtol=0, atol=1e-4)
    longer = get_peft_model(tiny.build("llama"), PrefixTuningConfig(num_virtual_tokens=5))
    with pytest.raises(ConfigError, match=r"4 virtual tokens, this prompt 5.*num_virtual_tokens=4"):
        initialize_from_prompt(longer, source)


@pytest.mark.parametrize("parts", [{}, {"cross_prefix": True, "encoder_prefix": True}])
def test_prefixes_of_encoder_decoders(parts: dict[str, bool], tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **parts)
    one, two = (get_peft_model(families.build("t5", "SEQ_2_SEQ_LM"), config) for _ in range(2))
    one.save_pretrained(tmp_path)
    initialize_from_prompt(two, tmp_path)
    assert torch.equal(two.encoder().saved_vectors(), one.encoder().saved_vectors())
    assert compare_prompts([tmp_path, tmp_path]).similarity[0][1] == pytest.approx(1)


def test_one_task_of_several_is_named_or_numbered(tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=2, num_ranks=1, task_names=["a", "b"]
    )
    many = get_peft_model(tiny.build("llama"), config)
    torch.nn.init.normal_(many.encoder().prefix_task_cols)
    many.save_pretrained(tmp_path / "many")
    for task in ("b", 1):
        model = get_peft_model(tiny.build("llama"), PromptTuningConfig(num_virtual_tokens=P))
        initialize_from_prompt(model, tmp_path / "many", task=task)
        assert torch.equal(model.encoder().saved_vectors(), many.encoder().task_vectors(1))
    one = saved(tmp_path / "one")
    for path, task, message in (
        (tmp_path / "many", None, "2 tasks, so say which"),
        (tmp_path / "many", 2, "tasks 0…1, not 2"),
        (one, 0, "one task, so name none"),
    ):
        with pytest.raises(ConfigError, match=message):
            initialize_from_prompt(model, path, task=task)


def test_a_start_from_another_kind_or_width_changes_nothing(tmp_path: Path) -> None:
    model = get_peft_model(tiny.build("llama"), PromptTuningConfig(num_virtual_tokens=P))
    before = model.encoder().saved_vectors()
    prefix = saved(tmp_path / "p", config=PrefixTuningConfig(num_virtual_tokens=P))
    wide = save_prompt(tmp_path / "w", PromptTuningConfig(num_virtual_tokens=P), hidden_size=64)
    for path, message in ((prefix, "this prompt is made of vectors"), (wide, "this prompt has .* width 32, .* of 64")):
        with pytest.raises(ConfigError, match=message):
            initialize_from_prompt(model, path)
    assert torch.equal(model.encoder().saved_vectors(), before)


def test_only_the_named_adapter_starts(tmp_path: Path) -> None:
    table = torch.randn(P, D)
    model = get_peft_model(tiny.build("llama"), PromptTuningConfig(num_virtual_tokens=P))
    model.add_adapter("other", PromptTuningConfig(num_virtual_tokens=P))
    before = model.encoder("default").saved_vectors()
    initialize_from_prompt(model, saved(tmp_path, table), adapter_name="other")
    assert torch.equal(model.encoder("other").saved_vectors(), table)
    assert torch.equal(model.encoder("default").saved_vectors(), before)
    assert isinstance(model, SoftPromptModel)


# ---- the command line --------------------------------------------------------------------------------------------


def test_the_command_prints_the_matrix(shell: Shell, tmp_path: Path) -> None:
    tables = [torch.randn(P, D) for _ in range(3)]
    folders = [saved(tmp_path / name, table) for name, table in zip(("one", "two", "three"), tables, strict=True)]
    printed = shell.ok("compare", *folders)
    for name in ("one", "two", "three", "1.000", f"{similarity(tables[0], tables[1]):.3f}"):
        assert name in printed
    asked = json.loads(shell.ok("compare", *folders, "--metric", "per-token", "--json"))
    assert asked["names"] == [str(folder) for folder in folders]
    assert asked["similarity"][0][2] == pytest.approx(similarity(tables[0], tables[2], "per-token"))
    assert asked["metric"] == "per-token"


def test_the_command_says_what_cannot_be_compared(shell: Shell, tmp_path: Path) -> None:
    one = saved(tmp_path / "one")
    status, _, err = shell.run("compare", one, tmp_path / "none")
    assert (status, str(tmp_path / "none") in err) == (2, True)
    status, _, err = shell.run("compare", one)
    assert (status, len(err.splitlines())) == (2, 1)


def test_prompts_that_name_different_base_models_are_remarked_on(shell: Shell, tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        base = tiny.build("llama")
        base.name_or_path = f"base-{name}"
        get_peft_model(base, PromptTuningConfig(num_virtual_tokens=P)).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    assert "base-one, base-two" in shell.ok("compare", *folders)
    assert "Note" not in shell.ok("compare", folders[0], folders[0])


@pytest.mark.slow
def test_training_starts_from_another_tasks_prompt(shell: Shell, tmp_path: Path) -> None:
    """With its length, unless another is asked for; a learning rate of next to nothing shows where it started."""
    base, rows = save_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", ROWS)
    table = torch.randn(P, D)
    source = saved(tmp_path / "source", table)
    flags = ("train", "--model", base, "--method", "prompt_tuning", "--train", rows, "--template", "{mr} => {refs}",
             "--steps", 1, "--batch-size", 2, "--samples", 1, "--learning-rate", 1e-9)  # fmt: skip
    for name, more, count in (("same", (), P), ("longer", ("--num-virtual-tokens", 6), 6)):
        shell.ok(*flags, "--init-from", source, "--out", tmp_path / name, *more)
        expected = table.repeat(2, 1)[:count]
        torch.testing.assert_close(read_prompts(tmp_path / name)[0].vectors, expected, rtol=0, atol=1e-6)
    for more, message in (
        (("--init", "text", "--init-text", "the cat"), "init_from is set"),
        (("--init-text", "the cat"), "init_from is set too"),
        (("--method", "prefix_tuning"), "keys and values"),
    ):
        status, _, err = shell.run(*flags, "--init-from", source, "--out", tmp_path / "out", *more)
        assert (status, message in err) == (2, True)
    status, _, err = shell.run(*flags, "--init", "prompt", "--out", tmp_path / "out")
    assert (status, "init_from is empty" in err) == (2, True)
