"""A base model that is tuned along with its prompt, as P-tuning's few-shot tasks do (2103.10385, section 4).

It is saved in the run's folder beside the prompt, which is worth nothing without it, and is found there again.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from softprompt.errors import CheckpointError
from softprompt.loading import quietly
from softprompt.model import SoftPromptModel
from softprompt.train.run_folder import BASE


def tune_base(model: SoftPromptModel, folder: Path) -> None:
    """Let the base model train too; what is saved names the base that will lie in the run's folder."""
    model.get_base_model().requires_grad_(True)
    name = model.active_adapter
    model.peft_config[name] = replace(model.peft_config[name], base_model_name_or_path=str(folder / BASE))


def save_base(model: SoftPromptModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the base model with its tokenizer, whole, before an earlier one goes."""
    target, new, old = (folder / name for name in (BASE, f"{BASE}.tmp", f"{BASE}.old.tmp"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        with quietly():
            model.get_base_model().save_pretrained(new)
        tokenizer.save_pretrained(new)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or "the files could not be written to their end"
        raise CheckpointError(
            f"{target} cannot be written: {reason}; free some space or choose another `out`"
        ) from None


def restore_base(model: SoftPromptModel, folder: Path) -> None:
    """The base model's weights as they were saved."""
    base = model.get_base_model()
    with quietly():
        saved = type(base).from_pretrained(folder / BASE, dtype=base.dtype)
    base.load_state_dict(saved.state_dict())


def tuned_base(folder: Path) -> Path | None:
    """The base model that was tuned along with the prompt in this folder, if it was."""
    place = folder / BASE
    return place if (place / "config.json").is_file() else None
