"""Multitask prompt tuning: a batch of rows of several tasks equals every row alone with its task's folded prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import conformance
import naive
import pytest
import tiny
import torch
from conformance import Cell, Row
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt import (
    Embeddings,
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
    initialize_from_text,
)
from softprompt.errors import CheckpointError, ConfigError

TASKS, RANKS = 3, 2
IDS = torch.tensor([2, 0, 2, 1])  # a task twice, and not in order
CELLS = [
    Cell("multitask_prompt_tuning", family, task)
    for family, tasks in {
        "llama": ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
        "gpt2": ("CAUSAL_LM",),
        "mamba": ("CAUSAL_LM",),
        "bert": ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "MASKED_LM"),
        "t5": ("SEQ_2_SEQ_LM",),
        "bart": ("SEQ_2_SEQ_LM",),
    }.items()
    for task in tasks
]


def multitask(cell: Cell, **options: Any) -> SoftPromptModel:
    """A model with a prompt of `TASKS` tasks, all different."""
    config = cell.config()
    options = {"num_tasks": TASKS, "num_ranks": RANKS, **options}
    config = MultitaskPromptTuningConfig(
        task_type=config.task_type, num_virtual_tokens=config.num_virtual_tokens, **options
    )
    model = get_peft_model(conformance.families.build(cell.family, cell.task), config).eval()
    return perturbed(model)


def perturbed(model: SoftPromptModel) -> SoftPromptModel:
    with torch.no_grad():
        for parameter in model.encoder().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def encoder_of(model: SoftPromptModel) -> MultitaskPromptEmbedding:
    encoder = model.encoder()
    assert isinstance(encoder, MultitaskPromptEmbedding)
    return encoder


class Written:
    """What the plain formulation asks of a model, with P* ∘ (u vᵀ) written out."""

    def __init__(self, model: SoftPromptModel) -> None:
        self.get_base_model, self._encoder = model.get_base_model, encoder_of(model)

    def encoder(self) -> Written:
        return self

    def prompt(self, task_ids: Tensor) -> Embeddings:
        task = int(task_ids)
        u, v = self._encoder.prefix_task_cols[task], self._encoder.prefix_task_rows[task]
        weights = sum(torch.outer(u[:, rank], v[rank]) for rank in range(u.shape[1]))
        return Embeddings((self._encoder.embedding.weight * weights)[None])


def four_rows(cell: Cell) -> list[Row]:
    """Rows of the tasks in `IDS`."""
    found = [*conformance.rows(cell), *conformance.rows(cell, seed=1)]
    return [replace(row, task_ids=task[None]) for row, task in zip(found, IDS, strict=True)]


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_mixed_batch_equals_every_row_alone_with_its_folded_prompt(cell: Cell, side: str) -> None:
    model, rows = multitask(cell), four_rows(cell)
    written: Any = Written(model)
    alone = [conformance.alone(cell, written, row) for row in rows]
    output = model(**conformance.with_targets(cell, rows, side))
    together = conformance.together(cell, output, rows, side)
    for got, wanted in zip(together, alone, strict=True):
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], atol=2e-5, rtol=1e-4)
    expected_loss = conformance.loss(cell, alone, rows)
    loss = conformance.loss(cell, together, rows) if output.get("loss") is None else output.loss
    torch.testing.assert_close(loss, expected_loss, atol=2e-5, rtol=1e-4)
    parameters = list(encoder_of(model).parameters())
    gradients = [torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss, expected_loss)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-3)
        assert wanted.abs().max() > 1e-6
    cols = gradients[0][[name for name, _ in encoder_of(model).named_parameters()].index("prefix_task_cols")]
    assert cols.abs().amax((1, 2)).min() > 1e-7  # every task that is there has learnt something


@pytest.mark.pairwise
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_mixed_batch_is_that_of_single_rows(cell: Cell, beams: int) -> None:
    model, rows = multitask(cell), four_rows(cell)
    options: Any = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
    options |= {"num_beams": beams, "num_return_sequences": beams}
    side = "left" if cell.task == "CAUSAL_LM" else "right"
    batch = conformance.collate(cell, rows, side)
    batch.pop("labels", None)
    together = model.generate(**batch, **options)[:, -5:]
    written: Any = Written(model)
    for place, row in enumerate(rows):
        mask = torch.ones(1, len(row.ids), dtype=torch.long)
        single = model.generate(input_ids=row.ids[None], attention_mask=mask, **row.of_task, **options)[:, -5:]
        assert torch.equal(together[place * beams : (place + 1) * beams], single)
        if beams == 1:
            plain = naive.decode if cell.decodes else naive.greedy
            with torch.no_grad():
                assert torch.equal(single, plain(written, row.ids[None], 5, **row.of_task))


def test_vectors_are_those_of_the_task_or_what_all_share() -> None:
    several, one = multitask(CELLS[0]), multitask(CELLS[0], num_tasks=1)
    for task in range(TASKS):
        vectors = several.prompt_vectors(task=task)
        assert vectors is not None
        torch.testing.assert_close(vectors, Written(several).prompt(torch.tensor([task])).vectors[0])
    shared, alone = several.prompt_vectors(), one.prompt_vectors()
    assert shared is not None and torch.equal(shared, encoder_of(several).embedding.weight)
    assert alone is not None and torch.equal(alone, encoder_of(one).task_vectors())
    assert not torch.equal(alone, encoder_of(one).embedding.weight)
    with pytest.raises(ConfigError, match="name task 3"):
        several.prompt_vectors(task=3)


def test_rows_of_different_tasks_differ() -> None:
    model, batch = multitask(CELLS[0]), tiny.ragged()
    with torch.no_grad():
        logits = [model(**batch, task_ids=torch.full((3,), task)).logits for task in range(TASKS)]
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert (logits[1] - logits[2]).abs().max() > 0.1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_task_starts_at_the_shared_prompt(ranks: int) -> None:
    config = MultitaskPromptTuningConfig(token_dim=8, num_virtual_tokens=5, num_tasks=2, num_ranks=ranks)
    encoder = MultitaskPromptEmbedding(config)
    vectors = encoder.prompt(torch.tensor([0, 1])).vectors
    assert torch.equal(vectors, encoder.embedding.weight.expand(2, -1, -1))
    vectors.square().sum().backward()
    gradient = encoder.prefix_task_rows.grad
    assert gradient is not None
    for rank in range(1, min(ranks, 5)):  # ranks that learnt the same would be one
        assert not torch.allclose(gradient[0, 0], gradient[0, rank])


def test_peft_starts_thousands_of_times_smaller() -> None:
    import peft
    from peft.tuners import MultitaskPromptEmbedding as Theirs

    options: Any = {"num_virtual_tokens": 20, "token_dim": 64, "num_tasks": 4, "task_type": "CAUSAL_LM"}
    theirs: Any = Theirs(
        peft.MultitaskPromptTuningConfig(**options, num_transformer_submodules=1), torch.nn.Embedding(9, 64)
    )
    weights = theirs.prefix_task_cols @ theirs.prefix_task_rows
    assert 1 / 6000 < weights.abs().mean() < 1 / 2500


def test_an_embedded_text_is_where_every_task_starts() -> None:
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2, num_ranks=2)
    model, tokenizer = get_peft_model(tiny.build("llama"), config), tiny.tokenizer()
    text = "the cat sat on the mat and the dog ran"
    initialize_from_text(model, tokenizer, text)
    ids = torch.tensor(tokenizer(text)["input_ids"][:4])
    words = model.get_base_model().get_input_embeddings()(ids)
    assert torch.equal(encoder_of(model).task_vectors(1), words)


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (None, "has 3 tasks, so every call needs task_ids"),
        (torch.tensor([0, 3, 1]), "name task 3, but this prompt has tasks 0…2"),
        (torch.tensor([0, -1, 1]), "name task -1"),
        (torch.tensor([0.0, 1.0, 2.0]), "one whole number per row"),
        (torch.tensor([[0, 1, 2]]), "one whole number per row"),
        (torch.tensor([True, False, True]), "one whole number per row"),
        (torch.tensor([0, 1]), "2 rows have a prompt, but the model is called with 3"),
    ],
)
def test_wrong_task_ids(task_ids: Tensor | None, message: str) -> None:
    model, batch = multitask(CELLS[0]), tiny.ragged()
    for call in (model, model.generate):
        options: Any = {} if call is model else {"max_new_tokens": 2, "pad_token_id": tiny.PAD}
        with pytest.raises(ConfigError, match=message):
            call(**batch, task_ids=task_ids, **options)


def test_one_task_needs_no_ids_and_other_methods_take_none() -> None:
    batch = tiny.ragged()
    model = multitask(CELLS[0], num_tasks=1)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch, task_ids=torch.zeros(3, dtype=torch.long)).logits)
    plain = get_peft_model(tiny.build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ConfigError, match="a prompt_tuning prompt has no tasks"):
        plain(**batch, task_ids=torch.zeros(3, dtype=torch.long))
    with torch.no_grad(), model.disable_adapter():
        base = tiny.build("llama")(**batch).logits
        assert torch.equal(model(**batch, task_ids=torch.zeros(3, dtype=torch.long)).logits, base)


# ---- starts from a source --------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    multitask(CELLS[0]).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def from_source(init: str, path: Path | str | None, family: str = "llama", **options: Any) -> SoftPromptModel:
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM",
        **{"num_virtual_tokens": 4, "num_ranks": RANKS, **options},
        prompt_tuning_init=init,
        prompt_tuning_init_state_dict_path=None if path is None else str(path),
    )
    return get_peft_model(tiny.build(family), config)


def as_bin(folder: Path) -> Path:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder.parent / "old.bin")
    return folder.parent / "old.bin"


@pytest.mark.parametrize("form", ["folder", "safetensors", "bin"])
def test_starts_from_a_source(source: Path, form: str) -> None:
    tensors = load_file(source / "adapter_model.safetensors")
    shared, cols, rows = (tensors[name] for name in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"))
    path = {"folder": source, "safetensors": source / "adapter_model.safetensors"}.get(form) or as_bin(source)
    mean = encoder_of(from_source("AVERAGE_SOURCE_TASKS", path))
    torch.testing.assert_close(mean.task_vectors(), shared * (cols.mean(0) @ rows.mean(0)))
    exact = encoder_of(from_source("exact_source_task", path, prompt_tuning_init_task=2, num_tasks=2))
    torch.testing.assert_close(exact.task_vectors(1), shared * (cols[2] @ rows[2]))
    alone = encoder_of(from_source("ONLY_SOURCE_SHARED", path))
    torch.testing.assert_close(alone.task_vectors(), shared)


def test_a_target_adapter_loads_without_its_source(source: Path, tmp_path: Path) -> None:
    model = perturbed(from_source("EXACT_SOURCE_TASK", source, prompt_tuning_init_task=1))
    model.save_pretrained(tmp_path / "target")
    text = (tmp_path / "target" / "adapter_config.json").read_text()
    assert str(tmp_path) not in text.replace(str(model.config.name_or_path), "")
    for file in source.iterdir():
        file.unlink()
    batch = tiny.ragged()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        for trainable in (False, True):
            again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "target", is_trainable=trainable)
            assert torch.equal(again.eval()(**batch).logits, expected)
            assert all(p.requires_grad == trainable for p in again.encoder().parameters())


def test_a_config_that_names_a_file_does_not_have_it_opened(source: Path, tmp_path: Path) -> None:
    """Also where a hostile config claims that the adapter is not for inference."""
    model = from_source("EXACT_SOURCE_TASK", source)
    model.save_pretrained(tmp_path / "target")
    file = tmp_path / "target" / "adapter_config.json"
    text = file.read_text().replace('"RANDOM"', '"EXACT_SOURCE_TASK"').replace("true", "false")
    file.write_text(text.replace('state_dict_path": null', f'state_dict_path": "{tmp_path / "nowhere.bin"}"'))
    again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "target")
    with torch.no_grad():
        batch = tiny.ragged()
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init": "AVERAGE_SOURCE_TASKS", "path": None}, ConfigError, "needs prompt_tuning_init_state_dict_path"),
        ({"init": "RANDOM", "path": "x"}, ConfigError, "reads no source"),
        ({"init": "AVERAGE", "path": "x"}, ConfigError, "choose one of RANDOM"),
        ({"init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": 3}, ConfigError, "the source has 3 tasks"),
        ({"init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": -1}, ConfigError, "must be 0 or more"),
        ({"init": "AVERAGE_SOURCE_TASKS", "num_ranks": 1}, ConfigError, "use the same base model"),
        ({"init": "AVERAGE_SOURCE_TASKS", "num_virtual_tokens": 2}, ConfigError, "use the same base model"),
        ({"init": "AVERAGE_SOURCE_TASKS", "path": "/nowhere/else"}, CheckpointError, "there is no source adapter"),
        ({"init": "RANDOM", "path": None, "num_ranks": 0}, ConfigError, "num_ranks=0"),
        ({"init": "RANDOM", "path": None, "num_tasks": True}, ConfigError, "num_tasks=True"),
        ({"init": "RANDOM", "path": None, "task_names": ["a"], "num_tasks": 2}, ConfigError, "2 different names"),
        ({"init": "TEXT", "path": None}, ConfigError, "needs prompt_tuning_init_text"),
    ],
)
def test_wrong_starts(source: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_source(**{"path": source, **options})


def test_a_source_that_is_no_multitask_prompt(tmp_path: Path) -> None:
    save_file({"prompt_embeddings": torch.ones(4, 32)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="has no prefix_task_cols; give a multitask prompt"):
        from_source("AVERAGE_SOURCE_TASKS", tmp_path / "plain.safetensors")
    assert encoder_of(from_source("ONLY_SOURCE_SHARED", tmp_path / "plain.safetensors")).embedding.weight.eq(1).all()
    save_file({"other": torch.ones(4, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor 'prompt_embeddings'"):
        from_source("ONLY_SOURCE_SHARED", tmp_path / "other.safetensors")
    (tmp_path / "broken.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="damaged"):
        from_source("ONLY_SOURCE_SHARED", tmp_path / "broken.bin")


def test_task_names() -> None:
    config = MultitaskPromptTuningConfig(num_tasks=3, task_names=["rte", "cb", "wic"])
    assert [config.task_number(task) for task in ("cb", "wic", "0", 1)] == [1, 2, 0, 1]
    for task in ("boolq", "3", 3, -1):
        with pytest.raises(ConfigError, match="there are rte, cb, wic"):
            config.task_number(task)
