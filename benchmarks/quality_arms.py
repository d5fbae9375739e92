"""The arms of quality.py: ways to get a model to do a task, the settings that each may choose from, and their models.

An arm with several settings takes the one that is best on dev rows: all for a few steps, the best two again for all
steps, both with the first seed. PEFT and LoRA bring no default learning rate; theirs are from memory of PEFT's guides
(prompt tuning 3e-2, prefix tuning 1e-2, P-tuning 1e-3), and "default" is the best of the three methods so set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from quality_scores import rank
from quality_tasks import Task
from torch import nn
from transformers import PreTrainedModel

from softprompt.loading import resolve_model

if TYPE_CHECKING:
    from quality_bench import Bench

TOKENS = 20  # virtual tokens of PEFT's prompts; 20 is our default too

ARMS = {
    "commonest": "always the commonest answer of the test rows",
    "copy": "the source repeated",
    "frozen": "frozen model",
    "context": "frozen model, instruction and examples in context",
    "probe": "frozen model, logistic regression on mean vectors",
    "head": "frozen model, classifier alone",
    "peft-default": "PEFT, default settings",
    "peft-best": "PEFT, best of its grid",
    "lora": "LoRA (PEFT)",
    "full": "full fine-tuning",
    "ours": "softprompt, default settings",
    "ours-best": "softprompt, best of a grid",
}
SEEDLESS = ("commonest", "copy", "frozen")  # nothing is drawn
FINALISTS = 2


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to train. `kind`: ours, peft, lora, full, head, or the arm's name.

    `options` are our recipe's fields, or those of PEFT's config; `from_text` starts PEFT's prompt from the text of
    training examples that ours starts from. `head_rate` is the classifier's learning rate; without one it has `rate`.
    """

    kind: str
    method: str = ""
    rate: float = 0.0
    head_rate: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    from_text: bool = False

    def __str__(self) -> str:
        if self.kind == "ours":
            return ", ".join(f"{name} {value}" for name, value in self.options.items()) or "default"
        parts = [self.method] if self.method else []
        parts += [f"{_SHORT.get(name, name)} {value}" for name, value in self.options.items() if value is not True]
        parts += ["from text"] if self.from_text else []
        parts += [f"lr {self.rate:g}"] if self.rate else []
        return ", ".join(parts + ([f"head {self.head_rate:g}"] if self.head_rate else [])) or self.kind


_SHORT = {"encoder_hidden_size": "hidden", "encoder_reparameterization_type": "encoder"}


def _ffn(width: int) -> dict[str, Any]:
    return {"prefix_projection": True, "encoder_hidden_size": width}


def _mlp(width: int) -> dict[str, Any]:
    return {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": width}


def _peft(method: str, rate: float, head: float | None = None, text: bool = False, **options: Any) -> Setting:
    return Setting("peft", method, rate, head, options, text)


_DEFAULT = [_peft("prefix_tuning", 1e-2), _peft("prompt_tuning", 3e-2), _peft("p_tuning", 1e-3)]
_WRITING = {  # a language model's tasks
    "peft-default": _DEFAULT,
    "peft-best": [
        *_DEFAULT,
        *(_peft("prefix_tuning", rate, text=True) for rate in (0.1, 0.25, 0.5, 1.0)),
        _peft("prefix_tuning", 1e-2, **_ffn(128)),
        _peft("prompt_tuning", 0.3, text=True),
        _peft("p_tuning", 1e-2, **_mlp(128)),
    ],
    "lora": [Setting("lora", rate=rate) for rate in (5e-3, 2e-2, 5e-2)],
    "full": [Setting("full", rate=rate) for rate in (1e-3, 3e-3, 8e-3)],
    "ours-best": [
        Setting("ours", options=options)
        for options in (
            {},
            {"method": "prefix_tuning", "learning_rate": 0.2},
            {"method": "prefix_tuning", "learning_rate": 0.8},
            {"method": "prefix_tuning", "init_candidates": 4},
            {"method": "p_tuning"},
            {"method": "prompt_tuning"},
        )
    ],
}
_CHOOSING = {  # a classifier's
    "peft-default": _DEFAULT,
    "peft-best": [
        *_DEFAULT,
        *(_peft("prefix_tuning", rate, 0.1) for rate in (0.03, 0.1, 0.3)),
        _peft("prefix_tuning", 5e-3, 0.1, **_ffn(128)),
        _peft("prompt_tuning", 0.1, 0.1, text=True),
        _peft("p_tuning", 1e-2, 0.1, **_mlp(256)),
    ],
    "lora": [Setting("lora", rate=rate, head_rate=0.03) for rate in (1e-3, 5e-3, 2e-2)],
    "full": [Setting("full", rate=rate, head_rate=head) for rate, head in ((5e-5, 0.01), (2e-4, 0.01), (5e-4, 0.01))],
    "head": [Setting("head", head_rate=rate) for rate in (0.03, 0.1, 0.3)],
    "probe": [Setting("probe")],
    "ours-best": [
        Setting("ours", options=options)
        for options in (
            {},
            {"method": "prefix_tuning", "learning_rate": 0.05, "head_learning_rate": 0.01},
            {"method": "prefix_tuning", "learning_rate": 0.2, "head_learning_rate": 0.01},
            {"method": "p_tuning"},
        )
    ],
}
_SAME = {arm: [Setting(arm)] for arm in ("commonest", "copy", "frozen", "context", "ours")}


def settings_of(arm: str, task: Task) -> list[Setting]:
    """What an arm may choose from for a task; empty where the arm cannot do it (an encoder has no context)."""
    choosing = task.kind == "SEQ_CLS"
    cannot = {
        "commonest": task.measures[0] not in ("accuracy", "p_at_1"),
        "copy": not task.repeats,
        "frozen": choosing,
        "context": choosing,
    }
    return [] if cannot.get(arm) else {**_SAME, **(_CHOOSING if choosing else _WRITING)}.get(arm, [])


Scores = Callable[[Setting], Mapping[str, float] | None]


def choose(settings: Sequence[Setting], short: Scores, full: Scores) -> Setting | None:
    """The best setting by its dev scores after all steps, among the best few by those after few steps.

    None where scores are missing.
    """
    if len(settings) == 1:
        return settings[0]
    finalists = _best(settings, short, FINALISTS)
    best = _best(finalists, full, 1)
    return best[0] if best else None


def _best(settings: Sequence[Setting], scores: Scores, count: int) -> list[Setting]:
    """The `count` best, best first; none where scores are missing."""
    found = {setting: scores(setting) for setting in settings}
    known = {setting: rank(dev) for setting, dev in found.items() if dev is not None}
    return sorted(known, key=lambda setting: known[setting], reverse=True)[:count] if len(known) == len(found) else []


# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A model with what is trained of it: `body` at the setting's rate, `head` at the classifier's."""

    model: nn.Module
    body: list[nn.Parameter]
    head: list[nn.Parameter]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.body, *self.head]


class Trimmed(nn.Module):
    """PEFT's model with logits of the real tokens alone `[B, T, V]`, where its own hold the prompt in front of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        output = self.model(**batch)
        if output.logits.dim() == 3:
            output.logits = output.logits[:, -batch["input_ids"].shape[1] :]
        return output


def build(setting: Setting, bench: Bench, seed: int) -> Trained:
    """The model of a setting, ready to train. A classifier is drawn as `softprompt train` draws it."""
    base = bench.base(seed)
    classifier: list[nn.Parameter] = []
    if bench.task.kind == "SEQ_CLS":
        classifier = list(base.get_submodule("classifier").parameters())
    if setting.kind == "full":
        inside = {id(parameter) for parameter in classifier}
        return Trained(base, [p for p in base.parameters() if id(p) not in inside], classifier)
    base.requires_grad_(False)
    if setting.kind == "head":
        base.get_submodule("classifier").requires_grad_(True)
        return Trained(base, [], classifier)
    torch.manual_seed(seed)
    model = _lora(base, bench) if setting.kind == "lora" else _prompted(base, setting, bench, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = {id(p) for name, p in model.named_parameters() if "modules_to_save" in name}
    head = [parameter for parameter in trained if id(parameter) in names]
    return Trained(Trimmed(model), [parameter for parameter in trained if id(parameter) not in names], head)


def _lora(base: PreTrainedModel, bench: Bench) -> Any:
    import peft

    return peft.get_peft_model(base, peft.LoraConfig(task_type=bench.peft_task, r=8, lora_alpha=16))


def _prompted(base: PreTrainedModel, setting: Setting, bench: Bench, seed: int) -> Any:
    """PEFT's prompt, started as it does by default, or from the text of training examples."""
    import peft

    classes: dict[str, Any] = {
        "prompt_tuning": peft.PromptTuningConfig,
        "p_tuning": peft.PromptEncoderConfig,
        "prefix_tuning": peft.PrefixTuningConfig,
    }
    options, text = dict(setting.options), bench.examples_text(TOKENS, seed)
    if setting.from_text and setting.method == "prompt_tuning":
        options |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
        options |= {"tokenizer_name_or_path": resolve_model(bench.path)}
    config = classes[setting.method](task_type=bench.peft_task, num_virtual_tokens=TOKENS, **options)
    model = peft.get_peft_model(base, config)
    if setting.from_text and setting.method == "prefix_tuning":
        peft.initialize_kv_prefix_from_text(model, bench.tokenizer, text=text, use_chat_template=False)
    return model
