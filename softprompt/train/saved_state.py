"""All that a run needs to go on with the same bits, as one dictionary of tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from softprompt.errors import CheckpointError, ConfigError
from softprompt.train.run_result import Progress

if TYPE_CHECKING:
    from softprompt.train.trainer import Trainer

APART = 1_000_003  # what the seeds of two processes differ by


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The state of a run, that of every process; each of them has to ask."""
    team, cuda = trainer.team, trainer.device.type == "cuda"
    own = {"rng": torch.get_rng_state(), "batches": trainer.batches.state()}
    own["cuda_rng"] = torch.cuda.get_rng_state(trainer.device) if cuda else None
    return {
        "progress": vars(trainer.progress),
        "trainable": {name: parameter.detach().cpu() for name, parameter in trainer.trainable.items()},
        "fixed": {name: buffer.cpu() for name, buffer in trainer.fixed.items()},
        "optimizer": trainer.optimizer.state_dict(),
        "processes": team.gather(own),
        "data": trainer.data.fingerprint(),
    }


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put a run back to a saved state.

    ``ConfigError`` when the data or the model is not what it was, ``CheckpointError`` when parts of it are missing.
    """
    try:
        _restore(trainer, state)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        place = trainer.folder.path / "checkpoint"
        raise CheckpointError(f"{place} is damaged ({reason}); start a new run in another `out`") from None


def _restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    place = trainer.folder.path
    if state["data"] != trainer.data.fingerprint():
        raise ConfigError(
            f"the data of the run in {place} has changed since it was saved; resume with the same files, or start a "
            "new run in another `out`"
        )
    stored, own = {**state["trainable"], **state.get("fixed", {})}, {**trainer.trainable, **trainer.fixed}
    if {name: tuple(each.shape) for name, each in stored.items()} != {n: tuple(e.shape) for n, e in own.items()}:
        raise ConfigError(f"the state in {place} belongs to another model or method; start a new run")
    with torch.no_grad():
        for name, each in own.items():
            each.copy_(stored[name])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.progress = Progress(**state["progress"])
    _restore_process(trainer, state["processes"])


def _restore_process(trainer: Trainer, stored: list[dict[str, Any]]) -> None:
    """What each process has of its own: random numbers and its place in a stream."""
    team = trainer.team
    if len(stored) != team.size:
        trainer.batches.restore(stored[0]["batches"])
        trainer.console.print(
            f"{team.size} processes go on with what {len(stored)} began: the same rows, but other random numbers",
            highlight=False,
        )
        torch.manual_seed(trainer.recipe.seed + APART * (team.rank + team.size * trainer.progress.step))
        return
    own = stored[team.rank]
    torch.set_rng_state(own["rng"])
    if own["cuda_rng"] is not None and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda_rng"], trainer.device)
    trainer.batches.restore(own["batches"])
