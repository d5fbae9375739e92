"""Every method × gpt2, llama, t5, bart and bert × every head, saved by PEFT and loaded here, and the way back.

Equal outputs, head included, and equal greedy tokens. Where PEFT cannot run a cell the test holds it to that, and the
file still carries the prompt.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import peft_cells
import pytest
import torch
from peft_cells import Cell, generated, outputs
from torch import Tensor

import softprompt
from softprompt import SoftPromptModel
from softprompt.errors import CheckpointError, UnsupportedError

pytestmark = [  # PEFT's own, on every use
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

CELLS = list(peft_cells.cells())
SHARED_CACHE = [cell for cell in CELLS if cell.shares_cache]
RUNS = [cell for cell in CELLS if cell.refusal() is None]
COMPARED = [cell for cell in RUNS if cell not in SHARED_CACHE]
REFUSED = [cell for cell in CELLS if cell.refusal() is not None]
each = pytest.mark.parametrize("cell", COMPARED, ids=str)


def assert_same(cell: Cell, one: Any, *others: Any) -> None:
    plain = cell.base()
    batch = cell.batch()
    batch.pop("task_ids", None)
    with torch.no_grad():
        before = peft_cells.real(cell, plain(**batch, return_dict=True), batch)
    found = outputs(cell, one)
    assert (found - before).abs().max() > 0.05, "the prompt must matter for the comparison to mean anything"
    for other in others:
        torch.testing.assert_close(found, outputs(cell, other), atol=1e-5, rtol=0)
    if cell.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        several = [each for each in (one, *others) if not (peft_cells.LAGS and isinstance(each, peft.PeftModel))]
        tokens = [generated(cell, each) for each in several]
        assert all(torch.equal(tokens[0], each) for each in tokens)


def test_the_grid_has_every_method_and_task_of_both_libraries() -> None:
    ours = {method.peft_type for method in softprompt.METHODS.values() if method.__module__.startswith("softprompt.")}
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    theirs = {kind.value for kind, config in mapping.items() if issubclass(config, peft.PromptLearningConfig)}
    assert set(peft_cells.METHODS) == ours
    assert ours == theirs - {"ADAPTION_PROMPT"}
    tasks = {cell.task for cell in COMPARED}
    assert tasks == {task.value for task in peft.TaskType}


def test_the_page_about_peft_shows_the_grid(root: Path) -> None:
    shown = (root / "docs" / "peft.md").read_text().partition("<!-- grid -->\n")[2].partition("\n<!-- /grid -->")[0]
    assert shown.splitlines() == peft_cells.grid()


@pytest.mark.pairwise
@each
def test_from_peft(tmp_path: Path, cell: Cell) -> None:
    one_part = {"num_transformer_submodules": 1} if cell.method == "MULTITASK_PROMPT_TUNING" else {}  # see below
    theirs = cell.theirs(**one_part)
    theirs.save_pretrained(tmp_path)
    assert_same(cell, cell.load_ours(tmp_path), theirs)


@pytest.mark.pairwise
@each
def test_to_peft(tmp_path: Path, cell: Cell) -> None:
    """And PEFT takes the file without a word."""
    ours = cell.ours()
    ours.save_pretrained(tmp_path)
    theirs = cell.load_theirs(tmp_path)
    theirs.save_pretrained(str(tmp_path / "back"))
    assert_same(cell, ours, theirs, cell.load_ours(tmp_path), cell.load_ours(tmp_path / "back"))


@pytest.mark.pairwise
@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_peft_refuses(tmp_path: Path, cell: Cell) -> None:
    """What PEFT cannot run runs here, unless it cannot be; a file of ours loads there, and one of theirs here."""
    refusal = cell.refusal()
    assert refusal is not None
    when, error, words = refusal
    if when == "make":
        with pytest.raises(error, match=words):
            cell.theirs()
        if cell.method == "CPT":
            with pytest.raises(UnsupportedError, match="CPT"):
                cell.ours()
        else:
            assert torch.isfinite(outputs(cell, cell.ours())).all()
        return
    theirs = cell.theirs()
    with pytest.raises(error, match=words):
        outputs(cell, theirs)
    ours = cell.ours()
    assert torch.isfinite(outputs(cell, ours)).all()
    ours.save_pretrained(tmp_path / "ours")
    again = cell.load_theirs(tmp_path / "ours")
    assert torch.equal(prompt_of(again), ours.encoder().saved_tensors()["prompt_embeddings"])
    if cell not in SHARED_CACHE:
        theirs.save_pretrained(str(tmp_path / "theirs"))
        assert torch.equal(
            cell.load_ours(tmp_path / "theirs").encoder().saved_tensors()["prompt_embeddings"], prompt_of(theirs)
        )


def prompt_of(theirs: Any) -> Tensor:
    if theirs.peft_config["default"].inference_mode:
        return theirs.prompt_encoder["default"].embedding.weight.detach()
    return theirs.get_prompt_embedding_to_save("default")


# ---- prefixes on encoder-decoders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", SHARED_CACHE, ids=str)
def test_a_prefix_in_a_cache_that_both_attentions_share_is_refused(tmp_path: Path, cell: Cell) -> None:
    """For these heads PEFT writes `num_transformer_submodules=1` and gives an encoder-decoder a decoder's cache."""
    cell.theirs().save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="num_transformer_submodules=1 for an encoder-decoder"):
        cell.load_ours(tmp_path)


FEATURES = [cell for cell in SHARED_CACHE if cell.task == "FEATURE_EXTRACTION"]


@pytest.mark.parametrize("cell", FEATURES, ids=str)
def test_in_a_shared_cache_peft_lets_tokens_see_what_follows_them(cell: Cell) -> None:
    """Cross-attention reads the decoder's own tokens out of it, later ones too."""
    first = cell.batch()["decoder_input_ids"]
    other = torch.cat([first[:, :-1], first[:, -1:] + 1], dim=1)
    before = torch.arange(len(first) * 4) % 4 < 3  # all tokens but each row's last
    theirs, ours = (
        [outputs(cell, model, decoder_input_ids=ids)[before] for ids in (first, other)]
        for model in (cell.theirs(), cell.ours())
    )
    assert (theirs[0] - theirs[1]).abs().max() > 1e-2
    torch.testing.assert_close(ours[0], ours[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("cell", FEATURES, ids=str)
def test_with_a_cache_for_each_attention_features_are_equal(tmp_path: Path, cell: Cell) -> None:
    theirs = cell.theirs(num_transformer_submodules=2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert_same(cell, cell.load_ours(tmp_path / "theirs"), theirs)
    ours = cell.ours()
    ours.save_pretrained(tmp_path / "ours")
    assert_same(cell, ours, cell.load_theirs(tmp_path / "ours"))


@pytest.mark.parametrize("method", peft_cells.KEYS_AND_VALUES)
def test_peft_answers_t5_questions_with_the_encoder_alone(method: str) -> None:
    """So there is nothing to be equal to."""
    cell = Cell(method, "t5", "QUESTION_ANS")
    theirs, ours = cell.theirs(num_transformer_submodules=2), cell.ours()
    before = [outputs(cell, model) for model in (theirs, ours)]
    for model in (theirs, ours):
        torch.nn.init.zeros_(model.get_base_model().decoder.final_layer_norm.weight)
    assert torch.equal(outputs(cell, theirs), before[0])
    assert not torch.equal(outputs(cell, ours), before[1])


@pytest.mark.pairwise
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("method", peft_cells.KEYS_AND_VALUES)
def test_pairs_are_dealt_to_any_number_of_layers(tmp_path: Path, method: str, layers: int) -> None:
    """In PEFT layer i has pair 2i mod m, so an even number of layers shares; here every layer has its own."""
    from transformers import BartConfig, BartForConditionalGeneration

    options = {**peft_cells.families.FAMILIES["bart"].options, "decoder_layers": layers}
    torch.manual_seed(0)
    base = BartForConditionalGeneration(BartConfig(**options)).eval()

    class Deep(Cell):
        def base(self) -> Any:
            return copy.deepcopy(base)

    cell = Deep(method, "bart", "SEQ_2_SEQ_LM")
    theirs = cell.theirs(num_layers=layers)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert_same(cell, cell.load_ours(tmp_path / "theirs"), theirs)
    ours = cell.ours()
    ours.save_pretrained(tmp_path / "ours", keep_encoder=True)
    again = SoftPromptModel.from_pretrained(cell.base(), tmp_path / "ours", is_trainable=True).eval()
    assert_same(cell, ours, cell.load_theirs(tmp_path / "ours"), again)
    assert again.encoder().config.num_layers == layers
    pairs = again.encoder().saved_vectors().unflatten(1, (layers, -1))
    assert len({tuple(pair.flatten().tolist()) for pair in pairs.unbind(1)}) == layers
