"""What the commands that use a saved prompt do, apart from flags and tables."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer

from softprompt.checkpoint import SavedAdapter, load_adapter, save_adapter
from softprompt.cli.cloze import cloze_inputs, read_cloze, template_text
from softprompt.cli.prompted import Prompted, base_name, label_names_of, open_prompted, read_saved, recipe_of_task
from softprompt.config import KVConfig, widest_shape
from softprompt.data import Example, LabelledExample, encode_labels, expand, load_examples, load_labelled
from softprompt.data.cloze import as_text, load_cloze
from softprompt.data.examples import without_slots
from softprompt.elsewhere import all_words
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.evaluate import (
    evaluate_accuracy,
    evaluate_cloze,
    evaluate_loss,
    generate_texts,
    pad_id,
    predict_cloze,
    predict_labels,
    score_texts,
)
from softprompt.export.mlx import save_mlx_cache
from softprompt.inspect_prompt import PromptFacts, describe, describe_kv, saved_kv
from softprompt.loading import Dispatch, load_base, load_tokenizer
from softprompt.methods import PrefixTuningConfig
from softprompt.pairs import as_checkpoint
from softprompt.prompt import KV
from softprompt.recipe import Recipe, did_you_mean
from softprompt.report.nearest import nearest_tokens
from softprompt.template import Template
from softprompt.together.tasks import fold_task

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Decoding:
    """How answers are written; `options` go to the model's `generate`."""

    max_new_tokens: int
    batch_size: int
    seed: int
    options: dict[str, Any]


def answers(
    opened: Prompted, inputs: Sequence[Example], decoding: Decoding, stream: bool = False, frozen: bool = False
) -> list[str]:
    """One completion per input (a class name from a prompt that classifies); `stream` prints it while it is made."""
    if opened.label_names is not None:
        labelled = [LabelledExample(example.input, 0, example.where) for example in inputs]
        rows = encode_labels(labelled, opened.tokenizer, opened.room)
        places = predict_labels(opened.model, rows, decoding.batch_size, pad_id(opened.tokenizer))
        return [opened.label_names[place] for place in places]
    options = dict(decoding.options)
    if stream:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore
    torch.manual_seed(decoding.seed)
    inputs = [without_slots(example) for example in inputs] if frozen else opened.of_task(inputs)
    limit = opened.new_tokens(inputs, decoding.max_new_tokens)
    with opened.model.disable_adapter() if frozen else nullcontext():
        return generate_texts(opened.model, opened.tokenizer, inputs, limit, decoding.batch_size, **options)


def print_answers(inputs: Sequence[Example], texts: Sequence[str], as_json: bool, one_per_line: bool) -> None:
    """Plain text, one line per completion of a file; JSON keeps line breaks and the input."""
    for example, text in zip(inputs, texts, strict=True):
        if as_json:
            typer.echo(json.dumps({"input": example.input, "output": text}, ensure_ascii=False))
        else:
            typer.echo(" ".join(text.split()) if one_per_line else text)


def cloze_answers(
    opened: Prompted, text: str | None, file: str | None, batch_size: int, frozen: bool
) -> tuple[list[Example], list[str]]:
    """Inputs as plain text, and the label that is chosen for each."""
    assert opened.cloze is not None
    cloze = opened.cloze
    examples = cloze_inputs(cloze, text, file)
    rows = cloze.encode(examples, opened.cloze_length)
    with opened.model.disable_adapter() if frozen else nullcontext():
        rows = [row.without_slots() for row in rows] if frozen else rows
        labels = predict_cloze(opened.model, cloze, rows, batch_size)
    return [Example(as_text(each, cloze.template, "[MASK]"), ("",), where=each.where) for each in examples], labels


@dataclass(frozen=True)
class EvalSettings:
    """Of `softprompt eval`; what is None is taken from the run's recipe."""

    data: str
    template: str | None
    input_column: str | None
    target_column: str | None
    split: str
    limit: int | None
    max_new_tokens: int
    batch_size: int
    only: str | None = None
    task: str | None = None


def measure(load: Callable[[], Prompted], prompt: Path, settings: EvalSettings, frozen: bool) -> Scores:
    """Scores by the names `frozen` and `prompt`. The data is read before the model, so that its errors come first."""
    saved, recipe = read_saved(prompt)
    recipe = recipe_of_task(saved, recipe, settings.task)
    if read_cloze(prompt) is not None:
        return _cloze_scores(load, saved, recipe, settings, frozen)
    if settings.template is None and settings.input_column is None and settings.target_column is None:
        own = recipe or Recipe()
        settings = replace(settings, template=template_text(saved, recipe, None), input_column=own.input_column,
                           target_column=own.target_column, only=settings.only or own.only)  # fmt: skip
    if str(saved.config.task_type) == "SEQ_CLS":
        return {"prompt": _accuracy(load(), settings)}
    examples = load_examples(settings.data, settings.template, settings.input_column, settings.target_column,
                             settings.split, settings.limit, settings.only)  # fmt: skip
    opened = load()
    scores = {}
    if frozen and not opened.tuned:
        with opened.model.disable_adapter():
            scores["frozen"] = _text_scores(opened, [without_slots(each) for each in examples], settings)
    scores["prompt"] = _text_scores(opened, opened.of_task(examples), settings)
    return scores


def _cloze_scores(
    load: Callable[[], Prompted], saved: SavedAdapter, recipe: Recipe | None, settings: EvalSettings, frozen: bool
) -> Scores:
    """Accuracy or P@1 and loss; a base model that was tuned along has no frozen one to compare with."""
    if settings.input_column:
        raise ConfigError("a cloze task takes its texts from the template's fields; leave --input-column out")
    text = template_text(saved, recipe, settings.template)
    column = settings.target_column or (recipe.target_column if recipe else None)
    only = settings.only or (recipe.only if recipe else None)
    opened: Prompted | None = None
    if text is None:
        opened = load()
        assert opened.cloze is not None
        text = opened.cloze.template.text
    examples = load_cloze(settings.data, Template(text), column, settings.split, settings.limit, only)
    opened = opened or load()
    assert opened.cloze is not None
    rows = opened.cloze.encode(examples, opened.cloze_length)
    scores = {}
    if frozen and not opened.tuned:
        with opened.model.disable_adapter():
            bare = [row.without_slots() for row in rows]
            scores["frozen"] = evaluate_cloze(opened.model, opened.cloze, bare, settings.batch_size)
    scores["prompt"] = evaluate_cloze(opened.model, opened.cloze, rows, settings.batch_size)
    return scores


def _text_scores(opened: Prompted, examples: Sequence[Example], settings: EvalSettings) -> dict[str, float]:
    """Loss over every (input, target) pair, BLEU and chrF of one answer per input against all its references."""
    pairs = opened.encode(expand(examples))
    loss = evaluate_loss(opened.model, pairs, settings.batch_size)
    limit = opened.new_tokens(examples, settings.max_new_tokens)
    texts = generate_texts(opened.model, opened.tokenizer, examples, limit, settings.batch_size)
    return {**loss, **score_texts(texts, [example.targets for example in examples])}


def _accuracy(opened: Prompted, settings: EvalSettings) -> dict[str, float]:
    examples, _ = load_labelled(settings.data, settings.input_column, settings.target_column, settings.split,
                                settings.limit, opened.label_names, settings.only)  # fmt: skip
    rows = encode_labels(examples, opened.tokenizer, opened.room)
    return evaluate_accuracy(opened.model, rows, settings.batch_size, pad_id(opened.tokenizer))


def facts_of(prompt: Path, model: str | None, nearest: int) -> tuple[PromptFacts, str]:
    """Facts about a saved prompt or key-value file, and a remark on what would show more."""
    if prompt.is_file():
        return describe_kv(KV.load(prompt), prompt), ""
    saved, recipe = read_saved(prompt)
    facts = describe(saved, Path(saved.source))
    if facts.layers or not nearest:
        return facts, ""
    if model is None and recipe is None:
        return facts, "give --model to see the vocabulary tokens nearest to each virtual token"
    name = base_name(model, recipe, prompt)
    tokenizer = load_tokenizer(name)
    cloze = read_cloze(prompt) is not None
    dispatch = Dispatch.of(recipe) if model is None else None
    labels = None if dispatch is None else label_names_of(prompt, saved)  # a map names the parts of one class
    words = all_words(load_base(name, tokenizer, labels, cloze=cloze, dispatch=dispatch))
    vectors = saved.tensors["prompt_embeddings"][: facts.shape[0]]
    if vectors.shape[1] != words.shape[1]:
        raise ConfigError(f"{prompt} has vectors of width {vectors.shape[1]}, but {name} has embeddings of width "
                          f"{words.shape[1]}; give the base model it was made for")  # fmt: skip
    return replace(facts, nearest=nearest_tokens(vectors, words, tokenizer, nearest)), ""


TARGETS = ("kv", "prefix", "peft", "prompt_tuning", "mlx")
ONE_FILE = ("kv", "mlx")


def convert_prompt(prompt: Path, to: str, out: Path, model: str | None, task: str | None = None) -> str:
    """Write a prompt in another form; returns a line that says what was written.

    `task` is the one that is meant of a prompt of several, for every form but PEFT's, which has them all.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to} is not known{did_you_mean(to, TARGETS)}")
    if to in ONE_FILE and out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a file, such as {out / 'prefix.safetensors'}")
    if to not in ONE_FILE and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give the name of a folder")
    if to == "peft":
        saved = load_adapter(prompt)
        beyond = ", ".join(f"{name}={value!s:.40}" for name, value in saved.config.beyond_peft.items())
        if beyond:
            raise UnsupportedError(
                f"{prompt} cannot become a prompt of PEFT's: it has {beyond}, which PEFT does not know and would leave "
                "out without saying so; use it here, or train one without"
            )
        config = saved.config
        if isinstance(config, KVConfig) and config.padded:  # whose shapes PEFT knows from the model
            config, saved = replace(config, layer_shapes=None), replace(saved, encoder=None)
        save_adapter(out, config, saved.tensors, saved.encoder)
        return f"{out}: {config.peft_type} as PEFT reads it"
    if to == "prompt_tuning":
        fold_task(prompt, out, task)
        return f"{out}: PROMPT_TUNING" + (f" for task {task}" if task else "")
    model = _base_of(prompt, model) if to == "mlx" else model
    kv = KV.load(prompt) if prompt.is_file() else _folded(prompt, model, task)
    if to == "mlx":
        assert model is not None
        save_mlx_cache(kv, out, model)
        return f"{out}: a prompt cache of mlx-lm, {kv.length} virtual tokens before {model}"
    if to == "kv":
        kv.save(out)
        return f"{out}: keys and values of {kv.length} virtual tokens for {len(kv.layers)} layers"
    config = _prefix_config(prompt, kv)
    save_adapter(out, config.as_saved(), {"prompt_embeddings": as_checkpoint(kv.flat(), config)})
    return f"{out}: PREFIX_TUNING with {kv.length} virtual tokens"


def _base_of(prompt: Path, model: str | None) -> str:
    """The base model of a prompt, which no flag need name where the prompt does. ConfigError."""
    if prompt.is_file() and model is None:
        raise ConfigError(f"{prompt} does not say which base model it is for; give it by --model")
    if prompt.is_file():
        return str(model)
    saved, recipe = read_saved(prompt)
    named = model or (None if recipe else saved.config.base_model_name_or_path)
    return base_name(named, recipe, prompt)


def _folded(prompt: Path, model: str | None, task: str | None) -> KV:
    """The keys and values of a saved prompt; one in input space runs through its base model once."""
    saved, _ = read_saved(prompt)
    kv = saved_kv(saved)
    if kv is not None:
        return kv
    opened = open_prompted(prompt, model, task=task)
    return opened.model.fold(task=opened.task)


def _prefix_config(prompt: Path, kv: KV) -> PrefixTuningConfig:
    """Layers that are not all alike have their shapes written down, which PEFT cannot read."""
    if kv.cross or kv.encoder:
        raise UnsupportedError(f"{prompt} has prefixes of several attentions, which PREFIX_TUNING of a decoder has not")
    shapes = [[key.shape[1], key.shape[3], value.shape[3]] for key, value in kv.layers]
    heads, size = widest_shape(shapes) or (shapes[0][0], shapes[0][1])
    saved = None if prompt.is_file() else load_adapter(prompt).config
    paired = isinstance(saved, KVConfig) and saved.paired
    return PrefixTuningConfig(
        task_type=saved.task_type if saved is not None and paired else "CAUSAL_LM", num_virtual_tokens=kv.length,
        token_dim=heads * size, num_layers=len(kv.layers), num_attention_heads=heads,
        num_transformer_submodules=2 if paired else 1, encoder_hidden_size=heads * size,
        layer_shapes=None if all(shape == [heads, size, size] for shape in shapes) else shapes,
        base_model_name_or_path=saved.base_model_name_or_path if saved is not None else None,
        inference_mode=True, prefix_always_visible=kv.always_visible,
    )  # fmt: skip
