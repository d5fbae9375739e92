"""What else a folder of PEFT's or ours may hold: pickles, sub-folders, other modules, names, no task type."""

import json
import os
from pathlib import Path
from typing import Any

import peft
import peft_cells
import pytest
import tiny
import torch
from peft_cells import Cell, outputs, randomised
from safetensors.torch import load_file
from torch import Tensor

import softprompt
from softprompt import SoftPromptModel
from softprompt.checkpoint import load_adapter
from softprompt.cli.use import convert_prompt
from softprompt.inspect_prompt import describe, saved_kv

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]
TASKS = {  # a head for each task type, where PEFT runs every method but CPT
    "CAUSAL_LM": "llama",
    "SEQ_2_SEQ_LM": "bart",
    "SEQ_CLS": "bert",
    "TOKEN_CLS": "gpt2",
    "QUESTION_ANS": "gpt2",
    "FEATURE_EXTRACTION": "llama",
}
METHODS = [method for method in peft_cells.METHODS if method != "CPT"]


def pairs(*tasks: str) -> list[tuple[str, str]]:
    """Tasks and methods that PEFT runs together."""
    wanted = [(task, method) for task in tasks for method in peft_cells.METHODS]
    return [(task, method) for task, method in wanted if Cell(method, TASKS[task], task).refusal() is None]


def assert_equal(cell: Cell, *models: Any) -> None:
    first = outputs(cell, models[0])
    for other in models[1:]:
        torch.testing.assert_close(outputs(cell, other), first, atol=1e-5, rtol=1e-5)


def one_part(cell: Cell) -> dict[str, int]:
    return {"num_transformer_submodules": 1} if cell.method == "MULTITASK_PROMPT_TUNING" else {}


@pytest.mark.parametrize(("task", "method"), pairs("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"))
def test_pickles_and_sub_folders(tmp_path: Path, method: str, task: str) -> None:
    cell = Cell(method, TASKS[task], task)
    theirs = randomised(peft.get_peft_model(cell.base(), cell.config(peft, **one_part(cell)), adapter_name="fr"))
    theirs.save_pretrained(str(tmp_path), safe_serialization=False)
    assert "adapter_model.safetensors" not in os.listdir(tmp_path / "fr") and "adapter_model.bin" in os.listdir(
        tmp_path / "fr"
    )
    ours = SoftPromptModel.from_pretrained(cell.base(), tmp_path / "fr", adapter_name="fr")
    inside = SoftPromptModel.from_pretrained(cell.base(), tmp_path, subfolder="fr")
    ours.save_pretrained(tmp_path / "ours")
    assert os.listdir(tmp_path / "ours") == ["fr"]
    again = peft.PeftModel.from_pretrained(cell.base(), str(tmp_path / "ours" / "fr"), adapter_name="fr").eval()
    assert_equal(cell, theirs, ours, inside, again)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_modules_to_save(tmp_path: Path, method: str) -> None:
    """One that the user names, beside the head that the task brings."""
    cell = Cell(method, "bert", "SEQ_CLS")
    theirs = cell.theirs(modules_to_save=["pooler"])
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded = cell.load_ours(tmp_path / "theirs")
    assert_equal(cell, theirs, loaded)
    ours = cell.ours(modules_to_save=["pooler"])
    ours.save_pretrained(tmp_path / "ours")
    assert_equal(cell, ours, cell.load_theirs(tmp_path / "ours"))
    names = [set(load_file(tmp_path / side / "adapter_model.safetensors")) for side in ("ours", "theirs")]
    assert names[0] == names[1]
    assert any("pooler" in name for name in names[0]) and any("classifier" in name for name in names[0])


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), pairs(*TASKS))
def test_auto_classes_find_the_base_model_by_its_name(tmp_path: Path, method: str, task: str) -> None:
    cell = Cell(method, TASKS[task], task)
    cell.base().save_pretrained(tmp_path / "base")
    base = type(cell.base()).from_pretrained(tmp_path / "base")
    ours = randomised(softprompt.get_peft_model(base, cell.config(softprompt)))
    ours.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    name = {
        "CAUSAL_LM": "AutoPeftModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
        "SEQ_CLS": "AutoPeftModelForSequenceClassification",
        "TOKEN_CLS": "AutoPeftModelForTokenClassification",
        "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
    }[task]
    theirs = getattr(peft, name).from_pretrained(str(tmp_path / "ours")).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = getattr(softprompt, name).from_pretrained(tmp_path / "theirs").eval()
    assert_equal(cell, ours, theirs, again)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_task_type_peft_leaves_the_prompt_out(tmp_path: Path, method: str) -> None:
    """Its plain class runs the base model alone; the file carries the prompt all the same, both ways."""
    cell = Cell(method, "bert", "MASKED_LM")
    ours = cell.ours()
    ours.save_pretrained(tmp_path / "ours")
    mapping = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "BertForMaskedLM"
    theirs = cell.load_theirs(tmp_path / "ours")
    batch = cell.batch()
    batch.pop("task_ids", None)
    with torch.no_grad():
        plain = cell.base()(**batch).logits
        assert torch.equal(theirs(**batch).logits, plain)
        assert not torch.allclose(ours(**cell.batch()).logits, plain, atol=0.05)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert_equal(cell, ours, cell.load_ours(tmp_path / "theirs"))


@pytest.mark.parametrize(("task", "method"), pairs("CAUSAL_LM", "SEQ_2_SEQ_LM"))
def test_both_write_the_same_fields(tmp_path: Path, method: str, task: str) -> None:
    cell = Cell(method, TASKS[task], task)
    cell.theirs(**one_part(cell)).save_pretrained(str(tmp_path / "theirs"))
    cell.ours().save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours"))
    theirs["peft_version"] = ours["peft_version"]
    filled = {name for name in ours if theirs.get(name) is None}  # sizes that PEFT's CPT does not write
    if cell.keys and task == "SEQ_2_SEQ_LM":
        assert ours.pop("num_layers") == 2 * theirs.pop("num_layers")  # two pairs per layer, see softprompt.pairs
    assert set(ours) == set(theirs)
    assert {name: ours[name] for name in set(ours) - filled} == {name: theirs[name] for name in set(ours) - filled}


# ---- a prefix of an encoder-decoder without its model ----------------------------------------------------------------


@pytest.mark.parametrize("method", peft_cells.KEYS_AND_VALUES)
@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_prefix_of_an_encoder_decoder_can_be_shown_and_converted(tmp_path: Path, method: str, side: str) -> None:
    """Its checkpoint's pairs are counted right without the model, whoever wrote it."""
    cell = Cell(method, "bart", "SEQ_2_SEQ_LM")
    model = cell.ours() if side == "ours" else cell.theirs()
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = cell.load_ours(tmp_path / "saved")
    kv, expected = saved_kv(load_adapter(tmp_path / "saved")), loaded.encoder().prompt()
    assert kv is not None and len(kv.layers) == len(expected.layers) == 2
    parts: list[tuple[Tensor, Tensor]] = list(zip(sum(kv.layers, ()), sum(expected.layers, ()), strict=True))
    assert all(torch.equal(one, other) for one, other in parts)
    facts = describe(load_adapter(tmp_path / "saved"), tmp_path / "saved")
    assert facts.parameters == sum(one.numel() for one, _ in parts) and len(facts.layers) == 2
    convert_prompt(tmp_path / "saved", "prefix", tmp_path / "prefix", None)
    convert_prompt(tmp_path / "saved", "peft", tmp_path / "peft", None)
    for folder in ("prefix", "peft"):
        assert_equal(cell, model, cell.load_ours(tmp_path / folder), cell.load_theirs(tmp_path / folder))


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_with_a_prompt_of_peft(tmp_path: Path, method: str) -> None:
    """From the very same outputs, and what comes of it is read there; PEFT itself cannot go on with a saved prompt."""
    cell = Cell(method, "bart", "SEQ_2_SEQ_LM")
    theirs = cell.theirs(**one_part(cell))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    trained: Any = SoftPromptModel.from_pretrained(cell.base(), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(outputs(cell, trained.eval()), outputs(cell, theirs), atol=1e-3, rtol=0)
    optimizer = torch.optim.Adam([each for each in trained.parameters() if each.requires_grad], lr=0.1)
    batch = {**cell.batch(), "labels": tiny.ragged((4, 4, 4))["input_ids"]}
    for _ in range(3):
        trained.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.eval().save_pretrained(tmp_path / "ours")
    assert_equal(cell, trained, cell.load_theirs(tmp_path / "ours"))
    assert not torch.allclose(outputs(cell, trained), outputs(cell, theirs), atol=1e-2)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(cell.base(), str(tmp_path / "ours"), is_trainable=True)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_a_prompt_that_is_written_twice_is_shown_once(tmp_path: Path, method: str) -> None:
    cell = Cell(method, "bart", "SEQ_2_SEQ_LM")
    ours = cell.ours()
    ours.save_pretrained(tmp_path)
    facts = describe(load_adapter(tmp_path), tmp_path)
    tasks = 2 * 2 * (peft_cells.TOKENS + 32) if method == "MULTITASK_PROMPT_TUNING" else 0
    assert facts.parameters == 32 * peft_cells.TOKENS + tasks and facts.head_parameters == 0
    assert facts.shape == (peft_cells.TOKENS, 32) and len(facts.token_norms) == peft_cells.TOKENS
