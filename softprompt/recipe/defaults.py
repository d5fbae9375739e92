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
    task_learning_rate: float | None = None  # of what each of several tasks has of its own
    distillation: float | None = None
    temperature: float | None = None
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

AUTO = "auto"  # the name under which a recipe asks for the method that is best for its task

# Methods by task, the best first; the first that can do what a recipe asks is taken. Held-out loss of prefix, P- and
# prompt tuning with their defaults, the same steps for each (e2e.md, sst2.md and defaults.md in benchmarks/results):
# CAUSAL_LM stories260K 2.82, 3.32, 3.34, the embedded model 2.05, 2.65, 2.68; SEQ_2_SEQ_LM transliteration 0.15, 1.14,
# 1.16, a tiny T5 6.3, 7.1, 7.0; CLOZE stories260K 0.37, 1.07, 0.99, the T5 1.23, 1.53, 1.83; SEQ_CLS stories260K 0.14,
# 0.29, 1.04, MiniLM on SST-2 0.40, 0.41 (82.0 and 81.6 % right).
BEST: dict[str, tuple[str, ...]] = {
    "CAUSAL_LM": ("prefix_tuning", "p_tuning", "prompt_tuning"),
    "SEQ_2_SEQ_LM": ("prefix_tuning", "p_tuning", "prompt_tuning"),
    "SEQ_CLS": ("prefix_tuning", "p_tuning", "prompt_tuning"),
    "CLOZE": ("prefix_tuning", "p_tuning", "prompt_tuning"),
}

# The causal rows are measured in benchmarks/results/e2e_defaults.md (E2E, two small Llamas). In short:
# - Little momentum and a short memory for squared gradients: a run is a few hundred steps, and its first gradients are
#   many times its later ones. With beta2 at 0.999 the steps stay small for most of it.
# - The embedding methods train with Muon, which moves all directions of a matrix equally far; P-tuning gains the most.
# - A prefix starts from training examples and is trained directly; the FFN is worth having only from a random start.
# In benchmarks/results/defaults.md, stories260K: neither cosine nor no decay, no warm-up, weight decay, clipping at
# 0.1 or not at all was better by more than the noise. A bfloat16 base under a float32 prompt loses nothing (3.00, as in
# float32). The best of four draws (init_candidates) is seldom better than one; it finds out where examples are no good
# start, as on encoder-decoders.
_TABLE: dict[tuple[str, str], Defaults] = {
    ("prompt_tuning", "CAUSAL_LM"): Defaults(learning_rate=0.3, optimizer="muon", beta1=0.7),
    ("prompt_tuning", "SEQ_CLS"): Defaults(learning_rate=0.05, init="random"),
    ("p_tuning", "CAUSAL_LM"): Defaults(
        learning_rate=1e-2,
        optimizer="muon",
        beta1=0.8,
        method_options={"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 256},
    ),
    # SEQ_CLS: all-MiniLM-L6-v2 on SST-2, batches of 16, loss on 300 dev sentences (0.693 is chance). Muon from a
    # training sentence 0.40 after 300 steps. AdamW after 120: from a training sentence 0.47, at random 0.53.
    ("p_tuning", "SEQ_CLS"): Defaults(
        learning_rate=1e-2,
        head_learning_rate=0.02,
        optimizer="muon",
        beta1=0.8,
        method_options={"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 256},
    ),
    ("prefix_tuning", "CAUSAL_LM"): Defaults(
        learning_rate=0.4,
        beta1=0.6,
        beta2=0.8,
        method_options={"prefix_projection": False},
    ),
    # Six source tasks on the embedded model, 150 steps of 16: mean held-out loss 0.943; with a task_learning_rate of
    # 0.02 1.002, of 0.1 0.962, and then without teachers 1.039, at temperature 1 0.974, with AdamW (0.1 for all) 1.091.
    ("multitask_prompt_tuning", "CAUSAL_LM"): Defaults(
        learning_rate=0.3,
        task_learning_rate=0.3,
        distillation=0.9,
        temperature=2.0,
        optimizer="muon",
        beta1=0.7,
    ),
    # Encoder-decoders, benchmarks/results/defaults.md: 48 steps of 8 on a transliteration model (held-out loss; frozen
    # 2.01) and on a T5 of 0.5M trained in minutes. A prefix at random 0.15 (the T5: 6.35), from examples, which the two
    # stacks do not read as they read a row, 0.23 (6.28); then with betas of 0.9, 0.999 0.42, with a third of the rate
    # 0.40, with three times the rate 0.36, with a prefix of cross-attention too 0.25.
    ("prefix_tuning", "SEQ_2_SEQ_LM"): Defaults(
        learning_rate=0.4,
        beta1=0.6,
        beta2=0.8,
        init="random",
        method_options={"prefix_projection": False},
    ),
    # Three times the rate of decoders: 1.14, not 1.25, and prompt tuning 1.16, not 1.29; on the T5 no difference.
    ("p_tuning", "SEQ_2_SEQ_LM"): Defaults(
        learning_rate=3e-2,
        optimizer="muon",
        beta1=0.8,
        method_options={"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 256},
    ),
    ("prompt_tuning", "SEQ_2_SEQ_LM"): Defaults(learning_rate=0.9, optimizer="muon", beta1=0.7),
    # CLOZE, in the same table: which of four kinds a text is of, 48 steps of 8, on stories260K (frozen 1.52) and the T5
    # (2.74): one word per row gives gradients of a higher variance. At 0.12 0.37 and 1.23, at the 0.4 of text to write
    # 1.32 and 1.33, at 0.04 0.92 and 1.53.
    ("prefix_tuning", "CLOZE"): Defaults(
        learning_rate=0.12,
        beta1=0.6,
        beta2=0.8,
        method_options={"prefix_projection": False},
    ),
    # There at 0.01 0.99 and 1.77, at 0.03 1.07 (within the noise) and 1.53. Prompt tuning has the row of texts: a third
    # of its rate is a little better on the one (0.89, not 0.99), and worse on the other (2.43, not 1.83).
    ("p_tuning", "CLOZE"): Defaults(
        learning_rate=3e-2,
        optimizer="muon",
        beta1=0.8,
        method_options={"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 256},
    ),
    # As P-tuning's row, 120 steps: 0.42, with a learning rate of 3e-2 0.43, of 0.3 0.70; through the FFN at 1e-2, 0.70.
    # That was at random, and from training sentences as good. Which of four kinds a text is of (defaults.md, as above):
    # on MiniLM both are right after 40 steps, on a decoder (stories260K) at random 1.19, from training texts 0.14.
    # Since heads start from a regression (train/head_start.py), on 2,000 sentences of SST-2, 60 steps of 16, 300 test
    # sentences: 73 % right, with the head at 0.1 68 %, with a third of both rates 69 %; after 240 steps 77 %. A head as
    # it is given, at 0.1: 48 % after either.
    ("prefix_tuning", "SEQ_CLS"): Defaults(
        learning_rate=0.1,
        head_learning_rate=0.01,
        method_options={"prefix_projection": False},
    ),
    # A cartridge is a prefix without FFN. The demo's data, the embedded model, 60 steps, held-out loss (3.70 before):
    # 0.93; with a learning rate of 0.1 1.67, and with the fallback's settings 3.17. A prefix there: 0.91.
    ("cartridge", "CAUSAL_LM"): Defaults(learning_rate=0.4, beta1=0.6, beta2=0.8),
    # As above, from 64 tokens of training examples (3.60 before). On so small a model the radii of PEFT's defaults hold
    # the prompt in its place: 3.59, whatever the optimiser. With both at 3 3.32 at a learning rate of 0.3, and 3.10 at
    # 0.03 (then with decaying weights); with both at 10 2.71 at 0.3.
    ("cpt", "CAUSAL_LM"): Defaults(num_virtual_tokens=64, learning_rate=0.03, optimizer="muon", beta1=0.7),
}


def defaults_for(method: str, task: str) -> Defaults:
    """The row of a method and task; the method's causal row when the task has none, then ``FALLBACK``."""
    return _TABLE.get((method, task)) or _TABLE.get((method, "CAUSAL_LM")) or FALLBACK
