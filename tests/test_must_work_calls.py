"""What heads, names and calls may be: no task type, strings for enums, arguments by position, calls that raise.

The reference is the plain formulation of `naive.py`, or the model as it was before.
"""

from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import conformance
import pytest
import tiny
import torch
import transformers as hf
from conformance import Cell
from families import FAMILIES, build
from torch import Tensor
from transformers import PreTrainedModel

from softprompt import (
    METHODS,
    ConfigError,
    PrefixTuningConfig,
    PromptTuningConfig,
    SoftPromptError,
    SoftPromptModel,
    TaskType,
    get_peft_model,
)

COUNT = 4
TWO_KINDS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=COUNT, **more),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=COUNT, **more),
}
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}


def ids_of(length: int = 6, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB - 8, (rows, length))


# ---- heads and names ---------------------------------------------------------------------------------------------


NEEDS: dict[str, dict[str, Any]] = {
    "TEXT": {"prompt_tuning_init_text": "the cat", "tokenizer_name_or_path": "somewhere"},
    "CLASS_LABELS": {"class_labels": ["a"], "tokenizer_name_or_path": "somewhere"},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_enum_takes_strings_of_any_case(method: str) -> None:
    """And a config that was written and read is the same one."""
    config_class, example = METHODS[method].config_class, METHODS[method].example
    known, seen = {each.name for each in fields(config_class)}, 0
    for name in known:
        for enum in enums_in(get_type_hints(config_class)[name]):
            for member in enum:
                extra = NEEDS.get(member.value, {})
                if "SOURCE" in member.value:
                    extra = {"prompt_tuning_init_state_dict_path": "somewhere"}
                options = {**example, **{key: value for key, value in extra.items() if key in known}}
                made = [
                    attempt(config_class, {**options, name: each})
                    for each in (member, member.value, member.value.lower())
                ]
                assert made[0] == made[1] == made[2]
                if isinstance(made[0], config_class):
                    assert getattr(made[0], name) is member
                    assert config_class.from_dict(made[0].to_dict()) == made[0]
                    seen += 1
            with pytest.raises(ConfigError, match="choose one of"):
                config_class(**{**example, name: "nonsense"})
    assert seen >= len(METHODS[method].task_types)


def attempt(config_class: Any, options: dict[str, Any]) -> Any:
    """The config, or what is said against this choice of this method."""
    try:
        return config_class(**options)
    except SoftPromptError as error:
        return str(error)


def enums_in(hint: Any) -> list[Any]:
    return [
        each for each in (hint, *getattr(hint, "__args__", ())) if isinstance(each, type) and issubclass(each, Enum)
    ]


GENERAL = [name for name, method in METHODS.items() if method.task_types == tuple(TaskType)]


@pytest.mark.pairwise
@pytest.mark.parametrize("method", GENERAL)
@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS"), ("bert", "QUESTION_ANS"),
     ("gpt2", "SEQ_CLS"), ("roberta", "TOKEN_CLS"), ("bart", "FEATURE_EXTRACTION"), ("bert", "MASKED_LM")],
)  # fmt: skip
def test_without_a_task_type_the_model_decides(family: str, task: str, method: str, tmp_path: Path) -> None:
    """The same prompt as with one, and no head is copied or trained."""
    cell = Cell(method, family, task)
    torch.manual_seed(1)
    config = METHODS[method].config_class(task_type=None, num_virtual_tokens=COUNT, **METHODS[method].example)
    model = get_peft_model(build(family, task), config).eval()
    assert model.active_peft_config.modules_to_save is None
    rows = conformance.rows(cell)
    batch = conformance.collate(cell, rows, "left")
    for got, row in zip(conformance.together(cell, model(**batch), rows, "left"), rows, strict=True):
        for name, expected in conformance.alone(cell, model, row).items():
            if name in got:
                torch.testing.assert_close(got[name], expected, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = SoftPromptModel.from_pretrained(build(family, task), tmp_path)
    torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], atol=1e-6, rtol=1e-6)


# ---- calls that raise, and arguments by position -----------------------------------------------------------------


def traces(base: PreTrainedModel) -> list[str]:
    """Everything in a model that a call could leave behind; the hooks of the first one stay."""
    found = [f"{module.__class__.__name__} {module._forward_hooks} {module._forward_pre_hooks} {sorted(vars(module))}"
             for module in base.modules()]  # fmt: skip
    return [*found, str(base.config._attn_implementation), str(base.config.to_dict())]


@pytest.mark.pairwise
@pytest.mark.parametrize("call", ["forward", "generate", "beams"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["t5", "bart", "bloom", "lfm2"])
def test_a_call_that_raises_leaves_nothing(family: str, method: str, call: str) -> None:
    task = FAMILIES[family].tasks[0]
    model = get_peft_model(build(family, task), TWO_KINDS[method](task_type=task)).eval()
    base, ids = model.get_base_model(), ids_of(5, rows=2)
    options: dict[str, Any] = {"max_new_tokens": 4, **PLAIN, "num_beams": 3 if call == "beams" else 1}
    expected = base.generate(ids, **options)  # pyright: ignore[reportCallIssue]
    prompted = model.generate(ids, **options)
    before = traces(base)

    def stop(*_: Any) -> None:
        raise InterruptedError("in the middle")

    layers = [each for each in base.modules() if isinstance(each, torch.nn.Dropout | torch.nn.Linear)]
    handle = layers[-2].register_forward_hook(stop)
    with pytest.raises(InterruptedError):
        model(ids, decoder_input_ids=ids) if base.config.is_encoder_decoder and call == "forward" else (
            model(ids) if call == "forward" else model.generate(ids, **options)
        )
    handle.remove()
    assert traces(base) == before
    assert torch.equal(base.generate(ids, **options), expected)  # pyright: ignore[reportCallIssue]
    assert torch.equal(model.generate(ids, **options), prompted)


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "bart", "lfm2"])
def test_generate_takes_its_arguments_by_position(family: str, method: str) -> None:
    """Ids, then a generation config and processors, as in transformers."""
    task = FAMILIES[family].tasks[0]
    model, ids = get_peft_model(build(family, task), TWO_KINDS[method](task_type=task)).eval(), ids_of(5, rows=2)
    config = hf.GenerationConfig(max_new_tokens=4, **PLAIN, decoder_start_token_id=tiny.PAD)
    forbid = hf.LogitsProcessorList([hf.SuppressTokensLogitsProcessor(list(range(200)))])
    named = model.generate(inputs=ids, generation_config=config, logits_processor=forbid)
    assert torch.equal(model.generate(ids, config, forbid), named)
    assert bool((named[:, -4:] >= 200).all())
