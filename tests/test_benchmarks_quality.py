"""The benchmark of what prompts learn: both libraries see the same rows, dev rows choose, test rows are reported."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

WORDS = ("cat", "dog", "house", "river", "mat", "rain")
ARMS = {
    "e2e": "frozen,context,peft-default,lora,full,ours",
    "cb": "commonest,context,full,ours",
    "sst2": "head,probe,lora,ours",
    "lama-producer": "frozen,ours",
    "style": "copy",
}


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own


def load(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


@pytest.fixture(scope="module")
def small_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows in the form of the real data sets, and tiny models under the real ones' names."""
    folder = tmp_path_factory.mktemp("assets")
    for name, family in (("embedded", "llama"), ("minilm", "bert")):
        tiny.build(family).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        file = folder / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for number, part in enumerate(("train", "dev", "test")):
        chosen = [WORDS[(number + n) % 6] for n in range(12)]
        write(f"e2e/{part}", [{"mr": f"name[The {w}]", "refs": [f"The {w} sat.", f"{w} sat {n}"]}
                              for n, w in enumerate(chosen)])  # fmt: skip
        write(f"sst2/{part}", [{"sentence": f"the {w} ran {n}", "label": n % 2} for n, w in enumerate(chosen)])
        labels = ("entailment", "contradiction", "neutral")
        file = {"train": "train", "dev": "dev32", "test": "val"}[part]
        facts = [{"premise": f"the {w} {n}", "hypothesis": "it sat", "idx": n} for n, w in enumerate(chosen)]
        write(f"fewglue/CB/{file}", [{**fact, "label": labels[n % 3]} for n, fact in enumerate(facts)])
        facts = [{"relation": "P176", "sub": f"{w} {n} {part}", "obj": w} for n, w in enumerate(chosen)]
        write(f"lama_trex/{part}", facts)
    speeches = [f"A:\nThou hast the {WORDS[n % 6]} and {n} more. Go." for n in range(40)]
    write("tinyshakespeare/speeches", [{"text": text} for text in speeches])
    return folder


@pytest.fixture
def quality(small_assets: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SOFTPROMPT_ASSETS", str(small_assets))
    monkeypatch.setattr(load("quality_bench"), "_folder", lambda name: str(small_assets / name))
    return load("quality")


# ---- running -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", ARMS)
def test_a_task_runs_goes_on_and_is_in_the_table(task: str, quality: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--quick", "--tasks", task, "--arms", ARMS[task], "--results", str(tmp_path)]
    quality.main(arguments)
    found = (tmp_path / "quality.json").read_text()
    rows = json.loads(found)
    assert {("test" in row, row["part"]) for row in rows} <= {(True, "main"), (False, "grid")}
    assert not [row for row in rows if "error" in row]
    page = (tmp_path / "quality.md").read_text()
    assert (tmp_path / "quality_summary.md").read_text().startswith("| arm |")
    labels = [load("quality_arms").ARMS[arm] for arm in ARMS[task].split(",")]
    assert all(label in page for label in labels)
    assert "nan" not in page
    quality.main(arguments)
    assert (tmp_path / "quality.json").read_text() == found
    capsys.readouterr()
    quality.main([*arguments, "--list"])
    assert capsys.readouterr().out.startswith("in all about 0 minutes")


def test_the_list_counts_the_runs(quality: Any, tmp_path: Path, capsys: Any) -> None:
    quality.main(["--quick", "--tasks", "e2e", "--arms", "frozen,lora", "--results", str(tmp_path), "--list"])
    out = capsys.readouterr().out.splitlines()
    assert "1 main" in out[0]
    assert "3 grid, 2 main" in out[1]  # three settings, of which two go on to all steps; one seed
    assert not (tmp_path / "quality.json").exists()


def test_both_libraries_see_the_same_rows_in_the_same_order(quality: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The ids of every training batch, of `softprompt train` and of the loop that PEFT's models are trained in."""
    objective, arms = load("softprompt.train.objective"), load("quality_arms")
    seen: list[list[list[int]]] = []
    loss = objective.TextObjective.loss

    def spy(self: Any, model: Any, rows: Any) -> Any:
        seen.append([row.input_ids for row in rows])
        return loss(self, model, rows)

    monkeypatch.setattr(objective.TextObjective, "loss", spy)
    task = load("quality_tasks").TASKS["e2e"].quick()
    bench = load("quality_bench").Bench(task, "embedded", tmp_path)
    batches = {}
    for setting in (arms.Setting("ours"), arms.settings_of("peft-default", task)[0], arms.Setting("full", rate=1e-3)):
        seen.clear()
        found = bench.run(setting, 1, 5, report=False)
        batches[setting.kind] = list(seen)
        assert [step for step, _ in found["curve"]] == [0, 1, 2, 3, 4, 5]
        assert found["dev"]["loss"] == min(value for _, value in found["curve"])
    assert len(batches["ours"]) == 5
    assert batches["ours"] == batches["peft"] == batches["full"]


@pytest.mark.slow
def test_the_best_step_is_kept(quality: Any, tmp_path: Path) -> None:
    """A rate that makes everything worse: what is reported is the model before training."""
    task, arms = load("quality_tasks").TASKS["e2e"].quick(), load("quality_arms")
    bench = load("quality_bench").Bench(task, "embedded", tmp_path)
    frozen = bench.run(arms.Setting("frozen"), 0, 3, report=True)
    found = bench.run(arms.Setting("full", rate=30.0), 0, 3, report=True)
    assert found["kept"] == 0
    assert found["test"] == frozen["test"]
    assert found["parameters"] == found["base"] > 0


# ---- choosing and comparing ----------------------------------------------------------------------------------------


def test_settings_are_chosen_by_few_steps_and_then_by_all() -> None:
    arms = load("quality_arms")
    settings = [arms.Setting("peft", rate=rate) for rate in (1.0, 2.0, 3.0)]
    short = dict(zip(settings, (0.5, 0.6, 0.7), strict=True))
    full = dict(zip(settings, (0.4, 0.3, 0.1), strict=True))

    def scores(losses: dict[Any, float]) -> Any:
        return lambda setting: {"loss": losses[setting]} if setting in losses else None

    assert arms.choose(settings, scores(short), scores(full)) is settings[1]  # the third is not among the best two
    accuracy = {settings[2]: {"loss": 0.9, "accuracy": 0.8}}
    assert arms.choose(settings, lambda s: accuracy.get(s, {"loss": 0.1, "accuracy": 0.5}), scores(full)) is settings[2]
    assert arms.choose(settings, scores({settings[0]: 1.0}), scores(full)) is None
    assert arms.choose(settings[:1], scores({}), scores({})) is settings[0]


def row(task: str, kind: str, setting: str, part: str, seed: int, dev: float, **more: Any) -> dict[str, Any]:
    key = {"task": task, "model": "embedded", "weights": "w", "rows": "r", "budget": "10x4", "kind": kind}
    found = {
        **key,
        "setting": setting,
        "part": part,
        "seed": seed,
        "dev": {"loss": dev},
        "parameters": 50,
        "base": 1000,
    }
    return {**found, "curve": [[0, 9.0], [5, dev + 0.5], [10, dev]], "seconds": 1.0, **more}


def records(tmp_path: Path, rows: list[dict[str, Any]]) -> Any:
    (tmp_path / "quality.json").write_text(json.dumps(rows))
    return load("common").Records(tmp_path / "quality.json")


def scores(loss: float) -> dict[str, float]:
    return {"loss": loss, "bleu": 1.0, "rouge_l": 1.0, "chrf": 1.0}


def test_the_table_reports_test_rows_of_what_dev_rows_chose(tmp_path: Path) -> None:
    rates = ["lr 0.005", "lr 0.02", "lr 0.05"]
    rows = [row("e2e", "lora", name, "grid", 0, dev) for name, dev in zip(rates, (3.0, 2.0, 1.0), strict=True)]
    rows += [row("e2e", "lora", rates[1], "main", 0, 0.9, test=scores(7.0))]
    rows += [row("e2e", "lora", rates[2], "main", 0, 0.8, test=scores(8.0))]
    rows += [row("e2e", "ours", "default", "main", 0, 1.0, test=scores(5.0), defaults="old", used="old")]
    rows += [
        row("e2e", "ours", "default", "main", s, 1.0, test=scores(4.0 + s), defaults="new", used="new") for s in (0, 1)
    ]
    (result,) = load("quality_table").results_of(records(tmp_path, rows))
    assert result.values("lora", "loss") == {0: 8.0}  # the better one on dev rows, though worse on test rows
    assert result.values("ours", "loss") == {0: 4.0, 1: 5.0}
    assert load("quality_table").results_of(records(tmp_path, rows[1:3]))[0].arms["lora"] == []


def test_a_comparison_says_who_is_ahead() -> None:
    compare = load("quality_compare")
    ours, theirs = {0: 2.0, 1: 2.2, 2: 2.1}, {0: 2.5, 1: 2.5, 2: 2.7}
    assert compare.compared(ours, theirs, "loss")[0] == "-0.467 (better)"
    assert compare.compared(ours, theirs, "accuracy")[0] == "-0.5 (worse)"
    apart = [-0.5, -0.3, -0.6]
    mean, deviation = sum(apart) / 3, math.sqrt(sum((x - sum(apart) / 3) ** 2 for x in apart) / 2)
    t = abs(mean) / (deviation / math.sqrt(3))
    assert compare.compared(ours, theirs, "loss")[1] == f"{1 - t / math.sqrt(2 + t * t):.3f}"  # Student's t, 2 degrees
    assert compare.compared(ours, {}, "loss") == ("–", "–")
    assert compare.paired_t([0.1]) == "–"
    assert compare.wilcoxon([-1.0] * 5) == ""
    assert "p = 0.016" in compare.wilcoxon([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7])


def test_the_summary_counts_steps_and_the_gap(tmp_path: Path) -> None:
    compare, table = load("quality_compare"), load("quality_table")
    rows = [row("e2e", "frozen", "frozen", "main", 0, 0.0, test=scores(4.0))]
    for setting in load("quality_arms").settings_of("peft-best", load("quality_tasks").TASKS["e2e"]):
        rows += [row("e2e", "peft", str(setting), part, 0, 2.5, test=scores(3.0)) for part in ("grid", "main")]
    for rate in ("lr 0.001", "lr 0.003", "lr 0.008"):
        rows += [row("e2e", "full", rate, part, 0, 1.0, test=scores(1.0)) for part in ("grid", "main")]
    rows.append(row("e2e", "ours", "default", "main", 0, 2.0, test=scores(1.6), defaults="d", used="u"))
    found = table.results_of(records(tmp_path, rows))
    assert compare.reached(found) == "5 of 10"  # at step 5 ours has 2.5, PEFT's lowest, which it has at step 10
    text = "\n".join(compare.comparisons(found))
    assert "| ours | 50 (5.00%) | 1.600 | 80% |" in text
    assert "| ahead of PEFT's best on 4 of 5 tasks | 1 of 1 | **no** |" in text
    assert "lower test loss in 1, by 46.7%" in text


# ---- scores and tasks ------------------------------------------------------------------------------------------------


def test_an_answer_is_first_when_all_its_tokens_are_likeliest() -> None:
    data, quality_scores = load("softprompt.data"), load("quality_scores")

    class Says(torch.nn.Module):
        """The next token is one more than this one."""

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            logits = torch.nn.functional.one_hot(input_ids + 1, 60).float()
            return type("Output", (), {"logits": logits})

    rows = [data.Encoded([5, 6, 7, 2], [-100, 6, 7, 2]), data.Encoded([5, 6, 9, 2], [-100, 6, 9, 2])]
    assert quality_scores.first_answers(Says(), rows, 2) == 0.5


def test_the_commonest_answer_is_counted_over_rows_of_any_length() -> None:
    data, answer_of = load("softprompt.data"), load("quality_bench").answer_of
    assert answer_of(data.Encoded([4, 5, 6, 2], [-100, -100, 6, 2])) == answer_of(data.Encoded([9, 6, 2], [-100, 6, 2]))
    assert answer_of(data.EncodedLabel([4, 5], 1)) == (1,)


def test_text_in_context_is_plain_text(quality: Any, tmp_path: Path) -> None:
    """A row behind a text has the ids of both together, and is scored at its own tokens alone."""
    in_context, tasks = load("quality_scores").in_context, load("quality_tasks").TASKS
    bench = load("quality_bench").Bench(tasks["e2e"].quick(), "embedded", tmp_path)
    text = bench.context_text(0)
    assert text.startswith(tasks["e2e"].instruction + "\n")
    first = bench.test.held_out[0]
    (behind,) = in_context([first], bench.tokenizer, text)
    assert behind.input_ids[-len(first.input_ids) :] == first.input_ids
    assert bench.tokenizer.decode(behind.input_ids).endswith(text + bench.tokenizer.decode(first.input_ids))
    assert [label for label in behind.labels if label >= 0] == [label for label in first.labels if label >= 0]
    cloze = load("quality_bench").Bench(tasks["cb"].quick(), "embedded", tmp_path)
    before = cloze.test.held_out[0]
    (after,) = in_context([before], cloze.tokenizer, cloze.context_text(0))
    assert after.row.answer_position == len(after.row.input_ids) - 1
    assert after.row.input_ids[-len(before.row.input_ids) :] == before.row.input_ids


def test_plain_english_and_back_stays_apart(small_assets: Path) -> None:
    style = load("quality_style")
    assert style.plain("'Tis thou, thou art banish'd!") == "It is you, you are banished!"
    assert style.plain("Art thou mad? What say'st thou?") == "Are you mad? What say you?"
    assert style.plain("Alas, the other's heart.") == "Alas, the other's heart."
    assert style.pair("Thou knowest thy son too well.") is None  # an old verb that the rules do not know
    assert style.pair("I know the man right well.") is None  # nothing changes
    parts = style.style_rows(small_assets / "data")
    assert [len(parts[part]) for part in ("train", "dev", "test")] == [30, 4, 6]
    assert len({r["old"] for rows in parts.values() for r in rows}) == 40


def test_every_task_of_the_assets_has_its_rows(assets: Path, tmp_path: Path) -> None:
    """The parts share no row, and are as many as the task says."""
    tasks = load("quality_tasks")
    for name, task in tasks.TASKS.items():
        files = tasks.write_task(task, assets / "data", tmp_path / name)
        parts = [set(file.read_text().splitlines()) for file in files.values()]
        assert all(parts), name
        assert not parts[0] & parts[2], name
        assert not parts[1] & parts[2], name
        for file, most in zip(files.values(), task.rows, strict=True):
            assert len(file.read_text().splitlines()) <= most
