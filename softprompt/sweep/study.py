"""The books of a sweep: an Optuna study in OUT/sweep.journal, and who works on what.

Optuna's journal is a file that every process only appends to, under a lock that is a file too: many workers share it
safely, on network disks as well, where SQLite's locks cannot be trusted. Choosing the next setting takes a second such
lock, so that no setting is ever chosen twice, whatever the sampler and however many the workers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.errors import CheckpointError, ConfigError
from softprompt.sweep.plan import Plan
from softprompt.sweep.presence import Presence
from softprompt.sweep.space import Space

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

JOURNAL = "sweep.journal"
ATTEMPTS = 3  # a setting whose worker was killed that often is not tried again
TIRED = 30  # proposals in a row that have all been tried


@dataclass
class Tried:
    """One setting with its trials: the ``first``, the one that ``counts`` if any, the last that was ``left`` undone.

    A trial is left by a worker that was stopped or killed; only ``kills`` are counted.
    """

    first: FrozenTrial
    counts: FrozenTrial | None = None
    left: FrozenTrial | None = None
    kills: int = 0


@contextlib.contextmanager
def locked(folder: Path, name: str = "sweep") -> Iterator[None]:
    """Alone among the workers of a sweep; with the journal's name, alone at the journal."""
    from optuna.storages.journal import JournalFileOpenLock

    lock = JournalFileOpenLock(str(folder / name))
    lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # held for so long that another one broke it
            lock.release()


def check_folder(folder: Path) -> None:
    """``ConfigError`` for a folder that holds something, but no sweep."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"the sweep's folder {folder} is a file; choose another `out`")
    if folder.is_dir() and not (folder / JOURNAL).exists() and any(folder.iterdir()):
        raise ConfigError(f"the sweep's folder {folder} holds something, but no sweep; choose another `out`")


def open_study(plan: Plan) -> Study:
    """The study in the sweep's folder, a new one or the one that others work on.

    ``ConfigError`` when that one is another sweep, or without Optuna; ``CheckpointError`` when it cannot be read.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    except ImportError:
        raise ConfigError("a sweep needs Optuna; install it with: pip install 'softprompt[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    check_folder(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    journal = plan.folder / JOURNAL
    pruner = optuna.pruners.MedianPruner() if plan.prune else optuna.pruners.NopPruner()
    with locked(plan.folder):
        _mend(plan.folder)
        try:
            backend = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
            storage = optuna.storages.JournalStorage(backend)
            study = optuna.create_study(
                study_name="sweep", storage=storage, direction=plan.direction, pruner=pruner, load_if_exists=True
            )
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{journal} is damaged ({error}); start a new sweep in another `out`") from None
        _agree(study, plan)
    return study


def _mend(folder: Path) -> None:
    """Drop the half line that a full disk left at the end of the journal: the next one would be lost with it."""
    if not (folder / JOURNAL).exists():
        return
    with locked(folder, JOURNAL), open(folder / JOURNAL, "r+b") as file:
        written = file.read()
        if written and not written.endswith(b"\n"):
            file.truncate(written.rfind(b"\n") + 1)


def _agree(study: Study, plan: Plan) -> None:
    """The first command says what the sweep is; the others must mean the same."""
    own = plan.definition()
    stored = study.user_attrs.get("definition")
    if stored is None:
        study.set_user_attr("definition", own)
        return
    for part in own:
        before, now = stored.get(part), json.loads(json.dumps(own[part]))
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            name = next(name for name in [*now, *before] if before.get(name) != now.get(name))
            part, before, now = name, before.get(name), now.get(name)
        raise ConfigError(
            f"the sweep in {plan.folder} was started with {part}: {before!r}, but now it is {now!r}; go on with the "
            "same settings, or choose another `out`"
        )


def tried(study: Study, space: Space) -> dict[str, Tried]:
    """Every setting so far, each once, in the order in which they were chosen."""
    found: dict[str, Tried] = {}
    for trial in study.get_trials(deepcopy=False):
        if not space.complete(trial.params) or "same_as" in trial.user_attrs:
            continue
        entry = found.setdefault(identity(trial.params), Tried(trial))
        if trial.state.name == "FAIL" and "reason" not in trial.user_attrs:
            entry.left, entry.kills = trial, entry.kills + ("stopped" not in trial.user_attrs)
        elif trial.state.name != "WAITING":
            entry.counts = trial
    return {name: entry for name, entry in found.items() if entry.counts or entry.left}


def identity(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def take(plan: Plan, study: Study, presence: Presence) -> Trial | None:
    """The next trial for this worker, or None when nothing is left to start.

    First come the settings whose worker was stopped or killed: their finished runs are kept, the one under way is
    resumed. The caller holds the sweep's lock.
    """
    _reap(study, presence)
    known = tried(study, plan.space)
    wanted = next((dict(each.first.params) for each in known.values() if _again(each)), None)
    if wanted is None and len(known) >= plan.trials:
        return None
    if wanted is None and plan.sampler == "grid":
        wanted = next((cell for cell in plan.space.grid() if identity(cell) not in known), None)
    for _ in range(TIRED):
        if wanted is not None and not study.get_trials(deepcopy=False, states=(_state("WAITING"),)):
            study.enqueue_trial(wanted)
        trial = _ask(plan, study, presence)
        same = known.get(identity(trial.params))
        if same is None or same.counts is None:
            trial.set_user_attr("folder", _folder(trial, same, presence))
            return trial
        trial.set_user_attr("same_as", same.first.number)
        study.tell(trial, state=_state("FAIL"))
    return None


def _again(entry: Tried) -> bool:
    return entry.counts is None and entry.kills < ATTEMPTS


def _ask(plan: Plan, study: Study, presence: Presence) -> Trial:
    study.sampler = _sampler(plan, len(study.get_trials(deepcopy=False)))
    trial = study.ask()
    trial.set_user_attr("worker", presence.name)
    plan.space.suggest(trial)
    return trial


def _folder(trial: Trial, before: Tried | None, presence: Presence) -> str:
    """What a trial's run folders are called: as those that were left, unless their worker may be alive after all."""
    left = before.left.user_attrs if before and before.left else {}
    return left["folder"] if "folder" in left and presence.gone(left["worker"]) else f"{trial.number:04d}"


def _sampler(plan: Plan, drawn: int) -> BaseSampler:
    """A sampler for one proposal, seeded by how many there were: workers differ, a sweep done again does not."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = plan.space.seeds[0] + drawn
    return TPESampler(seed=seed) if plan.sampler == "tpe" else RandomSampler(seed=seed)


def _reap(study: Study, presence: Presence) -> None:
    """Close the trials of workers that are no more; without a reason they count as killed."""
    for trial in study.get_trials(deepcopy=False, states=(_state("RUNNING"),)):
        if presence.lost(trial.user_attrs.get("worker")):
            study.tell(trial.number, state=_state("FAIL"), skip_if_finished=True)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
