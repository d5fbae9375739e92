"""Every error a user can cause. Each message is one sentence that names the thing, the value and the remedy.

All are `ValueError`s, because that is what people who come from PEFT already catch. The command line prints the
message alone, without a traceback, and exits with status 2.
"""


class SoftPromptError(ValueError):
    """Base of all errors raised on purpose by this package."""


class ConfigError(SoftPromptError):
    """A configuration or recipe that cannot mean anything: an unknown field, a wrong type, a contradiction."""


class CheckpointError(SoftPromptError):
    """A saved prompt that is missing, damaged, hostile, or made for another base model."""


class DataError(SoftPromptError):
    """Training or evaluation data that cannot be used as it is."""


class UnsupportedError(SoftPromptError):
    """A combination of method, model family and task that does not exist here; the message says what does."""


class RowsError(SoftPromptError):
    """Some rows of a batch whose adapters cannot be used; nothing has run, and the other rows can go on without them.

    `errors` has the error of each such row, by its number in the batch.
    """

    def __init__(self, errors: dict[int, SoftPromptError]) -> None:
        self.errors = errors
        first = min(errors)
        others = f" (and rows {', '.join(str(row) for row in sorted(errors)[1:])})" if len(errors) > 1 else ""
        super().__init__(f"row {first}{others}: {errors[first]}")


class TrainingError(SoftPromptError):
    """A run that cannot go on: a loss that is not a number, a run folder that belongs to another run."""


class RunInterrupted(TrainingError):
    """A run that was asked to stop (Ctrl-C, SIGTERM) and has saved all it needs to go on."""
