"""The loops of examples/loops run as they stand, and what they leave can be loaded and used."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import hf_cache
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from softprompt import KV, SoftPromptModel
from softprompt.embedded import PATH

LOOPS = Path(__file__).resolve().parent.parent / "examples" / "loops"
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),  # for want of an accelerator
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),  # TRL sets it
]
PROMPT_BYTES = 200_000  # 16 virtual tokens of the embedded model and its optimiser; the model has 6,300,000


def ran(name: str, out: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run an example in this process; its global names."""
    out.mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", [name, str(out), str(steps)])
    return runpy.run_path(str(LOOPS / name), run_name="__main__")


def loaded(folder: Path) -> SoftPromptModel:
    return SoftPromptModel.from_pretrained(AutoModelForCausalLM.from_pretrained(PATH), folder)


@pytest.mark.parametrize("path", sorted(LOOPS.glob("*.py")), ids=lambda path: path.name)
def test_a_loop_is_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert path.name in (LOOPS / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns, keeps no weight of the base model, and run again it goes on where it was."""
    trainer = ran("trainer.py", tmp_path, 4, monkeypatch)["trainer"]
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and min(losses) < losses[0]
    checkpoint = tmp_path / "checkpoint-4"
    assert all(file.stat().st_size < PROMPT_BYTES for file in checkpoint.iterdir() if "token" not in file.name)
    again = ran("trainer.py", tmp_path, 8, monkeypatch)["trainer"]
    assert again.state.global_step == 8
    steps = [entry["step"] for entry in again.state.log_history if "loss" in entry]
    assert steps == list(range(1, 9))  # the first four are the earlier run's
    best = load_file(Path(again.state.best_model_checkpoint) / "model.safetensors")
    prompt = loaded(tmp_path / "prompt")
    assert torch.equal(prompt.state_dict()["prompt_encoder.default.embedding.weight"],
                       best["prompt_encoder.default.embedding.weight"])  # fmt: skip


@pytest.mark.slow
def test_seq2seq_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ran("seq2seq_trainer.py", tmp_path, 2, monkeypatch)
    assert found["written"].shape == (8, 20)  # Trainer pads
    model, tokenizer, row = found["model"], found["tokenizer"], found["rows"][0]
    inputs = {"input_ids": torch.tensor([row["input_ids"]])}
    expected = model.eval().generate(**inputs, max_length=12, num_beams=2)[0]
    assert found["written"][0][: len(expected)].tolist() == expected.tolist()
    assert set(found["written"][0][len(expected) :].tolist()) <= {tokenizer.pad_token_id}


@pytest.mark.slow
def test_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    found = ran("sft.py", tmp_path, 2, monkeypatch)
    logs = [entry for entry in found["trainer"].state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(0 < entry["loss"] < 6 for entry in logs)
    assert len(found["trainer"].train_dataset) < 64  # rows were packed
    assert loaded(tmp_path / "prompt").peft_config["default"].num_virtual_tokens == 16


@pytest.mark.slow
def test_accelerate_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ran("accelerate_loop.py", tmp_path, 2, monkeypatch)
    assert (tmp_path / "state" / "model.safetensors").stat().st_size < PROMPT_BYTES
    of_state, prompt = loaded(tmp_path / "state").state_dict(), loaded(tmp_path / "prompt").state_dict()
    name = "prompt_encoder.default.embedding.weight"
    now = found["whole"].state_dict()[name]
    assert torch.equal(prompt[name], now) and torch.equal(of_state[name], now)
    with torch.no_grad():
        for parameter in found["whole"].encoder().parameters():
            parameter.zero_()
    found["accelerator"].load_state(str(tmp_path / "state"))
    assert torch.equal(found["whole"].state_dict()[name], prompt[name])


@pytest.mark.slow
def test_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    losses = ran("plain_loop.py", tmp_path, 6, monkeypatch)["losses"]
    assert losses[-1] < losses[0]
    assert "Milo" in capsys.readouterr().out


@pytest.mark.slow
def test_lm_eval_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's log-likelihoods are those of the plain formulation, a prefix in the cache."""
    pytest.importorskip("lm_eval")
    found = ran("lm_eval_task.py", tmp_path, 2, monkeypatch)
    samples = found["found"]["samples"]["cards"]
    assert len(samples) == 12 and 0 <= found["found"]["results"]["cards"]["acc,none"] <= 1
    model, tokenizer = found["model"], found["tokenizer"]
    base, prefix = model.get_base_model(), model.fold()
    rows = [json.loads(line) for line in (tmp_path / "cards.jsonl").read_text(encoding="utf-8").splitlines()]
    for sample in samples[:3]:
        row = rows[sample["doc_id"]]
        for said, answered in zip(row["said"], sample["resps"], strict=True):
            asked = tokenizer(f"{row['card']} =>", return_tensors="pt")["input_ids"]
            answer = tokenizer(f" {said}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            assert math.isclose(float(answered[0][0]), likelihood(base, prefix, asked, answer), rel_tol=1e-4)
    cards = [f"{row['card']} =>" for row in rows[:3]]
    assert written(found["harness"], cards) == [generated(model, tokenizer, card) for card in cards]


def written(harness: Any, texts: list[str]) -> list[str]:
    """What the harness lets a model write behind these texts, of different lengths, in one batch."""
    from lm_eval.api.instance import Instance

    options = {"until": ["@@"], "max_gen_toks": 6}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, options), idx=number)
        for number, text in enumerate(texts)
    ]
    return harness.generate_until(requests)


def generated(model: SoftPromptModel, tokenizer: Any, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def likelihood(base: Any, prefix: KV, asked: Tensor, answer: Tensor) -> float:
    ids = torch.cat([asked, answer], dim=1)
    scores = base(input_ids=ids, **hf_cache.given(base, prefix.to_cache())).logits.log_softmax(-1)
    found = scores[0, asked.shape[1] - 1 : -1].gather(-1, answer[0, :, None])
    return float(found.sum())
