"""A batch whose rows have different prompts: each row gets what it gets alone, and never sees another row's prompt."""

from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptStore,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)
from softprompt.errors import ConfigError, RowsError, UnsupportedError

PLAIN: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}
NAMES = ["words", "kv", "__base__", "mlp", "words", "ffn", "task"]
TASKS = torch.tensor([0, 0, 0, 0, 0, 0, 1])
LENGTHS = (5, 3, 6, 1, 6, 4, 5)


def mixed(kind: str, task: str = "CAUSAL_LM") -> SoftPromptModel:
    """A base model with adapters of five methods and four lengths."""
    base = families.build(kind, task)
    shared: dict[str, Any] = {"task_type": task}
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=4, **shared), "words")
    model.add_adapter("kv", PrefixTuningConfig(num_virtual_tokens=6, **shared))
    ffn = PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8, **shared)
    model.add_adapter("ffn", ffn)
    model.add_adapter("mlp", PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **shared))
    model.add_adapter("task", MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, **shared))
    torch.manual_seed(5)
    for parameter in model.prompt_encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def alone(model: SoftPromptModel, name: str, task: int, **inputs: Tensor) -> Any:
    """What a row gets from a model whose only prompt is its own."""
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs)
    model.set_adapter(name, inference_mode=not model.training)
    return model(**inputs, **({"task_ids": torch.tensor([task])} if name == "task" else {}))


def rows(batch: dict[str, Tensor]) -> list[Tensor]:
    return [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def trainable(model: SoftPromptModel) -> list[torch.nn.Parameter]:
    model.prompt_encoder.requires_grad_(True)
    return list(model.prompt_encoder.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral_window", "gemma3", "opt", "bloom", "mpt", "gptj"])
def test_each_row_gets_what_it_gets_alone(kind: str, side: str) -> None:
    model = mixed(kind)
    batch = tiny.ragged(LENGTHS, side=side)
    result = model(**batch, adapter_names=NAMES, task_ids=TASKS)
    for row, (ids, name) in enumerate(zip(rows(batch), NAMES, strict=True)):
        expected = alone(model, name, int(TASKS[row]), input_ids=ids).logits[0]
        got = result.logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_loss_and_every_gradient(kind: str, side: str) -> None:
    """The mean over all labels of what each row's tokens cost alone."""
    model = mixed(kind)
    parameters = trainable(model)
    batch = tiny.ragged(LENGTHS, side=side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0][batch["attention_mask"][0].bool().nonzero()[0]] = -100  # one whose first token does not count
    loss = model(**batch, labels=labels, adapter_names=NAMES, task_ids=TASKS).loss
    total, count = torch.zeros(()), 0
    for row, (ids, name) in enumerate(zip(rows(batch), NAMES, strict=True)):
        own = labels[row][batch["attention_mask"][row].bool()][None]
        trainable(model)
        counted = own if name in ("words", "mlp", "task") else own[:, 1:]
        number = int((counted != -100).sum())
        model.active_adapter = name if name != "__base__" else model.active_adapter
        if number:
            if name == "__base__":
                logits = alone(model, name, 0, input_ids=ids).logits[0, :-1]
                each = cross_entropy(logits, own[0, 1:])
            else:
                more = {"task_ids": torch.tensor([int(TASKS[row])])} if name == "task" else {}
                each = model(input_ids=ids, labels=own, **more).loss
            total, count = total + number * each, count + number
    expected = total / count
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert sum(each is not None for each in got) >= 9
    for mine, theirs in zip(got, wanted, strict=True):
        mine, theirs = (torch.zeros(()) if each is None else each for each in (mine, theirs))
        torch.testing.assert_close(mine, theirs.expand_as(mine), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral_window"])
def test_generate(kind: str, beams: int) -> None:
    model = mixed(kind)
    batch = tiny.ragged(LENGTHS, side="left")
    got = model.generate(**batch, adapter_names=NAMES, task_ids=TASKS, num_beams=beams, **PLAIN)[:, -5:]
    for row, (ids, name) in enumerate(zip(rows(batch), NAMES, strict=True)):
        task = {"task_ids": TASKS[row : row + 1]} if name == "task" else {}
        expected = model.generate(input_ids=ids, adapter_names=[name], num_beams=beams, **task, **PLAIN)[0, -5:]
        assert torch.equal(got[row], expected), name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_row_never_sees_another_rows_prompt(kind: str) -> None:
    """NaN in one row's prompt: all other rows stay bit for bit as they were."""
    model = mixed(kind)
    model.add_adapter("bad", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.add_adapter("worse", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    batch, names = tiny.ragged(LENGTHS, side="left"), [*NAMES]
    names[1], names[4] = "worse", "bad"
    before = model(**batch, adapter_names=names, task_ids=TASKS).logits
    sequences = model.generate(**batch, adapter_names=names, task_ids=TASKS, **PLAIN)
    for name in ("bad", "worse"):
        model.encoder(name).embedding.weight.data.fill_(float("nan"))
    model.folds.clear()  # writing to .data leaves no trace
    after = model(**batch, adapter_names=names, task_ids=TASKS).logits
    again = model.generate(**batch, adapter_names=names, task_ids=TASKS, **PLAIN)
    for row, name in enumerate(names):
        if name in ("bad", "worse"):
            assert after[row][batch["attention_mask"][row].bool()].isnan().all()
        else:
            assert torch.equal(after[row], before[row]) and torch.equal(again[row], sequences[row]), name


def test_rows_of_one_adapter_and_another_than_the_active_one() -> None:
    model, batch = mixed("llama"), tiny.ragged((3, 5), side="left")
    model.set_adapter("words")
    got = model(**batch, adapter_names=["kv", "kv"]).logits
    model.set_adapter("kv")
    assert torch.equal(got, model(**batch).logits)
    with model.disable_adapter():
        plain = model(**batch).logits
    assert torch.equal(model(**batch, adapter_names=["__base__"] * 2).logits, plain)


def test_adapters_train_together() -> None:
    """Rows of two adapters in one batch: each adapter's gradient is that of its own rows."""
    model, ids = mixed("gpt2"), torch.randint(3, 50, (4, 6))
    parameters = trainable(model)
    names = ["words", "kv", "kv", "words"]
    loss = model(input_ids=ids, labels=ids.clone().index_fill_(1, torch.tensor([0]), -100), adapter_names=names).loss
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert [each is not None for each in got].count(True) == 2


# ---- heads, encoders, encoder-decoders ---------------------------------------------------------------------------


def test_rows_go_through_the_heads_of_their_own_adapters() -> None:
    base = families.build("bert", "SEQ_CLS")
    model = get_peft_model(base, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), "first")
    model.add_adapter("second", PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    torch.manual_seed(2)
    for parameter in [*model.prompt_encoder.parameters(), *model.heads.parameters()]:
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval()
    batch, names = tiny.ragged((4, 6, 2), side="right"), ["second", "__base__", "first"]
    got = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        each = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(got[row : row + 1], alone(model, name, 0, **each).logits, atol=1e-5, rtol=1e-4)


WITHOUT_FOLD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "FEATURE_EXTRACTION", {}),
    "roberta": ("roberta", "TOKEN_CLS", {}),
    "after_bos": ("gpt2", "CAUSAL_LM", {"placement": "after_bos"}),
    "mamba": ("mamba", "CAUSAL_LM", {}),
    "jamba": ("jamba", "CAUSAL_LM", {}),
    "t5": ("t5", "SEQ_2_SEQ_LM", {}),
    "bart": ("bart", "SEQ_2_SEQ_LM", {}),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", WITHOUT_FOLD)
def test_vectors_in_the_rows_beside_keys_and_values(case: str, side: str) -> None:
    """Where vectors cannot be folded, some rows have those and others keys and values, of different lengths."""
    family, task, more = WITHOUT_FOLD[case]
    shared: dict[str, Any] = {"task_type": task}
    model = get_peft_model(
        families.build(family, task), PromptTuningConfig(num_virtual_tokens=4, **shared, **more), "words"
    )
    mlp = PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **shared, **more)
    model.add_adapter("mlp", mlp)
    if family != "mamba":
        model.add_adapter("kv", PrefixTuningConfig(num_virtual_tokens=3, **shared))
    torch.manual_seed(5)
    for parameter in model.prompt_encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval()
    names = ["words", "__base__", "mlp", "mlp" if family == "mamba" else "kv", "words"]
    batch = tiny.ragged((5, 3, 6, 2, 4), side=side)
    rest = {"decoder_input_ids": torch.randint(3, 50, (5, 4))} if task == "SEQ_2_SEQ_LM" else {}
    got = model(**batch, **rest, adapter_names=names)[0]
    for row, (ids, name) in enumerate(zip(rows(batch), names, strict=True)):
        real = slice(None) if rest else batch["attention_mask"][row].bool()
        expected = alone(model, name, 0, input_ids=ids, **{key: value[row : row + 1] for key, value in rest.items()})
        torch.testing.assert_close(got[row][real], expected[0][0], atol=2e-5, rtol=1e-4)
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and side == "left":
        got = model.generate(**batch, adapter_names=names, num_beams=2, **PLAIN)[:, -5:]
        for row, (ids, name) in enumerate(zip(rows(batch), names, strict=True)):
            expected = model.generate(input_ids=ids, adapter_names=[name], num_beams=2, **PLAIN)[0, -5:]
            assert torch.equal(got[row], expected), name


def test_prompts_that_stand_at_different_places_are_refused_together() -> None:
    model = get_peft_model(
        families.build("gpt2", "CAUSAL_LM"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "front"
    )
    behind = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, placement="after_bos")
    model.add_adapter("behind", behind)
    with pytest.raises(ConfigError, match="'after_bos' and 'front' cannot share a batch"):
        model(**tiny.ragged((3, 4), side="left"), adapter_names=["front", "behind"])


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_unknown_adapters_fail_their_own_rows_before_anything_runs() -> None:
    model, ids = mixed("gpt2"), torch.randint(3, 50, (3, 4))
    ran: list[Any] = []
    handle = model.get_base_model().register_forward_hook(lambda *_: ran.append(1))
    for call in (model, model.generate):
        with pytest.raises(RowsError, match=r"row 0 \(and rows 2\): there is no adapter named 'x'") as caught:
            call(input_ids=ids, adapter_names=["x", "kv", "y"])
        assert sorted(caught.value.errors) == [0, 2] and not ran
    handle.remove()


@pytest.mark.parametrize(
    ("names", "says"),
    [(["kv"], "1 adapter_names and 3 rows"), ("kv", "list"), ([], "list"), ([1, 2, 3], "list")],
)
def test_names_that_are_not_one_per_row(names: Any, says: str) -> None:
    model, ids = mixed("gpt2"), torch.randint(3, 50, (3, 4))
    for call in (model, model.generate):
        with pytest.raises(ConfigError, match=says):
            call(input_ids=ids, adapter_names=names)


def test_a_loss_that_counts_the_prompt_has_a_batch_of_its_own() -> None:
    model, ids = mixed("gpt2"), torch.randint(3, 50, (2, 4))
    cpt = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4])
    model.add_adapter("cpt", cpt)
    assert model(input_ids=ids, adapter_names=["cpt", "kv"]).logits.shape[:2] == (2, 4)
    with pytest.raises(RowsError, match="counts the answers in its prompt"):
        model(input_ids=ids, labels=ids, adapter_names=["cpt", "kv"])
    assert isinstance(next(iter(_errors(model, ids).values())), UnsupportedError)


def _errors(model: SoftPromptModel, ids: Tensor) -> dict[int, Any]:
    with pytest.raises(RowsError) as caught:
        model(input_ids=ids, labels=ids, adapter_names=["cpt", "kv"])
    return caught.value.errors


# ---- a store -------------------------------------------------------------------------------------------------------


def test_rows_of_a_store(tmp_path: Path) -> None:
    """The prompts of a store serve as the adapters they were saved from; a damaged one fails its rows alone."""
    model, batch = mixed("llama"), tiny.ragged(LENGTHS, side="left")
    expected = model.generate(**batch, adapter_names=NAMES, task_ids=TASKS, **PLAIN)
    logits = model(**batch, adapter_names=NAMES, task_ids=TASKS).logits
    model.save_pretrained(tmp_path)
    served = get_peft_model(
        families.build("llama", "CAUSAL_LM"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    ).eval()
    served.attach(PromptStore(tmp_path))
    for _ in range(2):
        assert torch.equal(served.generate(**batch, adapter_names=NAMES, task_ids=TASKS, **PLAIN), expected)
        torch.testing.assert_close(served(**batch, adapter_names=NAMES, task_ids=TASKS).logits, logits)
    (tmp_path / "kv" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RowsError) as caught:
        served.generate(**batch, adapter_names=NAMES, task_ids=TASKS, **PLAIN)
    assert list(caught.value.errors) == [1]
    good = [row for row in range(len(NAMES)) if row not in caught.value.errors]
    rest = {name: values[good] for name, values in batch.items()}
    names = [NAMES[row] for row in good]
    got = served.generate(**rest, adapter_names=names, task_ids=TASKS[good], **PLAIN)
    assert torch.equal(got[:, -5:], expected[good, -5:])


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_a_rows_first_token_is_predicted_through_its_own_head(frozen: bool) -> None:
    """A head for words is part of what the last virtual token predicts, whichever adapter is active."""
    model = get_peft_model(
        tiny.build("llama"), PromptTuningConfig(num_virtual_tokens=4, modules_to_save=["lm_head"]), "first"
    )
    model.add_adapter("second", PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["lm_head"]))
    model.add_adapter("third", PromptTuningConfig(num_virtual_tokens=5))
    torch.manual_seed(2)
    for parameter in model.heads.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    if frozen:
        model.eval().requires_grad_(False)
    for names in (["second", "__base__", "third", "first"], ["second"] * 4, ["third"] * 4):
        batch = tiny.ragged((4, 4, 4, 4))
        loss = model(**batch, labels=batch["input_ids"], adapter_names=names).loss
        total, count = torch.zeros(()), 0
        for row, name in enumerate(names):
            each = {key: value[row : row + 1] for key, value in batch.items()}
            labels = 3 if name == "__base__" else 4
            total += labels * alone(model, name, 0, **each, labels=each["input_ids"]).loss.detach()
            count += labels
        torch.testing.assert_close(loss.detach(), total / count)
