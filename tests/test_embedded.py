"""The model that ships with the package: its files load offline and it does model English."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from softprompt.embedded import PATH

PARAGRAPH = (
    "One day, Anna went to the market with her father. She wanted to buy some apples and a loaf of bread. "
    "It was raining, so they ran back to the house. Her mother was happy to see them and made hot soup for everyone."
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PATH)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(PATH).eval()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "plain words",
        " leading, trailing ",
        "Café £30",
        "日本語 😀👍🏽 é",
        "two  spaces\n\n\ttab\r\n",
        "a , b . c 's",
    ],
)
def test_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_distinct(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(set(special)) == 3
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == special
    assert len(tokenizer) == model.config.vocab_size


def test_prompt_tokens_do_not_depend_on_what_follows(tokenizer: PreTrainedTokenizerBase) -> None:
    """Line ends and words are token boundaries, so a prompt and its continuation can be tokenised apart."""
    prompt, rest = "name: Zizzi\ntext:\n", "Zizzi is a place to eat."
    whole = tokenizer(prompt + rest)["input_ids"]
    assert whole == tokenizer(prompt)["input_ids"] + tokenizer(rest, add_special_tokens=False)["input_ids"]


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Bye."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|>User: Hello.\nAssistant: Hi!\nUser: Bye.\nAssistant:"
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_loss_is_far_below_chance(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    assert model.dtype == torch.float32
    ids = tokenizer(PARAGRAPH, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.5  # an untrained model of this vocabulary gives about ln 4096 = 8.3


def test_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in PATH.rglob("*") if file.is_file()) <= 12_000_000
