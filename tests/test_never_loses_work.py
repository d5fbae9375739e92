"""A run that is killed at any moment and resumed ends with the bits of one that nobody disturbed.

Real processes, killed by SIGKILL, which no process can catch, clean up after or put off.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_multitask_train as multitask
import tiny
from cli_kit import write_rows
from kill_kit import NEVER, Life, Moment, counted, facts, losses, softprompt, two_processes, whole_life
from test_train import recipe, workplace  # noqa: F401  (workplace is a fixture)

from softprompt.recipe import Recipe

SEED = 20_24


@pytest.fixture(scope="module")
def prefix(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Life]:  # noqa: F811
    """A run with dropout, several epochs, evaluations and saves at steps of their own, and its undisturbed life."""
    out = tmp_path_factory.mktemp("prefix") / "straight"
    options = {"method_options": {"prefix_dropout": 0.1}, "steps": 14, "eval_steps": 3, "save_steps": 4}
    settings = recipe(workplace, out, method="prefix_tuning", **options)
    return settings, whole_life(settings)


def killed_and_resumed(settings: Recipe, life: Life, out: Path, moment: Moment) -> bool:
    """Kill at a moment, resume to the end and compare; whether the kill came before the end."""
    settings = settings.replace(out=str(out))
    status, said = softprompt(settings, moment=moment)
    assert status in (-9, 0), said
    again, said = softprompt(settings, "--resume")
    assert again == 0, (moment, said)
    assert facts(out) == facts(life.folder), moment
    shutil.rmtree(out)
    return status == -9


@pytest.mark.slow
def test_twenty_random_moments(prefix: tuple[Recipe, Life], tmp_path: Path) -> None:
    """Over the whole life of a run: reading the data, the first evaluation, the steps, the saves, the finish."""
    settings, life = prefix
    moments = life.moments(SEED, before=4, during=11, after=5)
    assert len(set(moments)) == 20
    assert all(killed_and_resumed(settings, life, tmp_path / "run", moment) for moment in moments)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["checkpoint", "adapter_model", "adapter_config", "recipe", "metrics", "report"])
def test_in_the_middle_of_a_file(prefix: tuple[Recipe, Life], tmp_path: Path, file: str) -> None:
    settings, life = prefix
    assert killed_and_resumed(settings, life, tmp_path / "run", life.inside(file, SEED))


@pytest.mark.slow
def test_killed_again_and_again(prefix: tuple[Recipe, Life], tmp_path: Path) -> None:
    """One command line, over and over, from an empty place to the end; the clock says when it is killed."""
    settings, life = prefix
    settings, rng = settings.replace(out=str(tmp_path / "run")), random.Random(SEED)
    for attempt in range(8):
        status, said = softprompt(settings, "--resume", seconds=rng.uniform(0.1, 0.3 + 0.2 * attempt))
        assert status in (-9, 0), said
    status, said = softprompt(settings, "--resume")
    assert status == 0, said
    assert facts(tmp_path / "run") == facts(life.folder)


@pytest.mark.slow
def test_a_finished_run_is_resumed_without_harm(prefix: tuple[Recipe, Life], tmp_path: Path) -> None:
    settings, life = prefix
    shutil.copytree(life.folder, tmp_path / "run")
    status, said = softprompt(settings.replace(out=str(tmp_path / "run")), "--resume")
    assert status == 0, said
    assert facts(tmp_path / "run") == facts(life.folder)


@pytest.mark.slow
def test_a_torn_state_is_skipped_for_the_one_before(prefix: tuple[Recipe, Life], tmp_path: Path) -> None:
    settings, life = prefix
    settings = settings.replace(out=str(tmp_path / "run"))
    assert softprompt(settings, moment=(life.write("step-00000014.pt", "open"), 0))[0] == -9
    states = sorted((tmp_path / "run" / "checkpoint").glob("step-*.pt"))
    assert [path.name for path in states] == ["step-00000008.pt", "step-00000012.pt"]
    states[1].write_bytes(states[1].read_bytes()[:-1000])
    status, said = softprompt(settings, "--resume")
    assert status == 0
    assert f"the state of step 12, {states[1]}, is torn (it ends too early) and skipped" in said
    assert facts(tmp_path / "run") == facts(life.folder)


# ---- other kinds of runs ---------------------------------------------------------------------------------------------


def base(place: Path) -> None:
    tiny.build("llama").save_pretrained(place / "llama")
    tiny.tokenizer().save_pretrained(place / "llama")


def lstm(place: Path) -> Recipe:
    options = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.2, "encoder_hidden_size": 16}
    base(place)
    rows = write_rows(place / "rows.jsonl", [{"who": f"cat {n}", "said": f"cat {n} sat"} for n in range(20)])
    return Recipe(
        model=str(place / "llama"), train=str(rows), eval=str(rows), template="{who} => {said}", method="p_tuning",
        method_options=options, num_virtual_tokens=4, steps=8, batch_size=8, eval_steps=2, save_steps=3, samples=1,
        max_new_tokens=2, device="cpu", keep_encoder=True,
    )  # fmt: skip


def tuned(place: Path) -> Recipe:
    """A base model that is tuned too."""
    return lstm(place).replace(method_options={"encoder_hidden_size": 16}, base_learning_rate=1e-3, keep_encoder=False)


def teachers(place: Path) -> Recipe:
    for name, answer in multitask.ANSWERS.items():
        write_rows(place / f"{name}.jsonl", [{"who": f"cat {n}", "said": answer.format(n=n)} for n in range(12)])
    base(place)
    return multitask.recipe(place, place / "none", steps=4, save_steps=2, samples=1, teacher={"steps": 2})


def streamed(place: Path) -> Recipe:
    """Rows that are read while training, a few at a time."""
    return lstm(place).replace(method="prompt_tuning", method_options={}, streaming=True, shuffle_window=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (lstm, "encoder.safetensors"),
        (tuned, "adapter_model"),
        (teachers, "teachers/river/checkpoint"),
        (streamed, "checkpoint"),
    ],
)
def test_other_kinds_of_runs(tmp_path: Path, kind: Any, file: str) -> None:
    settings = kind(tmp_path).replace(out=str(tmp_path / "straight"))
    life = whole_life(settings)
    moments = [*life.moments(SEED, before=0, during=2, after=1), life.inside(file, SEED)]
    assert all(killed_and_resumed(settings, life, tmp_path / "run", moment) for moment in moments)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_team_that_loses_one(prefix: tuple[Recipe, Life], tmp_path: Path, killed: int) -> None:
    """Two processes share the work; whichever of them is killed, two go on to the bits of two."""
    settings = prefix[0].replace(out=str(tmp_path / "straight"))
    assert two_processes(settings, moment=NEVER) == [0, 0]
    (moment,) = counted(settings).moments(SEED + killed, before=0, during=1, after=0)
    settings = settings.replace(out=str(tmp_path / "run"))
    assert two_processes(settings, moment=moment, killed=killed)[killed] == -9
    assert two_processes(settings, "--resume") == [0, 0]
    assert facts(tmp_path / "run") == facts(tmp_path / "straight")


# ---- where nothing has begun -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resuming_what_has_not_begun_begins_it(prefix: tuple[Recipe, Life], tmp_path: Path) -> None:
    """Killed when the recipe was written, but had not got its name."""
    settings, life = prefix
    settings = settings.replace(out=str(tmp_path / "run"))
    assert softprompt(settings, moment=(life.write("recipe.yaml", "os.rename"), 0))[0] == -9
    assert [path.suffix for path in (tmp_path / "run").iterdir()] == [".tmp"]
    status, said = softprompt(settings, "--resume")
    assert status == 0
    assert f"there is no run in {tmp_path / 'run'} yet, so it begins" in said
    assert facts(tmp_path / "run") == facts(life.folder)


@pytest.mark.slow
def test_every_line_of_the_metrics_is_compared(prefix: tuple[Recipe, Life]) -> None:
    """The tests above compare what they say: fourteen steps and the start, five evaluations, the bits of the prompt."""
    found = facts(prefix[1].folder)
    assert [row["step"] for row in losses(prefix[1].folder)] == list(range(15))
    assert sum("eval_loss" in row for row in found["losses"]) == 6
    assert len(found["adapter_model.safetensors"]["prompt_embeddings"]) > 100
    assert "checkpoint/step-00000014.pt" in found["files"]
    assert not [name for name in found["files"] if name.endswith((".tmp", ".new", ".old"))]
