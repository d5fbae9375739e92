"""A tokenizer that knows more tokens than the model: wherever its ids reach the table, the error names both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli_kit import Shell
from transformers import PreTrainedModel

from softprompt import (
    ConfigError,
    CPTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_from_text,
    initialize_kv_prefix_from_text,
)
from softprompt.data import Encoded, EncodedLabel
from softprompt.elsewhere import embed_words
from softprompt.evaluate import evaluate_accuracy, evaluate_loss, generate_texts, predict_labels
from softprompt.start import initialize_from_examples

TEXT = "the cat sat on the mat and the dog ran to the red house by the river"
ROWS = 99


def small(family: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny.build(family, vocab_size=ROWS, **options)


@pytest.fixture
def words(tmp_path: Path) -> str:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def beyond(*ids: int) -> Encoded:
    return Encoded([5, *ids], [-100, *ids])


STARTS: dict[str, Callable[[str], Any]] = {
    "text": lambda words: get_peft_model(
        small(),
        PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text=TEXT, tokenizer_name_or_path=words),
    ),
    "class labels": lambda words: get_peft_model(
        small(),
        PromptTuningConfig(prompt_tuning_init="CLASS_LABELS", class_labels=[TEXT], tokenizer_name_or_path=words),
    ),
    "vectors": lambda _: initialize_from_text(
        get_peft_model(small(), PromptTuningConfig(num_virtual_tokens=8)), tiny.tokenizer(), TEXT
    ),
    "encoder": lambda _: initialize_from_text(
        get_peft_model(small("gpt2"), PromptEncoderConfig(num_virtual_tokens=8)), tiny.tokenizer(), TEXT
    ),
    "keys and values": lambda _: initialize_kv_prefix_from_text(
        get_peft_model(small(), PrefixTuningConfig(num_virtual_tokens=8)),
        tiny.tokenizer(),
        text=TEXT,
        use_chat_template=False,
    ),
    "examples": lambda _: initialize_from_examples(
        get_peft_model(small("bert"), PrefixTuningConfig(num_virtual_tokens=8)), tiny.tokenizer(), [TEXT]
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_starts(start: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"token \d+, but the model knows 99 tokens.*resize_token_embeddings"):
        STARTS[start](words)


def test_the_tokenizers_size_is_told_where_it_is_known(words: str) -> None:
    with pytest.raises(ConfigError, match=rf"the tokenizer has {len(tiny.tokenizer())} tokens"):
        STARTS["text"](words)


def test_a_context() -> None:
    with pytest.raises(ConfigError, match="holds 99, but this model has 99 tokens"):
        get_peft_model(small(), CPTConfig(cpt_token_ids=[5, ROWS]))


USES: dict[str, Callable[[Any], Any]] = {
    "loss": lambda model: evaluate_loss(model, [beyond(6, ROWS), beyond(7)]),
    "accuracy": lambda model: evaluate_accuracy(model, [EncodedLabel([5, ROWS], 1)]),
    "classes": lambda model: predict_labels(model, [EncodedLabel([5, ROWS], 1)]),
    "texts": lambda model: generate_texts(model, tiny.tokenizer(), [TEXT]),
}


@pytest.mark.parametrize("use", USES)
def test_rows(use: str) -> None:
    """Before anything is run: on a GPU such an id ends the process."""
    model = get_peft_model(small(), PromptTuningConfig(num_virtual_tokens=3))
    for each in (model, model.get_base_model()):
        with pytest.raises(ConfigError, match=r"but the model knows 99 tokens"):
            USES[use](each)


@pytest.mark.parametrize("ids", [[-1], [0, 99], torch.tensor([[3, 320]])], ids=str)
def test_ids_that_no_table_has(ids: Any) -> None:
    with pytest.raises(ConfigError, match=r"the model knows 99 tokens"):
        embed_words(small().get_input_embeddings(), ids)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    get_peft_model(small(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(
        tmp_path / "prompt"
    )
    (tmp_path / "data.jsonl").write_text('{"input": "the cat", "target": "the red house by the river"}\n' * 4)
    return tmp_path


@pytest.mark.parametrize("command", ["generate", "eval", "train"])
def test_the_program(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, base, prompt = folder / "data.jsonl", folder / "base", folder / "prompt"
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {base}\nmethod: prompt_tuning\nnum_virtual_tokens: 3\ntrain: {data}\neval: {data}\n"
        f"input_column: input\ntarget_column: target\nout: {folder / 'run'}\nsteps: 2\ninit: random\n"
    )
    arguments: dict[str, list[Any]] = {
        "generate": ["--prompt", prompt, "--model", base, "--input", TEXT],
        "eval": ["--prompt", prompt, "--model", base, "--eval", data],
        "train": [recipe],
    }
    status, _, err = Shell(capsys).run(command, *arguments[command])
    assert status == 2
    assert "the model knows 99 tokens" in " ".join(err.split())
