"""The books of a sweep, without training: what is chosen next, who counts as dead, what a broken file does."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sweep_kit import values

from softprompt.errors import CheckpointError, ConfigError
from softprompt.sweep import SweepOptions
from softprompt.sweep.plan import Plan
from softprompt.sweep.presence import STALE, TOUCH, Presence
from softprompt.sweep.results import MEANS, read_results
from softprompt.sweep.study import JOURNAL, locked, open_study, take, tried

pytest.importorskip("optuna")

GRID = {"num_virtual_tokens": [2, 4], "learning_rate": [0.1, 0.2, 0.3]}
RUN = {"seed": 0, "folder": "runs/0000-seed0", "command": "softprompt generate"}


def plan_of(out: Path, sweep: Any = None, **options: Any) -> Plan:
    return Plan.of(values(Path("nowhere"), out, sweep=sweep or GRID), SweepOptions(**options))


def chosen(plan: Plan, most: int, tell: bool = True) -> list[dict[str, Any]]:
    """What one worker takes; without ``tell`` it ends, as a stopped one does, before it has a value."""
    found: list[dict[str, Any]] = []
    study = open_study(plan)
    with Presence(plan.folder) as presence:
        while len(found) < most:
            with locked(plan.folder):
                trial = take(plan, study, presence)
            if trial is None:
                break
            found.append(plan.space.settings(trial.params))
            if tell:
                trial.set_user_attr("runs", [{**dict.fromkeys(MEANS, 1), **RUN, "score": float(len(found))}])
                study.tell(trial, float(len(found)))
    return found


def test_a_grid_is_taken_once_by_all_workers_together(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "s")
    study, other = open_study(plan), open_study(plan)
    with Presence(plan.folder) as one, Presence(plan.folder) as two:
        trials = [take(plan, *(pair)) for pair in [(study, one), (other, two)] * 4]
    params = [trial.params for trial in trials if trial is not None]
    assert params == list(plan.space.grid()) and trials[6:] == [None, None]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_never_choose_twice_and_a_sweep_in_pieces_is_the_same(tmp_path: Path, sampler: str) -> None:
    ranges = {"num_virtual_tokens": [2, 4], "learning_rate": {"low": 0.1, "high": 0.4, "step": 0.1}}
    pieces, whole = plan_of(tmp_path / "p", ranges, sampler=sampler, trials=7), tmp_path / "w"
    found = chosen(pieces, 3) + chosen(pieces, 2) + chosen(pieces, 9)
    assert len(found) == len({str(each) for each in found})
    assert len(found) == 7 == len(tried(open_study(pieces), pieces.space))
    assert chosen(plan_of(whole, ranges, sampler=sampler, trials=7), 3) == found[:3]


def test_more_settings_than_there_are_end_the_search(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "s", {"learning_rate": [0.1, 0.2]}, sampler="random", trials=50)
    assert plan.trials == 2 and len(chosen(plan, 50)) == 2


def test_a_setting_whose_worker_died_is_taken_again_but_not_for_ever(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "s", {"learning_rate": [0.1, 0.2]})
    assert [chosen(plan, 1, tell=False) for _ in range(3)] == [[{"learning_rate": 0.1}]] * 3
    rows = {row["values"]["learning_rate"]: row for row in read_results(plan, open_study(plan))["settings"]}
    assert rows[0.1]["state"] == "running"  # nobody has looked yet
    assert chosen(plan, 9) == [{"learning_rate": 0.2}]
    rows = {row["values"]["learning_rate"]: row for row in read_results(plan, open_study(plan))["settings"]}
    assert rows[0.1]["state"] == "killed" and "3 of 3 times" in rows[0.1]["reason"]
    assert rows[0.2]["state"] == "finished" and len(rows) == 2
    assert rows[0.1]["setting"] == "0000"


def test_a_worker_elsewhere_is_dead_when_it_is_silent_and_keeps_its_folder(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "s", {"learning_rate": [0.1, 0.2]})
    study = open_study(plan)
    with Presence(plan.folder) as away:
        trial = take(plan, study, away)
        assert trial is not None
        host, _, *rest = away.name.rsplit(".", 3)
        elsewhere = ".".join([host, "0123456789ab", *rest])
        (plan.folder / "workers" / elsewhere).write_text("")
        trial.set_user_attr("worker", elsewhere)
    with Presence(plan.folder) as here:
        assert not here.gone(elsewhere) and not here.lost(elsewhere)
        second = take(plan, study, here)
        assert second is not None and second.params == {"learning_rate": 0.2}
        then = time.time() - STALE - TOUCH
        os.utime(plan.folder / "workers" / elsewhere, (then, then))
        assert not here.gone(elsewhere) and here.lost(elsewhere)
        again = take(plan, study, here)
        assert again is not None and again.params == trial.params
        assert again.user_attrs["folder"] != trial.user_attrs["folder"]
    assert trial.user_attrs["folder"] == "0000"


def test_half_a_line_at_the_end_is_dropped_and_a_broken_one_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "s")
    chosen(plan, 2)
    journal = plan.folder / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][:20])
    assert len(tried(open_study(plan), plan.space)) == 2
    assert journal.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines())
    journal.write_bytes(whole + b'{"op_code": 4, \n' + whole.splitlines(keepends=True)[-1])
    with pytest.raises(CheckpointError, match=r"sweep\.journal is damaged"):
        open_study(plan)


def test_another_sweep_in_the_folder_is_refused(tmp_path: Path) -> None:
    open_study(plan_of(tmp_path / "s"))
    open_study(plan_of(tmp_path / "s", trials=3))  # how much is tried may change
    with pytest.raises(
        ConfigError, match=r"was started with learning_rate: \[0\.1, 0\.2, 0\.3\], but now it is \[0\.1\]"
    ):
        open_study(plan_of(tmp_path / "s", {**GRID, "learning_rate": [0.1]}))
    with pytest.raises(ConfigError, match="was started with metric: 'loss', but now it is 'accuracy'"):
        open_study(plan_of(tmp_path / "s", metric="accuracy"))


def test_without_optuna_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'softprompt\[sweep\]'"):
        open_study(plan_of(tmp_path / "s"))
