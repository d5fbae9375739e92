"""Default hyper-parameters: one table, one row per method and task.

A recipe field left at None takes its value from here. To change a default, change a number below and say in the
comment beside it what was measured. A method without a row (one that somebody has just added) gets ``FALLBACK``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Defaults:
    """What a recipe takes when it does not say."""

    num_virtual_tokens: int = 20
    init: str = "examples"
    learning_rate: float = 1e-2
    head_learning_rate: float = 1e-3  # a classification head learns beside the prompt, usually more slowly
    steps: int = 300
    batch_size: int = 16
    warmup: float = 0.06  # share of all steps
    schedule: str = "linear"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    method_options: Mapping[str, Any] = field(default_factory=dict)


FALLBACK = Defaults()

# First guesses from PEFT's numbers on a tiny Llama and E2E, to be replaced by sweeps.
_TABLE: dict[tuple[str, str], Defaults] = {
    ("prompt_tuning", "CAUSAL_LM"): Defaults(learning_rate=0.1),
    ("prompt_tuning", "SEQ_CLS"): Defaults(learning_rate=0.05, init="random"),
    ("p_tuning", "CAUSAL_LM"): Defaults(
        learning_rate=5e-3,
        init="examples",
        method_options={"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 256},
    ),
    ("p_tuning", "SEQ_CLS"): Defaults(
        learning_rate=5e-3,
        init="random",
        method_options={"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 256},
    ),
    ("prefix_tuning", "CAUSAL_LM"): Defaults(
        learning_rate=5e-3,
        init="examples",
        method_options={"prefix_projection": True, "encoder_hidden_size": 256},
    ),
    ("prefix_tuning", "SEQ_CLS"): Defaults(
        learning_rate=5e-3,
        init="random",
        method_options={"prefix_projection": True, "encoder_hidden_size": 256},
    ),
}


def defaults_for(method: str, task: str) -> Defaults:
    """The row of a method and task; the method's causal row when the task has none, then ``FALLBACK``."""
    return _TABLE.get((method, task)) or _TABLE.get((method, "CAUSAL_LM")) or FALLBACK
