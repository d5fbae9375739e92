"""Every command on tiny models: train, go on, generate, eval, show, convert, methods."""

import json
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli_kit import LABELLED, ROWS, Shell, save_base, save_prompt, write_rows
from safetensors.torch import load_file

from softprompt import KV, METHODS, PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, __version__
from softprompt.cli.flags import method_parameters, recipe_parameters, split_given
from softprompt.cli.prompted import example_of, open_prompted
from softprompt.cli.use import Decoding, answers
from softprompt.recipe import Recipe

SMALL = ("--num-virtual-tokens", 4, "--steps", 3, "--batch-size", 2, "--samples", 1, "--max-new-tokens", 4)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    configs: dict[str, Any] = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
    return {
        name: save_prompt(folder / name, config(task_type="CAUSAL_LM", num_virtual_tokens=4))
        for name, config in configs.items()
    }


# train ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_train_then_everything_else(shell: Shell, tmp_path: Path, base: Path, rows: Path, method: str) -> None:
    out = tmp_path / "run"
    printed = shell.ok(
        "train", "--model", base, "--method", method, "--train", rows, "--eval", rows,
        "--template", "{mr} => {ref}", "--out", out, *SMALL,
    )  # fmt: skip
    assert "frozen model" in printed
    assert str(out) in printed
    assert "softprompt generate" in printed
    loaded = SoftPromptModel.from_pretrained(tiny.build("llama"), out)
    assert loaded.peft_config["default"].num_virtual_tokens == 4
    assert shell.ok("generate", "--prompt", out, "--input", "name[cat]", "--max-new-tokens", 4).count("\n") >= 1
    scores = json.loads(shell.ok("eval", "--prompt", out, "--eval", rows, "--max-new-tokens", 4, "--json"))
    assert scores["prompt"]["tokens"] == scores["frozen"]["tokens"]
    assert set(scores["prompt"]) == {"loss", "perplexity", "tokens", "bleu", "chrf"}
    assert method in shell.ok("show", out)


def test_a_recipe_with_flags_over_it_and_method_options(shell: Shell, tmp_path: Path, base: Path, rows: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {base}\nmethod: prefix_tuning\ntrain: {rows}\ntemplate: '{{mr}} => {{ref}}'\nepochs: 1\n"
        "num_virtual_tokens: 4\nbatch_size: 2\nmethod_options: {prefix_projection: true, encoder_hidden_size: 8}\n"
    )
    out = tmp_path / "run"
    shell.ok("train", recipe, "--out", out, "--steps", 2, "--encoder-hidden-size", 6, "--learning-rate", "5e-3")
    run = Recipe.from_yaml(out / "recipe.yaml")
    assert (run.steps, run.epochs, run.learning_rate, run.num_virtual_tokens) == (2, None, 0.005, 4)
    assert run.method_options == {"prefix_projection": True, "encoder_hidden_size": 6}


def test_every_setting_of_a_recipe_and_of_every_method_is_a_flag(shell: Shell) -> None:
    mappings = {"method_options", "tasks", "teacher", "verbalizer"}  # written in a recipe
    names = {field.name for field in fields(Recipe)} - mappings
    for method in METHODS.values():
        names |= {field.name for field in fields(method.config_class) if "help" in field.metadata}
    assert {parameter.name for parameter in [*recipe_parameters(), *method_parameters()]} == names
    page = shell.ok("train", "--help")
    for flag in ("--learning-rate", "--prefix-projection", "--class-labels", "--resume", "--verbalizer"):
        assert flag in page


def test_what_was_not_given_is_not_set() -> None:
    given = {"steps": 3, "epochs": None, "prefix_projection": False, "class_labels": [], "encoder_dropout": None}
    assert split_given(given) == ({"steps": 3}, {"prefix_projection": False})


def test_resume_needs_only_the_folder(shell: Shell, tmp_path: Path, base: Path, rows: Path) -> None:
    out, once = tmp_path / "run", tmp_path / "once"
    flags = ("--model", base, "--train", rows, "--template", "{mr} => {ref}", "--save-steps", 2, *SMALL)
    _interrupt_after(2)
    status, _, err = shell.run("train", *flags, "--steps", 6, "--out", out)
    assert (status, err.splitlines()[-1].split(";")[0]) == (130, "error: stopped at step 2 of 6")
    shell.ok("train", "--resume", "--out", out)
    shell.ok("train", *flags, "--steps", 6, "--out", once)
    ours, theirs = (load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in (out, once))
    assert torch.equal(ours, theirs)


@pytest.fixture(autouse=True)
def _no_interrupt_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "_interrupt_after", _make_interrupt(monkeypatch))


def _interrupt_after(steps: int) -> None:
    raise AssertionError(steps)  # replaced for each test


def _make_interrupt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A real SIGINT to this process once so many steps are done."""
    from softprompt.train import Trainer

    def after(steps: int) -> None:
        advance = Trainer._advance

        def stepping(self: Trainer) -> dict[str, Any]:
            row = advance(self)
            if row["step"] == steps and threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGINT)
                monkeypatch.setattr(Trainer, "_advance", advance)
            return row

        monkeypatch.setattr(Trainer, "_advance", stepping)

    return after


def test_a_classifier_learns_and_names_its_classes(shell: Shell, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "bert", "bert"), tmp_path / "run"
    data = write_rows(tmp_path / "rows.jsonl", LABELLED)
    shell.ok("train", "--model", base, "--task", "SEQ_CLS", "--train", data, "--eval", data, "--out", out, *SMALL)
    scores = json.loads(shell.ok("eval", "--prompt", out, "--eval", data, "--json"))
    assert scores["prompt"]["rows"] == len(LABELLED)
    assert 0 <= scores["prompt"]["accuracy"] <= 1
    answers = shell.ok("generate", "--prompt", out, "--file", data, "--input-column", "sentence").split()
    assert len(answers) == len(LABELLED)
    assert set(answers) <= {"bad", "good", "so"}
    agreeing = sum(answer == row["label"] for answer, row in zip(answers, LABELLED, strict=True))
    assert agreeing / len(LABELLED) == pytest.approx(scores["prompt"]["accuracy"])


# generate and eval ---------------------------------------------------------------------------------------------------


def test_the_runs_template_is_used_unless_the_text_is_complete(
    shell: Shell, tmp_path: Path, base: Path, prompts: dict[str, Path]
) -> None:
    flags = ("generate", "--model", base, "--prompt", prompts["prefix"], "--max-new-tokens", 3, "--json")
    template = ("--template", "{a} is {b} => {c}")
    asked = {name: json.loads(shell.ok(*flags, *given))["input"] for name, given in {
        "object": (*template, "--input", '{"a": "the cat", "b": 2}'),
        "complete": (*template, "--input", "the cat is 2 =>"),
        "single": ("--template", "{a} => {c}", "--input", "the cat"),
        "raw": (*template, "--raw", "--input", "the cat"),
        "plain": ("--input", "the cat"),
    }.items()}  # fmt: skip
    assert asked == {"object": "the cat is 2 =>", "complete": "the cat is 2 =>", "single": "the cat =>",
                     "raw": "the cat", "plain": "the cat"}  # fmt: skip


def test_a_file_gives_one_line_per_input(shell: Shell, tmp_path: Path, base: Path, prompts: dict[str, Path]) -> None:
    lines = tmp_path / "inputs.txt"
    lines.write_text("the cat\n\nthe dog ran\nthe river\n", encoding="utf-8")
    flags = ("generate", "--model", base, "--prompt", prompts["prefix"], "--max-new-tokens", 5)
    together = shell.ok(*flags, "--file", lines, "--batch-size", 3).splitlines()
    alone = [" ".join(shell.ok(*flags, "--input", text).split()) for text in ("the cat", "the dog ran", "the river")]
    assert together == alone
    chats = [{"messages": [{"role": "user", "content": "the cat"}]}]
    assert shell.ok(*flags, "--file", write_rows(tmp_path / "chats.jsonl", chats)).count("\n") == 1


def test_decoding_flags_reach_the_model(shell: Shell, base: Path, prompts: dict[str, Path]) -> None:
    flags = ("generate", "--model", base, "--prompt", prompts["prompt"], "--input", "the cat", "--max-new-tokens", 12)
    greedy, again = shell.ok(*flags), shell.ok(*flags)
    assert greedy == again
    sampled = [shell.ok(*flags, "--sample", "--temperature", 3.0, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert shell.ok(*flags, "--num-beams", 3)
    assert shell.ok(*flags, "--frozen") != greedy


def test_a_long_answer_is_kept_within_the_context(
    shell: Shell, base: Path, prompts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def generate(model: Any, tokenizer: Any, inputs: Any, limit: int, *_: Any, **__: Any) -> list[str]:
        limits.append(limit)
        return [""]

    monkeypatch.setattr("softprompt.cli.use.generate_texts", generate)
    shell.ok("generate", "--model", base, "--prompt", prompts["prefix"], "--input", "the cat", "--max-new-tokens", 9999)
    assert limits == [tiny.CONTEXT - 4 - len(tiny.tokenizer()("the cat")["input_ids"])]


def test_an_answer_can_be_seen_while_it_is_written(
    base: Path, prompts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_prompted(prompts["prefix"], str(base))
    inputs, decoding = [example_of("the cat", None)], Decoding(8, 1, 0, {"num_beams": 1})
    written = answers(opened, inputs, decoding, stream=True)
    assert capsys.readouterr().out.strip() == written[0] == answers(opened, inputs, decoding)[0]


def test_eval_without_a_recipe_prints_a_table(shell: Shell, base: Path, rows: Path, prompts: dict[str, Path]) -> None:
    printed = shell.ok("eval", "--model", base, "--prompt", prompts["prompt"], "--eval", rows, "--template",
                       "{mr} => {refs}", "--limit", 2, "--max-new-tokens", 3)  # fmt: skip
    for word in ("frozen model", "with the prompt", "BLEU", "chrF", "loss"):
        assert word in printed


# show and convert ----------------------------------------------------------------------------------------------------


def test_show_says_what_a_prompt_is(shell: Shell, base: Path, prompts: dict[str, Path]) -> None:
    prefix = json.loads(shell.ok("show", prompts["prefix"], "--json"))
    assert (prefix["method"], prefix["virtual_tokens"], prefix["shape"]) == ("prefix_tuning", 4, [4, 2 * 2 * 16])
    assert len(prefix["layers"]) == 2
    plain = shell.ok("show", prompts["prompt"])
    assert "--model" in plain
    prompt = json.loads(shell.ok("show", prompts["prompt"], "--model", base, "--nearest", 2, "--json"))
    assert [len(tokens) for tokens in prompt["nearest"]] == [2] * 4
    assert all(-1 <= cosine <= 1 for tokens in prompt["nearest"] for _, cosine in tokens)
    assert "nearest tokens" in shell.ok("show", prompts["prompt"], "--model", base)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_any_prompt_becomes_keys_and_values(
    shell: Shell, tmp_path: Path, base: Path, prompts: dict[str, Path], name: str
) -> None:
    out = tmp_path / "prefix.safetensors"
    model = ("--model", base) if name == "prompt" else ()
    assert str(out) in shell.ok("convert", prompts[name], "--to", "kv", "--out", out, *model)
    expected = SoftPromptModel.from_pretrained(tiny.build("llama"), prompts[name]).fold()
    for pair, other in zip(KV.load(out).layers, expected.layers, strict=True):
        for ours, theirs in zip(pair, other, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert "key-value file" in shell.ok("show", out)


def test_a_folded_prompt_is_a_prefix_that_answers_the_same(
    shell: Shell, tmp_path: Path, base: Path, prompts: dict[str, Path]
) -> None:
    shell.ok("convert", prompts["prompt"], "--to", "prefix", "--out", tmp_path / "prefix", "--model", base)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before, after = (
            SoftPromptModel.from_pretrained(tiny.build("llama"), folder)(input_ids=ids).logits
            for folder in (prompts["prompt"], tmp_path / "prefix")
        )
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def test_pickled_weights_become_safetensors(shell: Shell, tmp_path: Path, prompts: dict[str, Path]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "adapter_config.json").write_text((prompts["prompt"] / "adapter_config.json").read_text())
    tensors = load_file(prompts["prompt"] / "adapter_model.safetensors")
    torch.save(tensors, old / "adapter_model.bin")
    shell.ok("convert", old, "--to", "peft", "--out", new)
    assert torch.equal(load_file(new / "adapter_model.safetensors")["prompt_embeddings"], tensors["prompt_embeddings"])


def test_methods_lists_the_registry(shell: Shell) -> None:
    printed = shell.ok("methods")
    for name in METHODS:
        assert name in printed
    assert "https://arxiv.org/abs/2101.00190" in printed
    assert "--prefix-projection" in printed


# the program ---------------------------------------------------------------------------------------------------------


def test_version_and_help(shell: Shell) -> None:
    assert shell.ok("--version") == f"softprompt {__version__}\n"
    for command in ("train", "generate", "eval", "show", "convert", "methods"):
        assert command in shell.ok("--help")
        assert f"softprompt {command}" in shell.ok(command, "--help")


@pytest.mark.slow
def test_the_installed_program_prints_one_line_on_a_mistake() -> None:
    done = subprocess.run([sys.executable, "-m", "softprompt.cli", "show", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""


def test_ctrl_c_outside_training(shell: Shell, monkeypatch: pytest.MonkeyPatch, prompts: dict[str, Path]) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("softprompt.cli.use.facts_of", interrupted)
    status, _, err = shell.run("show", prompts["prefix"])
    assert (status, len(err.splitlines())) == (130, 1)


def test_a_bug_is_not_dressed_up_as_a_mistake(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, prompts: dict[str, Path]
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("softprompt.cli.use.facts_of", broken)
    with pytest.raises(ZeroDivisionError):
        shell.run("show", prompts["prefix"])
