"""A really trained encoder-decoder: Arabic names in Latin letters, written as a few names ask for.

Prompts are trained, saved, loaded in another process and used there, with equal outputs; PEFT runs those it knows.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from softprompt import PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
NAMES = {  # with the vowels that the model leaves out
    "محمد": "muhammad",
    "سالم": "salim",
    "فاطمة": "fatima",
    "خالد": "khalid",
    "كريم": "karim",
    "حسن": "hasan",
    "نورة": "nura",
    "طارق": "tariq",
}
UNSEEN = ("آتزمون", "أحمد", "مريم", "صالح")
STEPS = 30
METHODS: dict[str, tuple[Any, float]] = {
    "prompt_tuning": (PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=8), 0.1),
    "prefix of the decoder": (PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=8), 0.1),
    "three prefixes": (
        PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=8, cross_prefix=True, encoder_prefix=True),
        0.1,
    ),
}
OTHER_PROCESS = """
import json
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from softprompt import SoftPromptModel

folder, adapters, names = sys.argv[1], *map(json.loads, sys.argv[2:])
torch.set_num_threads(1)
batch = AutoTokenizer.from_pretrained(folder)(names, padding=True, return_tensors="pt")
batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
for adapter in adapters:
    model = SoftPromptModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), adapter)
    tokens = model.generate(**batch, max_new_tokens=20)
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=tokens).logits
    save_file({"tokens": tokens, "logits": logits.contiguous()}, adapter + "/outputs.safetensors")
"""


@pytest.fixture(scope="module")
def folder(assets: Path) -> Path:
    place = assets / "models" / "aren-transliteration-seq2seq"
    if not place.is_dir():
        pytest.skip(f"no model in {place.name}")
    return place


def base(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder)


def encode(folder: Path, names: list[str]) -> dict[str, Tensor]:
    batch = AutoTokenizer.from_pretrained(folder)(names, padding=True, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def train(folder: Path, model: SoftPromptModel, rate: float) -> list[float]:
    """The loss at every step, on all names at once."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = encode(folder, list(NAMES))
    targets = tokenizer([name + tokenizer.eos_token for name in NAMES.values()], padding=True, return_tensors="pt")
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=rate)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def written(folder: Path, model: Any, names: list[str]) -> list[str]:
    tokens = model.generate(**encode(folder, names), max_new_tokens=20)
    return AutoTokenizer.from_pretrained(folder).batch_decode(tokens, skip_special_tokens=True)


def test_the_model_writes_what_its_source_says(folder: Path) -> None:
    assert written(folder, base(folder), ["آتزمون", "آتشيسون"]) == ["atzmon", "achison"]


@pytest.mark.slow
def test_train_save_load_in_another_process(tmp_path: Path, folder: Path) -> None:
    """One other process loads the prompts of every kind."""
    names, models = [*NAMES, *UNSEEN], {}
    for method in METHODS:
        models[method] = trained(folder, method, names)
        models[method].save_pretrained(tmp_path / method)
    places = [str(tmp_path / method) for method in METHODS]
    command = [sys.executable, "-c", OTHER_PROCESS, str(folder), json.dumps(places), json.dumps(names)]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parent.parent, capture_output=True)
    for method, model in models.items():
        check_loaded(folder, tmp_path / method, model, names, by_peft=method != "three prefixes")


def trained(folder: Path, method: str, names: list[str]) -> SoftPromptModel:
    config, rate = METHODS[method]
    torch.manual_seed(0)
    model = get_peft_model(base(folder), config).eval()
    losses = train(folder, model, rate)
    assert losses[-1] < 0.7 * losses[0], method
    assert written(folder, model, names) != written(folder, base(folder), names)
    with model.disable_adapter():
        assert written(folder, model, names) == written(folder, base(folder), names)
    return model


def check_loaded(folder: Path, place: Path, model: SoftPromptModel, names: list[str], by_peft: bool) -> None:
    """What the other process found is what this one finds, and what PEFT does where it knows the prompt."""
    found, batch = load_file(place / "outputs.safetensors"), encode(folder, names)
    tokens = model.generate(**batch, max_new_tokens=20)
    assert torch.equal(tokens, found["tokens"])
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=tokens).logits
    torch.testing.assert_close(logits, found["logits"], atol=1e-5, rtol=0)
    for name, row in zip(names, tokens, strict=True):  # a batch is its single rows
        alone = model.generate(**encode(folder, [name]), max_new_tokens=20)[0]
        assert torch.equal(row[: len(alone)], alone)
    if not by_peft:
        return
    theirs: Any = peft.PeftModel.from_pretrained(base(folder), str(place)).eval()
    # PEFT looks source words up in the decoder's table; in this model the encoder has one of its own
    assert not torch.equal(theirs.word_embeddings.weight, theirs.get_encoder().embed_tokens.weight)
    theirs.word_embeddings = theirs.get_encoder().embed_tokens
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch, decoder_input_ids=tokens).logits, logits, atol=1e-4, rtol=1e-6)
    assert torch.equal(theirs.generate(**batch, max_new_tokens=20), tokens)
