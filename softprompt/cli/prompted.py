"""A base model with a saved prompt on it, opened for use: what `generate`, `eval`, `show` and `convert` start from.

A prompt that came out of a training run has its recipe beside it, so the base model and the template need not be given
again. Flags win over the recipe; without either, the base model is the one in this package and text is used as it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from softprompt.checkpoint import SavedAdapter, load_adapter
from softprompt.cli.cloze import RAW, fields_of, open_cloze, read_cloze, template_text
from softprompt.cloze import Cloze
from softprompt.config import EmbeddingConfig, Placement
from softprompt.data import Encoded, Example, Template, encode_all, encode_pairs, input_ids
from softprompt.data.examples import input_example, is_templated
from softprompt.data.rows import Row, read_rows
from softprompt.errors import CheckpointError, ConfigError, DataError
from softprompt.loading import EMBEDDED, Dispatch, load_base, load_tokenizer
from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe
from softprompt.recipe.tasks import of_task
from softprompt.together.tasks import task_of
from softprompt.train.run_data import context_length
from softprompt.train.run_folder import BASE, RECIPE, SUMMARY
from softprompt.train.tuned_base import tuned_base


@dataclass(frozen=True)
class Prompted:
    """`label_names` is set where the prompt classifies, `cloze` where it chooses words in a template.

    `template` is the one a text goes through; `tuned` says that the base model was trained along with the prompt;
    `task` is the number of the chosen task of a prompt of several.
    """

    model: SoftPromptModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe | None
    label_names: list[str] | None
    template: Template | None = None
    cloze: Cloze | None = None
    tuned: bool = False
    task: int | None = None

    def of_task(self, examples: Sequence[Example]) -> list[Example]:
        """The examples as ones of the chosen task."""
        return [replace(example, task=self.task) for example in examples]

    @property
    def context(self) -> int:
        return context_length(self.model.facts, self.tokenizer)

    @property
    def room(self) -> int:
        """Tokens that the prompt leaves of the model's context; one inside the rows is counted with them."""
        config = self.model.active_peft_config
        inside = isinstance(config, EmbeddingConfig) and config.placement is Placement.TEMPLATE
        return self.context - (0 if inside else config.num_virtual_tokens)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Rows with targets as this kind of model takes them."""
        if self.model.facts.encoder_decoder:
            return encode_pairs(examples, self.tokenizer, self.room, self.context)
        return encode_all(examples, self.tokenizer, self.room)

    @property
    def cloze_length(self) -> int:
        """The longest row of a cloze task: as it was trained, where the run is known."""
        limit = self.recipe.max_length if self.recipe is not None else None
        return min(self.room, limit or self.room)

    def new_tokens(self, inputs: Sequence[Example], wanted: int) -> int:
        """How many tokens may be generated after these inputs: as many as `wanted`, or what the context leaves.

        DataError names an input that leaves none.
        """
        lengths = [len(ids) for ids in input_ids(inputs, self.tokenizer)]
        for example, length in zip(inputs, lengths, strict=True):
            if length >= self.room:
                raise DataError(
                    f"{example.where} takes {length} tokens, but the model's context of {self.context} leaves "
                    f"{self.room} beside the prompt; shorten it"
                )
        if self.model.facts.encoder_decoder:
            return min(wanted, self.context)
        return min(wanted, self.room - max(lengths))


def open_prompted(
    prompt: Path,
    model: str | None,
    dtype: str = "float32",
    device: str = "auto",
    template: str | None = None,
    task: str | None = None,
) -> Prompted:
    """Load a saved prompt onto its base model. CheckpointError or ConfigError before anything large is loaded.

    `task` is the name or number of the one that is meant where the prompt has several.
    """
    saved, recipe = read_saved(prompt)
    number, recipe = task_of(saved.config, task, prompt), recipe_of_task(saved, recipe, task)
    text, words = template_text(saved, recipe, template), read_cloze(prompt)
    name = base_name(model, recipe, prompt)
    tokenizer = load_tokenizer(name)
    labels = label_names_of(prompt, saved)
    dispatch = Dispatch.of(recipe) if model is None and device == "auto" else None
    base = load_base(name, tokenizer, labels, dtype, device, words is not None, dispatch)
    cloze = None if words is None else open_cloze(words, base, tokenizer, text)
    prompted = SoftPromptModel.from_pretrained(base, prompt)
    used = Template(text) if text else None
    return Prompted(prompted, tokenizer, recipe, labels, used, cloze, tuned_base(prompt) is not None, number)


def read_saved(prompt: Path) -> tuple[SavedAdapter, Recipe | None]:
    """A saved prompt and, if it came out of a run, the recipe beside it."""
    if prompt.is_file():
        raise CheckpointError(f"{prompt} is a file; give the folder that holds adapter_config.json")
    recipe = prompt / RECIPE
    return load_adapter(prompt), Recipe.from_yaml(recipe) if recipe.is_file() else None


def recipe_of_task(saved: SavedAdapter, recipe: Recipe | None, task: str | None) -> Recipe | None:
    """The recipe of a prompt's run, as it stands for the chosen task where there are several."""
    number, names = task_of(saved.config, task, saved.source), list(recipe.tasks) if recipe else []
    return recipe if recipe is None or number is None or not names else of_task(recipe, names[number])


def base_name(model: str | None, recipe: Recipe | None, prompt: Path) -> str:
    """The base model of a prompt: the one tuned along with it, else the flag's, its run's, or the package's."""
    tuned = tuned_base(prompt)
    if tuned is None and recipe is not None and recipe.base_learning_rate is not None:
        raise CheckpointError(
            f"{prompt} was trained along with its base model, and {prompt / BASE} is not there; copy it"
        )
    if tuned is None:
        return model or (recipe.model if recipe else EMBEDDED)
    if model is not None and Path(model).resolve() != tuned.resolve():
        raise ConfigError(f"--model is {model}, but this prompt was trained along with {tuned}; leave --model out")
    return str(tuned)


def label_names_of(prompt: Path, saved: SavedAdapter) -> list[str] | None:
    """The classes of a prompt that classifies: named by its run, else numbered by the rows of its head."""
    if str(saved.config.task_type) != "SEQ_CLS":
        return None
    heads = [tensor for name, tensor in saved.tensors.items() if name.endswith(".weight") and tensor.dim() == 2]
    if not heads:
        raise CheckpointError(f"{prompt} classifies, but no head is saved with it; save it with its classifier")
    summary = prompt / SUMMARY
    if summary.is_file():
        try:
            names = json.loads(summary.read_text(encoding="utf-8")).get("label_names")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{summary} cannot be read ({error}); delete it to go on without names") from None
        if isinstance(names, list) and names:
            return [str(name) for name in names]
    return [str(number) for number in range(heads[-1].shape[0])]


def example_of(text: str, template: Template | None, where: str = "the input", remedy: str = RAW) -> Example:
    """A text of its own as the prompt was trained to see it.

    With a template of one input field the text is that field; with several it is a JSON object of them. A text that
    already ends the way the template's input ends is complete and stays as it is.
    """
    if template is None or is_templated(text, template):
        return Example(text.rstrip(" "), ("",), where=where)
    return input_example(Row(where, fields_of(text, template, template.fields[:-1], where, remedy)), template)


def examples_of(file: str, template: Template | None, column: str | None = None) -> list[Example]:
    """The inputs in a file: one text per line of a .txt file; rows of any other, whose targets may be missing."""
    if Path(file).suffix.lower() == ".txt":
        return [example_of(row.values["text"], template, row.where) for row in read_rows(file)]
    return [input_example(row, template, column) for row in read_rows(file)]
