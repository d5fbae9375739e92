"""A classification head that starts from a regression on what it sees."""

import json
from pathlib import Path

import pytest
import torch
from families import build
from sklearn.linear_model import LogisticRegression
from torch import nn

from softprompt import PrefixTuningConfig, get_peft_model
from softprompt.data import EncodedLabel
from softprompt.recipe import Recipe
from softprompt.train import train
from softprompt.train.head_start import fit_head, regression


def test_the_regression_is_that_of_scikit_learn() -> None:
    torch.manual_seed(0)
    seen = torch.randn(60, 5, dtype=torch.float64) * torch.tensor([1.0, 20.0, 0.01, 3.0, 1.0]) + 4.0
    labels = torch.randint(0, 3, (60,))
    weight, bias = regression(seen, labels, 3, penalty=0.05)
    spread = seen.std(0)
    theirs = LogisticRegression(C=1 / (0.05 * len(labels)), tol=1e-10, max_iter=1000)
    theirs.fit(((seen - seen.mean(0)) / spread).numpy(), labels.numpy())
    ours = (seen @ weight.T + bias).log_softmax(-1)
    expected = torch.tensor(theirs.predict_log_proba(((seen - seen.mean(0)) / spread).numpy()))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_the_rows_are_told_apart_before_training(family: str) -> None:
    """Texts of two vocabularies: what the head sees tells them apart, though it never has."""
    model = get_peft_model(build(family, "SEQ_CLS"), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    torch.manual_seed(1)
    lengths = torch.randint(4, 9, (64,)).tolist()
    rows = [
        EncodedLabel(torch.randint(10 + 40 * (n % 2), 12 + 40 * (n % 2), (length,)).tolist(), n % 2)
        for n, length in enumerate(lengths)
    ]
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    assert fit_head(model, rows, batch_size=7, pad_id=0)
    changed = [name for name, value in model.state_dict().items() if name in before and not before[name].equal(value)]
    assert changed
    assert all("classifier" in name or "score" in name for name in changed)
    right = 0
    for row in rows:  # one by one, without padding
        model.eval()
        with torch.no_grad():
            right += int(model(input_ids=torch.tensor([row.input_ids])).logits.argmax() == row.label)
    assert right >= 60


def test_a_head_that_was_trained_stays() -> None:
    model = get_peft_model(build("bert", "SEQ_CLS"), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    torch.manual_seed(1)
    rows = [EncodedLabel(torch.randint(10, 80, (6,)).tolist(), n % 2) for n in range(32)]
    head = next(each for each in model.heads.copies[model.active_adapter].modules() if isinstance(each, nn.Linear))
    fit_head(model, rows, 8, 0)
    start = head.weight.detach().clone()
    labels = [int(model(input_ids=torch.tensor([row.input_ids])).logits.argmax()) for row in rows]
    if len(set(labels)) < 2:
        pytest.skip("the tiny model says the same of every text")
    with torch.no_grad():
        head.weight.mul_(50)
        assert head.bias is not None
        head.bias.mul_(50)
    own = [EncodedLabel(row.input_ids, label) for row, label in zip(rows, labels, strict=True)]
    assert not fit_head(model, own, 8, 0)
    torch.testing.assert_close(head.weight.detach(), start * 50)


def test_too_little_to_fit_leaves_the_head() -> None:
    model = get_peft_model(build("bert", "SEQ_CLS"), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    rows = [EncodedLabel([11, 12, 13], 0) for _ in range(20)]
    assert not fit_head(model, rows, 8, 0)
    assert not fit_head(model, [EncodedLabel([11, 12], 0), EncodedLabel([13], 1)], 8, 0)


@pytest.mark.slow
def test_a_run_starts_its_head_so_unless_it_is_given(tmp_path: Path) -> None:
    words = ("the sun is warm and kind", "a cold wind and dark rain")
    rows = [{"text": f"{words[n % 2]} {n}", "label": ("good", "bad")[n % 2]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for head_init in (None, "given"):
        recipe = Recipe(
            train=str(tmp_path / "rows.jsonl"), eval=str(tmp_path / "rows.jsonl"), task="SEQ_CLS", steps=1, samples=0,
            input_column="text", target_column="label", num_virtual_tokens=4, head_init=head_init,
            out=str(tmp_path / str(head_init)),
        )  # fmt: skip
        found[head_init] = train(recipe).start["loss"]
    assert found[None] < 0.3 < found["given"]
