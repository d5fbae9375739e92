"""`softprompt train` on encoder-decoders: a tiny T5 from a folder, trained, saved, resumed, evaluated, asked."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from families import build
from tiny import tokenizer

from softprompt import ConfigError, DataError
from softprompt.cli import main
from softprompt.data import Example, encode_pairs
from softprompt.recipe import Recipe
from softprompt.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its tokenizer, training and held-out data."""
    place = tmp_path_factory.mktemp("seq2seq")
    base = build("t5", "SEQ_2_SEQ_LM")
    base.save_pretrained(place / "t5")
    tokenizer().save_pretrained(place / "t5")
    rows = [
        {"input": f"the {a} {b}", "target": f"{b} {a}"} for a in ("cat", "dog", "mat") for b in ("sat", "ran", "by")
    ]
    for name in ("train", "eval"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def recipe(folder: Path, out: Path, **more: object) -> Recipe:
    settings = {"task": "SEQ_2_SEQ_LM", "model": str(folder / "t5"), "train": str(folder / "train.jsonl"),
                "eval": str(folder / "eval.jsonl"), "out": str(out), "num_virtual_tokens": 4, "steps": 12,
                "batch_size": 4, "learning_rate": 0.1, "samples": 2, "max_new_tokens": 4}  # fmt: skip
    return Recipe.from_dict({**settings, **more})


@pytest.mark.slow
@pytest.mark.parametrize("init", ["examples", "random"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt_tuning", {}),
        ("p_tuning", {"encoder_hidden_size": 8}),
        ("prefix_tuning", {}),
        ("prefix_tuning", {"cross_prefix": True, "encoder_prefix": True}),
    ],
    ids=["prompt_tuning", "p_tuning", "prefix", "three_prefixes"],
)
def test_a_run_learns_and_its_prompt_answers_from_the_shell(
    folder: Path, tmp_path: Path, method: str, options: dict[str, object], init: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    result = train(recipe(folder, out, method=method, init=init, method_options=options))
    assert result.best["loss"] < result.start["loss"]
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    samples = json.loads((out / "samples.json").read_text())
    capsys.readouterr()
    assert main(["generate", "--prompt", str(out), "--input", samples[0]["input"], "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() == samples[0]["after"]
    assert main(["eval", "--prompt", str(out), "--eval", str(folder / "eval.jsonl"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["prompt"]["loss"] == pytest.approx(result.best["loss"], rel=1e-4)
    assert scores["frozen"]["loss"] == pytest.approx(result.frozen["loss"], rel=1e-4)


def test_the_wrong_task_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is an encoder-decoder; use task: SEQ_2_SEQ_LM"):
        train(recipe(folder, tmp_path / "one", task="CAUSAL_LM"))
    tiny.build("llama").save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"is no encoder-decoder; use task: CAUSAL_LM"):
        train(recipe(folder, tmp_path / "two", model=str(tmp_path / "llama")))


def test_sources_and_targets_end_as_the_tokenizer_says() -> None:
    plain = tokenizer()
    row = encode_pairs([Example("the cat", ("sat",))], plain, 20, 20)[0]
    assert row.input_ids == plain("the cat")["input_ids"]
    assert row.labels == [*plain("sat")["input_ids"], plain.eos_token_id]
    with pytest.raises(DataError, match=r"its target takes \d+ tokens, but there is room for 1"):
        encode_pairs([Example("the cat", ("sat on the mat",), where="line 3")], plain, 20, 1)


@pytest.mark.slow
def test_resumed_run_equals_one_in_a_piece(folder: Path, tmp_path: Path) -> None:
    from softprompt.errors import RunInterrupted

    whole = train(recipe(folder, tmp_path / "whole", method="prompt_tuning"))

    class Stop(Exception):
        pass

    def stop(row: dict[str, object]) -> None:
        if row["step"] == 6:
            raise Stop

    with pytest.raises((Stop, RunInterrupted)):
        train(recipe(folder, tmp_path / "parts", method="prompt_tuning", save_steps=5), on_step=stop)
    resumed = train(recipe(folder, tmp_path / "parts", method="prompt_tuning", save_steps=5), resume=True)
    assert resumed.best == whole.best
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])
