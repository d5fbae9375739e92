"""Source training of multitask prompt tuning, https://arxiv.org/abs/2303.02861 section 3.2: teachers, then one prompt.

Step 1 trains a plain prompt per task, each an ordinary run in OUT/teachers/NAME. Step 2 distils them: the loss is the
tasks' own plus λ times what the teachers say, the KL divergence of their probabilities at temperature T (equation 2)
and the squared distance of their hidden states (equation 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from softprompt.checkpoint import SavedAdapter, load_adapter
from softprompt.data import IGNORED
from softprompt.errors import ConfigError
from softprompt.methods import METHODS, MultitaskPromptTuningConfig
from softprompt.model import SoftPromptModel, get_peft_model
from softprompt.prompt import EmbeddingPrompt, evaluating
from softprompt.recipe import Recipe
from softprompt.recipe.tasks import teacher_recipe
from softprompt.train.distributed import Team
from softprompt.train.run_folder import REPORT, RunFolder

TEACHERS = "teachers"


def teacher_prompts(recipe: Recipe, folder: RunFolder, console: Console, team: Team) -> Tensor | None:
    """The teachers' prompts `[T, p, d]`, in the order of the tasks; None where the recipe wants none.

    Teachers that `recipe.teachers` does not name are trained first; finished ones in the folder are kept, and one that
    was interrupted goes on. ConfigError for teachers that do not fit together.
    """
    if not recipe.tasks or not recipe.distillation:
        return None
    place = Path(recipe.teachers) if recipe.teachers else folder.path / TEACHERS
    if not recipe.teachers:
        folder.begin(recipe)
        for name in recipe.tasks:
            _train_teacher(recipe, name, place / name, console, team)
    found = {name: _vectors(load_adapter(place / name), place / name) for name in recipe.tasks}
    shapes = {name: tuple(vectors.shape) for name, vectors in found.items()}
    if len(set(shapes.values())) > 1:
        raise ConfigError(f"the teachers in {place} have prompts of different shapes ({shapes}); train them alike")
    return torch.stack(list(found.values()))


def _train_teacher(recipe: Recipe, name: str, out: Path, console: Console, team: Team) -> None:
    from softprompt.train import train  # here because that module builds on this one

    done, begun = team.on_main(lambda: ((out / REPORT).is_file(), out.exists()))
    if done:  # what is written last is there
        return
    console.print(f"teacher of {name}", highlight=False)
    train(teacher_recipe(recipe, name, str(out)), resume=begun, console=console)


def _vectors(saved: SavedAdapter, place: Path) -> Tensor:
    """A saved prompt in input space, `[p, d]`."""
    method = next(method for method in METHODS.values() if method.peft_type == saved.config.peft_type)
    if not issubclass(method, EmbeddingPrompt) or method.task_parameters:
        raise ConfigError(f"the teacher in {place} is {method.name}; a teacher is one task's prompt_tuning or p_tuning")
    return saved.tensors["prompt_embeddings"][: saved.config.num_virtual_tokens].float()


@final
@dataclass(frozen=True)
class Distillation:
    """The loss of source training. `teachers` is the base model with every task's teacher before it, by `task_ids`.

    Of several processes each takes the distance of the states of its own rows, and the step the mean of those.
    """

    teachers: SoftPromptModel
    weight: float
    temperature: float

    @staticmethod
    def of(base: PreTrainedModel, prompts: Tensor, recipe: Recipe) -> Distillation:
        """`prompts` `[T, p, d]`: each task's table as a matrix of full rank, I · table, over a P* of ones."""
        tasks, tokens, _ = prompts.shape
        config = MultitaskPromptTuningConfig(
            task_type=recipe.task, num_virtual_tokens=tokens, num_tasks=tasks, num_ranks=tokens, inference_mode=True
        )
        model = get_peft_model(base, config)
        model.encoder().load_saved(
            {
                "prompt_embeddings": torch.ones_like(prompts[0]),
                "prefix_task_cols": torch.eye(tokens).expand(tasks, -1, -1),
                "prefix_task_rows": prompts,
            }
        )
        assert recipe.distillation is not None and recipe.temperature is not None
        return Distillation(model, recipe.distillation, recipe.temperature)

    def __call__(self, model: SoftPromptModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The loss, and its parts by name, on input_ids, attention_mask and labels `[B, T]` and task_ids `[B]`."""
        with torch.no_grad(), evaluating(self.teachers):
            told = self.teachers(**batch, output_hidden_states=True)
        said = model(**batch, output_hidden_states=True)
        answers, tokens, states = batch["labels"] != IGNORED, batch["attention_mask"].bool(), "hidden_states"
        if model.facts.encoder_decoder:  # whose decoder has a position for each token it writes
            tokens, states, own, theirs = answers, "decoder_hidden_states", said.logits, told.logits
        else:
            answers, own, theirs = answers[:, 1:], said.logits[:, :-1], told.logits[:, :-1]
        apart = divergence(own[answers], theirs[answers], self.temperature)
        pairs = zip(said[states][1:], told[states][1:], strict=True)
        distance = torch.stack([relative_distance(one[tokens], other[tokens]) for one, other in pairs]).mean()
        loss = said.loss + self.weight * (apart + distance)
        parts = {"task_loss": said.loss, "teacher_kl": apart, "teacher_distance": distance}
        return loss, {name: float(value.detach()) for name, value in parts.items()}


def divergence(own: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ own) of logits `[N, V]` at a temperature T, per row; times T², which keeps its weight."""
    p, q = (log_softmax(logits.float() / temperature, dim=-1) for logits in (teacher, own))
    return temperature**2 * kl_div(q, p, reduction="batchmean", log_target=True)


def relative_distance(own: Tensor, teacher: Tensor) -> Tensor:
    """‖own − teacher‖² / ‖teacher‖² of hidden states `[N, d]`.

    The paper's plain squared error depends on how large a model's states happen to be; this weighs the same anywhere.
    """
    own, teacher = own.float(), teacher.float()
    return (own - teacher).square().sum() / teacher.square().sum()
