"""The report: everything a run wrote is on the page, escaped, and the page needs nothing but itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny
import torch

from softprompt.errors import CheckpointError, ConfigError
from softprompt.recipe import Recipe
from softprompt.report import write_report
from softprompt.report.charts import Series, line_chart, smooth, thin, ticks
from softprompt.report.nearest import nearest_tokens

EVIL = "<script>alert(1)</script> & \"quotes\" 'too'"


class Outline(HTMLParser):
    """Tags in order, text, and every attribute that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words += data


def write_run(folder: Path, **changes: Any) -> Path:
    """A run's files as ``train`` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(train="train.jsonl", out="runs/x", eval="heldout.jsonl", template="{a} => {b}").resolved()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    scores = {"loss": 3.0, "perplexity": 20.1, "tokens": 100}
    summary = {
        "method": "prefix_tuning", "base_name": "embedded", "steps": 30, "best_step": 20, "frozen": scores,
        "start": scores, "best": {**scores, "loss": 1.25}, "classifies": False, "train_examples": 1234,
        "eval_examples": 80, "trainable_parameters": 2000, "base_parameters": 100000, "saved_parameters": 500,
        "adapter_bytes": 2048, "seconds": 75.0, "tokens_per_s": 5120.0, "nearest": None, "norms": [[1.0, 2.0]],
        "command": "softprompt generate --prompt runs/x --input …", "versions": {"torch": "2.0"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}))
    samples = [{"input": EVIL, "references": ["a reference", EVIL], "before": "", "after": f"after {EVIL}"}]
    (folder / "samples.json").write_text(json.dumps(samples))
    rows = [{"step": 0, "frozen_loss": 3.0, "eval_loss": 3.1}]
    rows += [{"step": n, "loss": 3 - n / 20, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5000.0} for n in range(1, 31)]
    rows[20]["eval_loss"] = 1.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    outline = Outline(page)
    assert outline.links == []
    assert "script" not in outline.tags
    assert not re.search(r"url\(|@import|https?://", page)
    assert page.count("<svg") == 4
    for words in ("1.250", "3.000 by the frozen model", "1,234 examples", "kept prompt is that of step 20", "1:15 min"):
        assert words in outline.words
    assert "softprompt generate --prompt runs/x" in outline.words


def test_what_came_from_data_is_escaped(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", base_name=EVIL)).read_text(encoding="utf-8")
    assert "<script" not in page
    assert Outline(page).words.count(EVIL) == 3


def test_settings_hold_every_field_of_the_recipe(tmp_path: Path) -> None:
    words = Outline(write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")).words
    for name in ("learning_rate", "method_options.prefix_projection", "seed", "batch_size"):
        assert name in words


def test_nearest_words_or_norms(tmp_path: Path) -> None:
    nearest = [[[" the", 0.93], ["<b>", 0.5]], [["\n", 0.2]]]
    page = write_report(write_run(tmp_path / "words", nearest=nearest)).read_text(encoding="utf-8")
    assert "virtual token 2" in page
    assert "&lt;b&gt;" in page
    assert "0.93" in page
    assert "<code>⏎</code>" in page
    norms = write_report(write_run(tmp_path / "norms")).read_text(encoding="utf-8")
    assert "extra keys and values in every attention layer" in norms


def test_a_run_without_held_out_data_has_a_report_too(tmp_path: Path) -> None:
    write_run(tmp_path / "run", best={}, start={}, frozen={}, eval_examples=0)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Training examples" in page
    assert "<span>held-out loss</span>" not in page


def test_a_report_is_written_again_without_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not list(run.glob(".*.tmp"))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run in"):
        write_report(tmp_path)
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"summary.json lacks what a report needs"):
        write_report(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"summary.json cannot be read"):
        write_report(run)


def test_a_chart_is_valid_svg_inside_its_frame() -> None:
    points = [(float(step), 5.0 / (1 + step)) for step in range(1000)]
    picture = line_chart([Series("a <b>", points, "train"), Series("held-out", points[::250], "eval")], "loss & more")
    root = ElementTree.fromstring(picture)
    assert root.get("aria-label") == "loss & more"
    assert len(root.findall("circle")) == 4
    for line in root.findall("polyline"):
        places = [tuple(map(float, place.split(","))) for place in (line.get("points") or "").split()]
        assert len(places) <= 300
        assert all(0 <= x <= 480 and 0 <= y <= 270 for x, y in places)


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), float("-inf")]])
def test_a_chart_of_nothing_is_empty(values: list[float]) -> None:
    assert line_chart([Series("x", [(0.0, value) for value in values], "train")], "x") == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.1, 3.2), (5, 5), (0, 0), (-7, 1e6), (1e-9, 2e-9), (0, 300)])
def test_ticks_span_the_values_in_few_round_steps(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert high <= found[-1]
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))


def test_thin_and_smooth_keep_the_shape() -> None:
    points = [(float(n), float(n)) for n in range(1000)]
    assert len(thin(points)) <= 300
    assert thin(points)[0][0] < thin(points)[-1][0]
    assert thin(points[:5]) == points[:5]
    assert smooth(points)[500] == pytest.approx((500.0, 500.0))
    assert smooth([]) == []


def test_nearest_tokens_finds_the_word_itself() -> None:
    tokenizer, words = tiny.tokenizer(), tiny.build("llama").get_input_embeddings().weight
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    found = nearest_tokens(2.5 * words[ids], words, tokenizer, count=2)
    assert [row[0] for row in found] == [(tokenizer.decode([token]), pytest.approx(1.0)) for token in ids]
    assert all(len(row) == 2 and row[0][1] >= row[1][1] for row in found)
    special = nearest_tokens(words[:1], words, tokenizer, count=1)
    assert special[0][0][0] not in tokenizer.all_special_tokens
    assert nearest_tokens(torch.zeros(0, words.shape[1]), words, tokenizer) == []
