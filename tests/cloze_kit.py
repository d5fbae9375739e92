"""For the tests of templates and cloze tasks: tokenizers of each style, models of each kind, small labelled data."""

from functools import cache
from pathlib import Path
from typing import Any

import families
import tiny
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from softprompt import Embeddings, SoftPromptModel
from softprompt.recipe import Recipe
from softprompt.template import Answer, TemplateRow
from softprompt.train import train

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    ".",
    "a",
    "dog",
    "ran",
    "home",
    "?",
    "yes",
    "no",
    "maybe",
    "great",
    "bad",
    "it",
    "was",
    "question",
    ":",
    "answer",
    "red",
    "house",
]
MODELS = {  # by how they answer: family, task
    Answer.NEXT: ("llama", "CAUSAL_LM"),
    Answer.MASK: ("bert", "MASKED_LM"),
    Answer.SENTINEL: ("t5", "SEQ_2_SEQ_LM"),
}


@cache
def _wordpiece() -> PreTrainedTokenizerFast:
    """BERT's style: [CLS] and [SEP] around a row, lower case, words of several pieces ("catmat" is cat ##mat)."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    letters = list("abcdefghijklmnopqrstuvwxyz[]():.,?!0123456789=>'*<>/")
    pieces = [*special, *dict.fromkeys([*letters, *WORDS]), *(f"##{word}" for word in [*letters, *WORDS])]
    pieces = list(dict.fromkeys(pieces))
    core = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    marks = dict(zip(names, special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=tiny.CONTEXT, **marks)


@cache
def _metaspace() -> PreTrainedTokenizerFast:
    """T5's style: every text as if after a blank, </s> behind a row, sentinels."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    alphabet = sorted({char for word in WORDS for char in word} | set("▁[]():.,?!*<>/_P0123456789=>'"))
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", pair=None, special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=tiny.CONTEXT
    )


def tokenizer(answer: Answer) -> Any:
    """A tokenizer in the style of the models that answer this way; llama's has no special tokens around a row."""
    return {Answer.NEXT: tiny.tokenizer, Answer.MASK: _wordpiece, Answer.SENTINEL: _metaspace}[answer]()


def base(answer: Answer, seed: int = 0) -> PreTrainedModel:
    return families.build(*MODELS[answer], seed)


def embedded(model: SoftPromptModel, row: TemplateRow) -> Tensor:
    """The plain formulation of a row with slots, `[1, T, d]`: a Python loop over its columns."""
    table = model.get_base_model().get_input_embeddings()
    prompt = model.encoder().prompt()
    assert isinstance(prompt, Embeddings)
    columns = [
        prompt.vectors[0, slot] if slot >= 0 else table(torch.tensor(number))
        for number, slot in zip(row.input_ids, row.slots, strict=True)
    ]
    return torch.stack(columns)[None]


TEMPLATE = "{text} [P1] it was [P*2] : [MASK] ."
VERBALIZER = {"true": ["great", "yes yes"], "false": "bad"}
ROWS = [{"text": text, "label": label, "kind": kind} for text, label, kind in [
    ("the cat sat", True, "a"), ("a dog ran home", False, "a"), ("the red cat", True, "b"), ("a dog sat", False, "a"),
    ("the cat ran", True, "a"), ("a red dog", False, "b"),
]]  # fmt: skip


def base_folder(place: Path, answer: Answer) -> Path:
    base(answer).save_pretrained(place)
    tokenizer(answer).save_pretrained(place)
    return place


def recipe(tmp_path: Path, data: Path, answer: Answer = Answer.NEXT, **changes: Any) -> Recipe:
    model = tmp_path / f"base-{answer}"
    if not model.exists():
        base_folder(model, answer)
    settings: dict[str, Any] = {
        "model": str(model), "train": str(data), "eval": str(data), "out": str(tmp_path / "run"), "task": "CLOZE",
        "method": "p_tuning", "template": TEMPLATE, "verbalizer": VERBALIZER, "steps": 6, "batch_size": 3, "samples": 2,
        "optimizer": "adamw", "learning_rate": 0.02, "device": "cpu",
    }  # fmt: skip
    return Recipe.from_dict({name: value for name, value in {**settings, **changes}.items() if value is not None})


def run(settings: Recipe, **options: Any) -> Any:
    return train(settings, console=Console(quiet=True), **options)
