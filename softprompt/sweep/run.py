"""Running a sweep: in this process, or in several that share its folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from rich.console import Console

from softprompt.errors import ConfigError, RunInterrupted, SoftPromptError, TrainingError
from softprompt.sweep.plan import Plan
from softprompt.sweep.results import write_results
from softprompt.sweep.study import ATTEMPTS, check_folder, locked, open_study
from softprompt.sweep.worker import work

PRELOAD = ["softprompt.sweep.worker", "softprompt.train", "optuna"]
INTERRUPTED = 130  # exit status of a worker that was asked to stop


def run_sweep(plan: Plan, jobs: int = 1, console: Console | None = None) -> dict[str, Any]:
    """Try the plan's settings, with ``jobs`` worker processes, and return what ``sweep.json`` holds.

    A sweep in the folder is gone on with; other commands may work on it at the same time. Raises ``RunInterrupted``
    when stopped by Ctrl-C or SIGTERM (the runs under way have saved their states), ``TrainingError`` when no setting
    works, and ``ConfigError`` or ``CheckpointError`` for a folder that holds something else.
    """
    console = console or Console(stderr=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a sweep is not started by torchrun or accelerate; start it by itself, with --jobs for more processes"
        )
    check_folder(plan.folder)
    if jobs == 1:
        work(plan, console)
    else:
        _in_processes(plan, jobs, console)
    study = open_study(plan)
    with locked(plan.folder):
        results = write_results(plan, study)
    failed = [row for row in results["settings"] if row["state"] == "failed"]
    if failed and len(failed) == len(results["settings"]):
        raise TrainingError(f"all {len(failed)} settings failed; the first: {failed[0]['reason']}")
    return results


def _in_processes(plan: Plan, jobs: int, console: Console) -> None:
    """Workers as processes of their own. What a killed one leaves behind is taken up by new ones, a few times."""
    open_study(plan)  # a folder of another sweep is told once, not by each of them
    for _ in range(ATTEMPTS):
        statuses = _round(plan, jobs)
        if not any(statuses):
            return
        if INTERRUPTED in statuses:
            raise RunInterrupted(f"stopped; run the same command again to go on with the sweep in {plan.folder}")
        if any(status > 0 for status in statuses):
            raise TrainingError("a worker of the sweep has failed; its error stands above")
        console.print("a worker was killed; what it left is taken up again", highlight=False)
    raise TrainingError(
        f"the workers of the sweep in {plan.folder} were killed {ATTEMPTS} times; use fewer --jobs if memory is short"
    )


def _round(plan: Plan, jobs: int) -> list[int]:
    """Start the workers and wait for all of them; returns their exit statuses. A wish to stop is passed on."""
    from softprompt.train.progress import StopRequest

    context = multiprocessing.get_context("forkserver")  # imports once; nothing of this process is copied
    context.set_forkserver_preload(PRELOAD)
    workers: list[BaseProcess] = [context.Process(target=_worker, args=(plan, n, jobs)) for n in range(jobs)]
    with StopRequest() as stop:
        for worker in workers:
            worker.start()
        asked = False
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)
                if stop.requested and not asked:
                    asked = True
                    for each in workers:
                        each.terminate()
    statuses = [worker.exitcode or 0 for worker in workers]
    return [INTERRUPTED if asked and status < 0 else status for status in statuses]


def _leave(number: int, frame: FrameType | None) -> None:
    """Between runs, and while one is loading, nothing is to be saved; but locks are given back on the way out."""
    sys.exit(INTERRUPTED)


def _worker(plan: Plan, number: int, jobs: int) -> None:
    """One worker process: its share of the cores or a GPU of its own, and errors in one line."""
    import torch
    from transformers.utils import logging

    signal.signal(signal.SIGTERM, _leave)  # while a run trains, its own handler stands in for this one
    os.setsid()  # Ctrl-C reaches the command alone, which passes it on: a second signal would stop a run unsaved
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    console = Console(stderr=True)
    try:
        work(plan, console)
    except (RunInterrupted, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except (SoftPromptError, OSError) as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
