"""CPT: PEFT's numbers where PEFT is right, the plain formulation everywhere, radii that hold, answers in the loss."""

import copy
import pickle
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import tiny
import torch
from cli_kit import ROWS, Shell, save_base, write_rows
from torch import Tensor
from torch.nn.functional import cross_entropy

import softprompt
from softprompt import (
    ConfigError,
    CPTConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
    initialize_from_text,
)
from softprompt.data import Encoded
from softprompt.evaluate import evaluate_loss
from softprompt.methods.cpt import context_of
from softprompt.running.context_loss import answer_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

TYPES = [1, 2, 2, 3, 4, 4, 0, 5, 6, 7, 8, 8]  # two examples; the answers are tokens 4, 5 and 10, 11
IDS = [17, 40, 41, 60, 90, 91, 5, 17, 55, 60, 92, 93]
P = len(IDS)
FORMAT, INPUT = 0.3, 0.5
OPTIONS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": IDS,
    "cpt_tokens_type_mask": TYPES,
    "opt_projection_epsilon": INPUT,
    "opt_projection_format_epsilon": FORMAT,
}
DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}
LOSSES = {"none": {}, "decay": DECAY}


def config(library: Any = softprompt, **options: Any) -> Any:
    return library.CPTConfig(**{**OPTIONS, **options})


def labelled(side: str = "right", lengths: tuple[int, ...] = (5, 9, 7)) -> dict[str, Tensor]:
    """Rows whose last three tokens have labels."""
    batch = tiny.ragged(lengths, side=side)
    behind = batch["attention_mask"].flip(1).cumsum(1).flip(1)
    wanted = (batch["attention_mask"] == 1) & (behind <= 3)
    return {**batch, "labels": batch["input_ids"].where(wanted, -100)}


def train(model: Any, batch: dict[str, Tensor], steps: int = 4, lr: float = 0.01, **options: Any) -> list[float]:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=lr, **options)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lengths", [(6,), (5, 9, 7)])
def test_losses_and_steps_are_pefts(family: str, kind: str, lengths: tuple[int, ...]) -> None:
    theirs = peft.get_peft_model(tiny.build(family), config(peft, **LOSSES[kind]))
    ours = get_peft_model(tiny.build(family), config(**LOSSES[kind]))
    batch = labelled(lengths=lengths)
    expected, found = (train(model, batch) for model in (theirs, ours))
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0]
    expected = theirs.prompt_encoder["default"](torch.arange(P)[None])[0].detach()
    torch.testing.assert_close(ours.encoder().saved_vectors(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_pefts_with_the_rows_types_given(family: str) -> None:
    batch = labelled()
    types = torch.full_like(batch["input_ids"], 2)
    types[:, 2:5], types[:, 5:], types[2, :2] = 4, 8, 0  # some rows hold two answers of their own
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    gradients, losses = [], []
    for library in (peft, softprompt):
        model = library.get_peft_model(tiny.build(family), config(library, **DECAY))
        loss = model(**batch, input_type_mask=types.clone()).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(model.prompt_encoder["default"].delta_embedding.weight.grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


def naive_loss(model: SoftPromptModel, batch: dict[str, Tensor], decay: float) -> Tensor:
    """Row by row without padding: the context's embeddings before the row's, one cross-entropy per label token."""
    base, total, count = model.get_base_model(), torch.zeros(()), 0
    vectors = model.encoder().prompt().vectors
    weights = {4: decay**2, 5: decay**2, 10: decay, 11: decay}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real, wanted = ids[mask.bool()], labels[mask.bool()]
        embedded = torch.cat([vectors, base.get_input_embeddings()(real[None])], dim=1)
        logits = base(inputs_embeds=embedded, use_cache=False).logits[0]
        for place, weight in weights.items():
            total = total + weight * cross_entropy(logits[place - 1], torch.tensor(IDS[place]))
        for place, label in enumerate(wanted.tolist()):
            if label != -100:
                total = total + cross_entropy(logits[P + place - 1], torch.tensor(label))
        count += len(weights) + int((wanted != -100).sum())
    return total / count


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere2", "bloom", "mistral_window", "mamba", "lfm2"])
def test_it_is_the_plain_formulation_on_either_side_of_padding(family: str, side: str) -> None:
    model = get_peft_model(families.build(family, "CAUSAL_LM"), config(**DECAY))
    train(model, labelled(), steps=2, lr=0.05)
    batch = labelled(side)
    batch["labels"][1, batch["attention_mask"][1].bool()] = batch["input_ids"][1]  # a first token's label too
    gradients, losses = [], []
    for loss in (model(**batch).loss, naive_loss(model, batch, 0.7)):
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.encoder().delta_embedding.weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
    assert gradients[0].norm() > 1e-2


def test_outputs_cover_the_real_tokens_and_are_those_without_labels() -> None:
    model, batch = get_peft_model(tiny.build("llama"), config()).eval(), labelled("left")
    loss, logits = model(**batch, return_dict=False)[:2]
    assert loss.ndim == 0
    batch.pop("labels")
    expected = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    types = torch.full_like(batch["input_ids"], 4)
    torch.testing.assert_close(model(**batch, input_type_mask=types).logits, expected)


def test_a_context_without_answers_is_the_ordinary_loss() -> None:
    """PEFT takes the row's answers for something else there, and its loss is not a number."""
    model, batch = get_peft_model(tiny.build("llama"), config(cpt_tokens_type_mask=[1] * P)), labelled()
    table = softprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    plain = get_peft_model(tiny.build("llama"), table)
    plain.encoder().start_from(model.encoder().saved_vectors())
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    one = get_peft_model(tiny.build("llama"), CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[9]))
    assert torch.isfinite(one(**batch).loss)


def test_held_out_loss_is_of_the_rows_alone() -> None:
    """It can be compared with that of other prompts: here of a plain table of the same vectors."""
    model, rows = get_peft_model(tiny.build("llama"), config(**DECAY)), [Encoded([5, 6, 7, 8], [-100, -100, 7, 8])] * 2
    table = softprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    plain = get_peft_model(tiny.build("llama"), table)
    plain.encoder().start_from(model.encoder().saved_vectors())
    assert evaluate_loss(model, rows)["loss"] == pytest.approx(evaluate_loss(plain, rows)["loss"])
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-100, -100, 7, 8]])
    losses = [float(each(input_ids=ids, labels=labels).loss.detach()) for each in (model, plain)]
    assert losses[0] != pytest.approx(losses[1])  # and training's is not
    assert model.training


def test_micro_batches_add_up_to_the_step() -> None:
    """`num_items_in_batch`, as transformers' Trainer passes it: two halves weigh what their labels weigh."""
    model, batch = get_peft_model(tiny.build("llama"), config(cpt_tokens_type_mask=[1] * P)), labelled()
    batch["labels"][0] = batch["input_ids"][0].where(batch["attention_mask"][0] == 1, -100)
    items = int((batch["labels"] != -100).sum())
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, 3))]
    total = sum(model(**half, num_items_in_batch=items).loss for half in halves)
    torch.testing.assert_close(total, model(**batch).loss)


def test_weights_by_hand() -> None:
    kinds = torch.tensor([[4, 1, 4, 8, 0, 12, 12, 2], [1, 4, 4, 4, 4, 4, 1, 2]])
    expected = [[1, 1, 0.25, 0.5, 1, 1, 1, 1], [1] * 8]
    assert answer_weights(kinds, 0.5).tolist() == expected


def test_inputs_whose_loss_would_be_another() -> None:
    model, batch = get_peft_model(tiny.build("llama"), config()), labelled()
    ids, labels = batch["input_ids"], batch["labels"]
    with pytest.raises(ConfigError, match="attention_mask"):
        model(input_ids=ids, labels=labels, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, -1))
    with pytest.raises(ConfigError, match="labels has shape"):
        model(input_ids=ids, labels=labels[:, 1:])
    with pytest.raises(UnsupportedError, match="images"):
        model(**batch, pixel_values=torch.zeros(1))
    with pytest.raises(ConfigError, match=r"input_type_mask has shape \(3, 8\)"):
        model(**batch, input_type_mask=torch.ones(3, 8))


def test_with_gradient_checkpointing() -> None:
    losses = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny.build("llama"), config(**DECAY))
        if checkpointing:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # the first is the name in newer versions
        model.train()
        losses.append(train(model, labelled()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# ---- what moves --------------------------------------------------------------------------------------------------


def test_tokens_stay_within_their_radii_and_labels_where_they_are() -> None:
    base = tiny.build("llama")
    model = get_peft_model(base, config())
    words = base.get_input_embeddings().weight[IDS].detach()
    assert torch.equal(model.encoder().saved_vectors(), words)
    losses = train(model, labelled(), steps=6, lr=0.3, weight_decay=0.1)
    assert losses[-1] < losses[0]
    moved = (model.encoder().saved_vectors() - words).norm(dim=1)
    scale = (32 / 2048) ** 0.5
    radii = torch.tensor([0.0 if kind % 4 == 0 else INPUT if kind % 4 == 2 else FORMAT for kind in TYPES]) * scale
    torch.testing.assert_close(moved, radii, rtol=1e-3, atol=1e-7)  # steps of that size end on the sphere
    assert torch.equal(model.encoder().saved_vectors()[radii == 0], words[radii == 0])


def test_only_the_deltas_train() -> None:
    model = get_peft_model(tiny.build("llama"), config())
    assert [name for name, each in model.named_parameters() if each.requires_grad] == [
        "prompt_encoder.default.delta_embedding.weight"
    ]


def test_training_goes_on_within_the_same_radii(tmp_path: Path) -> None:
    model = get_peft_model(tiny.build("llama"), config())
    train(model, labelled(), lr=0.3)
    model.save_pretrained(tmp_path / "prompt")
    model.save_pretrained(tmp_path / "kept", keep_encoder=True)
    words = tiny.build("llama").get_input_embeddings().weight[IDS].detach()
    for folder in ("prompt", "kept"):
        again = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / folder, is_trainable=True)
        assert torch.equal(again.encoder().saved_vectors(), model.encoder().saved_vectors())
        before = again.encoder().saved_vectors()
        train(again, labelled(), steps=6, lr=0.3)
        assert (again.encoder().saved_vectors() - before).norm() > 1e-3
        assert (again.encoder().saved_vectors() - words).norm(dim=1).max() < INPUT * (32 / 2048) ** 0.5 + 1e-5


def test_from_a_text_the_radii_lie_around_that_text() -> None:
    base = tiny.build("llama")
    model = get_peft_model(base, CPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    text = "the cat sat on the mat and the dog ran"
    initialize_from_text(model, tiny.tokenizer(), text)
    words = base.get_input_embeddings().weight[tiny.tokenizer()(text)["input_ids"][:5]].detach()
    assert torch.equal(model.encoder().saved_vectors(), words)
    train(model, labelled(), lr=0.3)
    torch.testing.assert_close(
        (model.encoder().saved_vectors() - words).norm(dim=1), torch.full((5,), 0.1 * (32 / 2048) ** 0.5)
    )


# ---- a context out of training examples --------------------------------------------------------------------------


def test_whole_rows_that_fit_and_else_the_end_of_the_shortest() -> None:
    rows = [([5, 6, 7], [-100, -100, 7]), ([8] * 9, [-100] * 8 + [8]), ([9, 10], [-100, 10])]
    assert context_of(rows, 6) == ([5, 6, 7, 9, 10], [2, 2, 4, 6, 8])
    assert context_of(rows[:2], 2) == ([6, 7], [2, 4])
    started = CPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, **DECAY).with_examples(rows)
    assert (started.num_virtual_tokens, started.cpt_token_ids) == (5, [5, 6, 7, 9, 10])
    assert started.opt_loss_decay_factor == 0.7
    for config_with_its_own in (config(), CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3])):
        assert config_with_its_own.with_examples(rows) is config_with_its_own
    plain = softprompt.PromptTuningConfig(num_virtual_tokens=4)
    assert plain.with_examples(rows) is plain


def test_training_takes_its_context_from_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell, base = Shell(capsys), save_base(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ("train", "--model", base, "--method", "cpt", "--train", data, "--template", "{mr} => {refs}",
             "--num-virtual-tokens", 50, "--batch-size", 2, "--samples", 1, "--keep-encoder")  # fmt: skip
    shell.ok(*flags, "--steps", 3, "--out", tmp_path / "run")
    context = CPTConfig.from_pretrained(tmp_path / "run")
    assert isinstance(context, CPTConfig)
    assert 20 < context.num_virtual_tokens <= 50
    ids, types = context.cpt_token_ids or [], context.cpt_tokens_type_mask or []
    text = tiny.tokenizer().decode(ids)
    answers = [row["refs"] for row in ROWS]
    first = tiny.tokenizer().decode([token for token, kind in zip(ids, types, strict=True) if kind == 4])
    assert any(first.removesuffix("</s>").strip() in refs for refs in answers)
    assert all(kind % 4 in (2, 0) for kind in types)
    assert max(types) == 4 * text.count("name[")
    model = SoftPromptModel.from_pretrained(tiny.build("llama"), tmp_path / "run", is_trainable=True)
    words = model.get_base_model().get_input_embeddings().weight[ids].detach()
    moved = (model.encoder().saved_vectors() - words).norm(dim=1)
    assert 0 < moved.max() < 0.1 * (32 / 2048) ** 0.5 * 1.001


# ---- PEFT and files ----------------------------------------------------------------------------------------------


def real_logits(model: Any) -> Tensor:
    batch = tiny.ragged(seed=1)
    with torch.no_grad():
        return model(**batch).logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_files_of_peft_both_ways(family: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny.build(family), config(peft, **DECAY))
    train(theirs, labelled())
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = SoftPromptModel.from_pretrained(tiny.build(family), tmp_path / "theirs")
    torch.testing.assert_close(real_logits(ours), real_logits(theirs.eval()), rtol=0, atol=1e-5)
    assert ours.peft_config["default"].cpt_tokens_type_mask == TYPES
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny.build(family), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(real_logits(back), real_logits(theirs), rtol=0, atol=1e-5)
    assert back.peft_config["default"].opt_loss_decay_factor == 0.7
    again = SoftPromptModel.from_pretrained(tiny.build(family), tmp_path / "ours", is_trainable=True)
    assert torch.isfinite(torch.tensor(train(again, labelled()))).all()


def test_a_batch_generates_what_its_rows_generate() -> None:
    model, batch = get_peft_model(tiny.build("llama"), config()).eval(), tiny.ragged(side="left")
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    for row, ids, mask in zip(together, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = model.generate(input_ids=ids[mask.bool()][None], max_new_tokens=6, do_sample=False)[0, -6:]
        assert torch.equal(row, alone)


def test_defaults_and_parameters_of_peft() -> None:
    for options in ({}, {"cpt_token_ids": [3, 4]}, OPTIONS):
        ours, theirs = (library.CPTConfig(**{"task_type": "CAUSAL_LM", **options}) for library in (softprompt, peft))
        names = set(theirs.to_dict()) & set(ours.to_dict()) - {"num_transformer_submodules", "peft_version"}
        count = ours.num_virtual_tokens if options else 1  # without a context ours has the default length
        same = {name for name in names if getattr(ours, name) == getattr(theirs, name)}
        assert names - same == (set() if count == ours.num_virtual_tokens else
            {"num_virtual_tokens", "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"})  # fmt: skip
    encoder = get_peft_model(tiny.build("gpt2"), config()).encoder()
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
        assert torch.equal(again.saved_vectors(), encoder.saved_vectors())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpt_token_ids": None}, "cpt_token_ids, which is not set"),
        ({"cpt_tokens_type_mask": [1]}, "1 entries, cpt_token_ids has 12"),
        ({"cpt_mask": [1] * 11 + [0]}, "padding"),
        ({"cpt_token_ids": [-1] * P}, "whole numbers"),
        ({"cpt_token_ids": [1.5] * P}, "whole numbers"),
        ({"cpt_tokens_type_mask": [10**30] * P}, "whole numbers"),
        ({"cpt_token_ids": [], "cpt_tokens_type_mask": []}, "num_virtual_tokens"),
        ({"opt_weighted_loss_type": "linear"}, "none or decay"),
        ({"opt_loss_decay_factor": -1.0}, "opt_loss_decay_factor"),
        ({"opt_projection_epsilon": float("nan")}, "opt_projection_epsilon"),
        ({"placement": "after_bos"}, "in front"),
        ({"cpt_token_ids": [tiny.VOCAB] * P}, "320 tokens"),
    ],
)
def test_configs_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny.build("gpt2"), config(**options))


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_other_tasks_are_refused_with_the_reason(task: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{task}.*CAUSAL_LM, or prompt_tuning"):
        config(task_type=task)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_models_that_are_no_decoders_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match="decoders"):
        get_peft_model(families.build(family, families.FAMILIES[family].tasks[0]), config())
