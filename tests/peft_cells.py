"""The grid method × family × head between PEFT and this library, and where PEFT has nothing to compare with.

Used by test_peft_grid.py. A cell's prompt and heads are random and matter; both libraries are asked for what they say
about real tokens, on rows that PEFT gets right: without padding on the left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import hf_cache
import peft
import pytest
import tiny
import torch
from torch import Tensor, nn

import softprompt

TOKENS = 4
TASKS = torch.tensor([1, 0, 1])
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "PROMPT_TUNING": ("PromptTuningConfig", {}),
    "P_TUNING": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {}),
    "MULTITASK_PROMPT_TUNING": ("MultitaskPromptTuningConfig", {"num_tasks": 2, "num_ranks": 2}),
    "CPT": (
        "CPTConfig",
        {"cpt_token_ids": [5, 60, 7, 80], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]}
        | {"opt_projection_epsilon": 8.0, "opt_projection_format_epsilon": 8.0},
    ),
    "CARTRIDGE": ("CartridgeConfig", {"num_frozen_tokens": 1}),
}
FAMILIES = ("gpt2", "llama", "t5", "bart", "bert")
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")


@dataclass(frozen=True)
class Cell:
    """One method before one head of one family."""

    method: str
    family: str
    task: str

    def __str__(self) -> str:
        return f"{self.family}-{self.task}-{self.method}"

    @property
    def decodes(self) -> bool:
        """Whether the caller gives the decoder's row too."""
        return self.family in ("t5", "bart") and self.task in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")

    @property
    def keys(self) -> bool:
        return self.method in KEYS_AND_VALUES

    @property
    def shares_cache(self) -> bool:
        """Whether PEFT gives both of a decoder's attentions one cache by default (t5's TOKEN_CLS is an encoder)."""
        others = self.task not in ("SEQ_2_SEQ_LM", "TOKEN_CLS")
        return self.keys and self.family in ("t5", "bart") and others

    def base(self) -> Any:
        return families.build(self.family, self.task)

    def config(self, library: Any, **more: Any) -> Any:
        """The same settings as a config of either library."""
        name, own = METHODS[self.method]
        length = {} if self.method == "CPT" else {"num_virtual_tokens": TOKENS}
        task = None if self.task == "MASKED_LM" else self.task
        return getattr(library, name)(**{"task_type": task, **length, **own, **more})

    def theirs(self, **more: Any) -> Any:
        """A model of PEFT's whose prompt and head are random."""
        return randomised(peft.get_peft_model(self.base(), self.config(peft, **more)))

    def ours(self, **more: Any) -> Any:
        return randomised(softprompt.get_peft_model(self.base(), self.config(softprompt, **more)))

    def load_theirs(self, folder: Path) -> Any:
        return peft.PeftModel.from_pretrained(self.base(), str(folder)).eval()

    def load_ours(self, folder: Path) -> Any:
        return softprompt.SoftPromptModel.from_pretrained(self.base(), folder)

    def batch(self) -> dict[str, Tensor]:
        """Three rows, shorter ones padded on the right.

        All of one length for heads that score a row's end, and where PEFT widens the mask of an encoder for keys and
        values that only the decoder has.
        """
        widened = self.keys and self.family in ("t5", "bart") and self.task != "SEQ_2_SEQ_LM"
        even = widened or (self.task == "SEQ_CLS" and self.family != "bert")
        batch = tiny.ragged((6, 6, 6) if even else (5, 9, 7), seed=1)
        ends = batch["attention_mask"].sum(1) - 1
        batch["input_ids"][torch.arange(3), ends] = tiny.EOS
        if self.decodes:
            batch["decoder_input_ids" if self.task == "FEATURE_EXTRACTION" else "labels"] = tiny.ragged((4, 4, 4))[
                "input_ids"
            ]
        return batch | ({"task_ids": TASKS} if self.method == "MULTITASK_PROMPT_TUNING" else {})

    def refusal(self) -> tuple[str, type[Exception], str] | None:
        """When PEFT refuses the cell (`make` or `run`), and how. None where it runs."""
        encoder_decoder = self.family in ("t5", "bart")
        if self.method == "CPT" and self.task != "CAUSAL_LM":
            return "make", ValueError, "only supports task_type = CAUSAL_LM"
        if self.task == "MASKED_LM":
            return "make", KeyError, "None"
        if self.method == "MULTITASK_PROMPT_TUNING" and self.task in ("QUESTION_ANS", "FEATURE_EXTRACTION"):
            return "run", ValueError, "task_ids cannot be None"
        if not encoder_decoder:
            return None
        return _HEADS_OF_ENCODER_DECODERS.get((self.family, self.task, self.keys))


_HEADS_OF_ENCODER_DECODERS: dict[tuple[str, str, bool], tuple[str, type[Exception], str]] = {
    ("t5", "SEQ_CLS", False): ("run", NotImplementedError, "Passing input embeddings is currently not supported"),
    ("bart", "SEQ_CLS", False): ("run", NotImplementedError, "Passing input embeddings is currently not supported"),
    ("t5", "QUESTION_ANS", False): ("run", ValueError, "`input_ids` cannot be `None`"),
    ("bart", "QUESTION_ANS", False): ("run", ValueError, "`input_ids` cannot be `None`"),
    ("t5", "SEQ_CLS", True): ("run", ValueError, "exactly one of input_ids or inputs_embeds"),
    ("bart", "SEQ_CLS", True): ("run", AttributeError, "cls_layer_name"),
    ("t5", "TOKEN_CLS", True): ("run", ValueError, "does not support past key values"),
    ("bart", "QUESTION_ANS", True): ("run", AttributeError, "hidden_states"),
}


def cells() -> Iterator[Cell]:
    """Every method × family × head that transformers has for the family."""
    for family in FAMILIES:
        for task in families.FAMILIES[family].tasks:
            for method in METHODS:
                yield Cell(method, family, task)


LAGS = "cache" in hf_cache.given(tiny.build("llama"), None)
"""Whether transformers calls a cache what PEFT 0.21 does not know; its prompts are then lost in `generate`."""


def randomised(model: Any) -> Any:
    """Every trainable number moved far enough to matter, the head's too."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def outputs(cell: Cell, model: nn.Module, **more: Any) -> Tensor:
    """What the head says about rows `[B, C]` or real tokens `[N, C]`; PEFT has p more positions in front.

    Skips where PEFT looks for a cache by the name that transformers gave it before 5.24, and so refuses a classifier.
    """
    states = cell.method in ("PREFIX_TUNING", "CARTRIDGE") and cell.task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    if LAGS and states and isinstance(model, peft.PeftModel):
        pytest.skip("peft 0.21 refuses keys and values before a classifier of transformers 5.24")
    batch = {**cell.batch(), **more}
    return real(cell, model(**batch, return_dict=True), batch)


def real(cell: Cell, found: Any, batch: dict[str, Tensor]) -> Tensor:
    if cell.task == "QUESTION_ANS":
        values = torch.stack([found.start_logits, found.end_logits], dim=-1)
    else:
        values = found.logits if "logits" in found else found.last_hidden_state
    if cell.task == "SEQ_CLS":
        return values
    if cell.decodes:
        return values[:, -4:].flatten(0, 1)
    return values[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


def generated(cell: Cell, model: Any, **more: Any) -> Tensor:
    """Greedy tokens after one row without padding."""
    row = tiny.ragged((6,), seed=2)
    if cell.method == "MULTITASK_PROMPT_TUNING":
        row["task_ids"] = TASKS[:1]
    return model.generate(**row, max_new_tokens=8, do_sample=False, **more)[:, -8:]


def grid() -> list[str]:
    """The table of docs/peft.md."""
    lines = ["| model and head | equal both ways | PEFT cannot run | PEFT runs wrongly |", "|---|---|---|---|"]
    for family in FAMILIES:
        for task in families.FAMILIES[family].tasks:
            row = [Cell(method, family, task) for method in METHODS]
            wrong = [cell.method for cell in row if cell.shares_cache and cell.refusal() is None]
            refused = [cell.method for cell in row if cell.refusal() is not None]
            equal = [cell.method for cell in row if cell.method not in (*wrong, *refused)]
            shown = [", ".join(each) if len(each) < len(row) else "all" for each in (equal, refused, wrong)]
            name = "no task type (masked LM)" if task == "MASKED_LM" else task
            lines.append(f"| {family}, {name} | " + " | ".join(shown) + " |")
    return lines
