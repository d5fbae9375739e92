"""A base model that is tuned along with its prompt, as P-tuning's few-shot tasks do (2103.10385, section 4).

It is saved in the run's folder beside the prompt, which is worth nothing without it, and is found there again. The two
are several files, and a process may be killed between any of them. So a base model comes with the digest of the prompt
it was saved with, the next one is there, whole, before the next prompt is, and whoever reads takes the one that belongs
to the prompt: a pair is never a mix of two steps.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt.checkpoint import WEIGHTS_NAME, load_adapter
from softprompt.checkpoint.files import sync_folder
from softprompt.errors import CheckpointError, SoftPromptError
from softprompt.loading import quietly
from softprompt.model import SoftPromptModel
from softprompt.train.run_folder import BASE

_NEXT, _LAST = f"{BASE}.tmp", f"{BASE}.old.tmp"
_TIE = "prompt.sha256"  # in the base model's folder; without it, the base is taken for the prompt's


def tune_base(model: SoftPromptModel, folder: Path) -> None:
    """Let the base model train too; what is saved names the base that will lie in the run's folder."""
    model.get_base_model().requires_grad_(True)
    name = model.active_adapter
    model.peft_config[name] = replace(model.peft_config[name], base_model_name_or_path=str(folder / BASE))


def save_with_base(
    model: SoftPromptModel, tokenizer: PreTrainedTokenizerBase, folder: Path, keep_encoder: bool = False
) -> None:
    """Write the prompt and its base model with its tokenizer, so that the folder holds a pair at every moment.

    CheckpointError where there is no room for them; the pair that was there before stays.
    """
    new = folder / _NEXT
    with _room(folder / BASE):
        _settle(folder)
        shutil.rmtree(new, ignore_errors=True)
        try:
            with quietly():
                model.get_base_model().save_pretrained(new)
            tokenizer.save_pretrained(new)
            (new / _TIE).write_text(_digest(model.encoder().saved_tensors()["prompt_embeddings"]) + "\n")
            _sync(new)
            model.save_pretrained(folder, keep_encoder=keep_encoder)
        except BaseException:
            with suppress(CheckpointError):
                if tuned_base(folder) != new:  # as long as the prompt in the folder is the earlier one
                    shutil.rmtree(new, ignore_errors=True)
            raise
        _put_in_place(folder)


def restore_base(model: SoftPromptModel, folder: Path) -> None:
    """The base model's weights as they were saved with the prompt in the folder."""
    base, place = model.get_base_model(), tuned_base(folder)
    if place is None:
        raise CheckpointError(f"{folder / BASE} is not there; start a new run in another `out`")
    with quietly():
        saved = type(base).from_pretrained(place, dtype=base.dtype)
    base.load_state_dict(saved.state_dict())


def tuned_base(folder: Path) -> Path | None:
    """The base model that was tuned along with the prompt in this folder, if one was.

    CheckpointError where what is there was tuned along with another prompt.
    """
    there = [place for place in (folder / BASE, folder / _NEXT) if (place / "config.json").is_file()]
    if not there or not (folder / WEIGHTS_NAME).is_file():
        return folder / BASE if folder / BASE in there else None
    prompt = _digest(load_adapter(folder).tensors["prompt_embeddings"])
    for place in there:
        if _tie(place) == prompt or (place.name == BASE and not _tie(place)):
            return place
    raise CheckpointError(
        f"{folder / BASE} does not belong to the prompt beside it, which was saved at another step; resume the run, or "
        "copy both again"
    )


def _settle(folder: Path) -> None:
    """Put the base model of the prompt in the folder into its place, where a killed process did not come to that."""
    with suppress(CheckpointError):  # nothing fits, so nothing is put anywhere
        if tuned_base(folder) == folder / _NEXT:
            _put_in_place(folder)


def _put_in_place(folder: Path) -> None:
    shutil.rmtree(folder / _LAST, ignore_errors=True)
    if (folder / BASE).exists():
        (folder / BASE).rename(folder / _LAST)
    (folder / _NEXT).rename(folder / BASE)
    sync_folder(folder)
    shutil.rmtree(folder / _LAST, ignore_errors=True)


@contextmanager
def _room(target: Path) -> Iterator[None]:
    """A full or read-only disk as a CheckpointError; the libraries that write have errors of their own for it."""
    try:
        yield
    except SoftPromptError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise CheckpointError(
            f"{target} cannot be written: {reason}; free some space or choose another `out`"
        ) from None


def _tie(place: Path) -> str:
    """The digest of the prompt that a base model was saved with, "" where it does not say."""
    file = place / _TIE
    return file.read_text().strip() if file.is_file() else ""


def _digest(prompt: Tensor) -> str:
    return hashlib.sha256(prompt.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()


def _sync(folder: Path) -> None:
    """Flush a folder and its files to the disk."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)
