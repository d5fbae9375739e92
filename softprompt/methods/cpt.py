"""CPT: Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods, https://arxiv.org/abs/2410.17222

The prompt is a context of labelled examples, e_i + δ_i, whose word embeddings e_i stay and whose δ_i are trained by
projected gradient descent, ‖δ_i‖ ≤ ε of the token's kind: input and template tokens move, label tokens do not. The loss
also counts the context's labels, those of the j-th answer from the end weighted by γ^j.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, final

import torch
from torch import Tensor, nn

from softprompt.config import EmbeddingConfig, Placement, PromptConfig, TaskType
from softprompt.elsewhere import embed_words
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.facts import Facts
from softprompt.prompt import Context, EmbeddingPrompt, Embeddings, need_count

WEIGHTED_LOSSES = ("none", "decay")
MOST = 10_000_000  # no vocabulary and no context comes near
REFERENCE_WIDTH = 2048  # the model width that the radii are given for


@dataclass(frozen=True, kw_only=True)
class CPTConfig(EmbeddingConfig):
    """CPT's choices; the names are PEFT's.

    `cpt_token_ids` is the context, and its length is `num_virtual_tokens`. `cpt_tokens_type_mask` says what each token
    is: modulo 4, 1 is an input template, 2 an input, 3 an output template and 0 (4, 8, 12, … for the first, second,
    third, … example) a label; 0 itself is a token that never moves and counts nowhere. Without a context the prompt
    starts as `num_virtual_tokens` times token 0, to be started from a text, and all of it may move.
    """

    PEFT_TYPE = "CPT"

    cpt_token_ids: list[int] | None = field(default=None, metadata={"help": "token ids of the context"})
    cpt_mask: list[int] | None = field(default=None, metadata={"help": "1 for every token (PEFT reads it nowhere)"})
    cpt_tokens_type_mask: list[int] | None = field(
        default=None, metadata={"help": "1 input template, 2 input, 3 output template, 4 label; +4 per example"}
    )
    opt_weighted_loss_type: str = field(default="none", metadata={"help": "none, or decay (earlier labels count less)"})
    opt_loss_decay_factor: float = field(default=1.0, metadata={"help": "factor per earlier example"})
    opt_projection_epsilon: float = field(default=0.1, metadata={"help": "how far an input token may move"})
    opt_projection_format_epsilon: float = field(default=0.1, metadata={"help": "how far a template token may move"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "tokenizer for the text or the labels"})

    def __post_init__(self) -> None:
        self._fill_context()
        super().__post_init__()
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise UnsupportedError(
                f"CPT's loss counts the label tokens of a text, so task_type={str(self.task_type)!r} cannot be; use "
                "CAUSAL_LM, or prompt_tuning for this task."
            )
        self._set("task_type", TaskType.CAUSAL_LM)
        if self.placement is not Placement.FRONT:
            raise ConfigError(
                f"placement={str(self.placement)!r}: a context stands in front of the text; leave it unset."
            )
        if self.opt_weighted_loss_type not in WEIGHTED_LOSSES:
            known = " or ".join(WEIGHTED_LOSSES)
            raise ConfigError(f"opt_weighted_loss_type={self.opt_weighted_loss_type!r} is not known; use {known}.")
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value!r}; it is a number from 0 up.")

    @property
    def started(self) -> bool:
        """Whether there is a context already."""
        return any(self.cpt_token_ids or []) or set(self.cpt_tokens_type_mask or []) != {1}

    def with_examples(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], instruction: Sequence[int] = ()
    ) -> Self:
        """With a context made of as many of the rows as `num_virtual_tokens` holds, unless it has one already.

        The instruction stands before them, as a template does. ConfigError where it leaves them no room.
        """
        if self.started or not rows:
            return self
        left = self.num_virtual_tokens - len(instruction)
        if left < 1:
            raise ConfigError(
                f"the instruction takes {len(instruction)} tokens, so num_virtual_tokens={self.num_virtual_tokens} "
                "leaves no room for examples; shorten it, or use more virtual tokens."
            )
        ids, types = context_of(rows, left)
        ids, types = [*instruction, *ids], [1] * len(instruction) + types
        return replace(self, cpt_token_ids=ids, cpt_tokens_type_mask=types, cpt_mask=None)

    def _fill_context(self) -> None:
        """The three lists, of one length, which is that of the prompt."""
        if self.cpt_token_ids is None and (self.cpt_mask is not None or self.cpt_tokens_type_mask is not None):
            raise ConfigError("cpt_mask and cpt_tokens_type_mask describe cpt_token_ids, which is not set; set it too.")
        if self.cpt_token_ids is None:
            self._check_count("num_virtual_tokens")
            self._set("cpt_token_ids", [0] * self.num_virtual_tokens)
        count = len(self.cpt_token_ids or [])
        self._set("num_virtual_tokens", count)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            self._set(name, [1] * count) if getattr(self, name) is None else None
        for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
            values = getattr(self, name)
            wrong = [value for value in values if type(value) is not int or not 0 <= value < MOST]
            if wrong:
                raise ConfigError(f"{name} holds {str(wrong[0])[:20]}; its entries are whole numbers from 0 to {MOST}.")
            if len(values) != count:
                raise ConfigError(f"{name} has {len(values)} entries, cpt_token_ids has {count}; give one per token.")
        if not self.inference_mode and 0 in (self.cpt_mask or []):
            raise ConfigError(
                "cpt_mask has a 0, but a context has no padding (PEFT would use it); leave those tokens out."
            )


def context_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]], limit: int) -> tuple[list[int], list[int]]:
    """Ids and types of a context: the first rows that fit whole into `limit` tokens, all labels being answers.

    Where none fits, the last tokens of the shortest, which its answer is among.
    """
    chosen, left = [], limit
    for ids, labels in rows:
        if len(ids) <= left:
            chosen.append((ids, labels))
            left -= len(ids)
    if not chosen:
        ids, labels = min(rows, key=lambda row: len(row[0]))
        chosen = [(ids[-limit:], labels[-limit:])]
    types = [4 * number + (2 if label == -100 else 4) for number, (_, labels) in enumerate(chosen) for label in labels]
    return [token for ids, _ in chosen for token in ids], types


@final
class FrozenTable(nn.Module):
    """A table `[n, width]` that is nobody's parameter."""

    weight: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.num_embeddings = rows
        self.register_buffer("weight", torch.zeros(rows, width))

    def forward(self, indices: Tensor) -> Tensor:
        return self.weight[indices]


@final
class CPTEmbedding(EmbeddingPrompt):
    """Indices `[B, n]` → vectors `[B, n, d]`: the context's embeddings plus what was trained, within the radii.

    `embedding` is the context, `delta_embedding` what is trained. `centre` is what the radii are measured from: the
    context's embeddings, also when training goes on from a saved prompt.
    """

    name = "cpt"
    config_class = CPTConfig
    task_types = (TaskType.CAUSAL_LM,)
    example = {  # noqa: RUF012 (a ClassVar of the base)
        "cpt_token_ids": [3, 4, 5, 6],
        "cpt_tokens_type_mask": [1, 2, 3, 4],
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 0.5,
        "opt_projection_epsilon": 10.0,
        "opt_projection_format_epsilon": 10.0,
    }
    embedding: FrozenTable
    centre: Tensor
    radii: Tensor
    ids: Tensor
    types: Tensor

    def __init__(self, config: CPTConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        need_count(config, "token_dim")
        assert config.token_dim is not None
        self.config = config
        rows, width = config.num_virtual_tokens, config.token_dim
        self.embedding = FrozenTable(rows, width)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.delta_embedding = nn.Embedding(rows, width)
        nn.init.zeros_(self.delta_embedding.weight)
        self.register_buffer("centre", torch.zeros(rows, width))
        self.register_buffer("ids", torch.tensor(config.cpt_token_ids), persistent=False)
        self.register_buffer("types", torch.tensor(config.cpt_tokens_type_mask), persistent=False)
        self.decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        self.register_buffer("radii", torch.tensor(projection_radii(config))[:, None], persistent=False)
        if word_embeddings is not None:
            self.start_from(_words(config, word_embeddings))

    @classmethod
    def fill(cls, config: PromptConfig, facts: Facts) -> PromptConfig:
        if not facts.causal:
            raise UnsupportedError("CPT is for decoders, whose next tokens are the labels; use prompt_tuning here.")
        return super().fill(config, facts)

    def forward(self, indices: Tensor) -> Tensor:
        with torch.no_grad():  # the projection after the latest step; the next one starts from here
            self.delta_embedding.weight.copy_(self.projected())
        moves = (self.radii > 0).to(self.radii.dtype)
        return self.embedding(indices) + self.delta_embedding(indices) * moves[indices]

    def projected(self) -> Tensor:
        """What is trained, `[n, d]`, brought back into the ball of each token's radius around `centre`."""
        delta, offset = self.delta_embedding.weight, self.embedding.weight - self.centre
        away = delta + offset
        norms = away.norm(dim=1, keepdim=True)
        pulled = away * (self.radii / norms.clamp(min=1e-30)) - offset
        within = norms <= self.radii * (1 + 1e-5)  # with room for rounding, so that a projection projected is itself
        stays = within | (delta == 0).all(dim=1, keepdim=True)  # a saved prompt stays what it is
        return torch.where(self.radii == 0, 0.0, torch.where(stays, delta, pulled))

    def prompt(self, task_ids: Tensor | None = None) -> Embeddings:
        return replace(super().prompt(task_ids), context=self.context())

    def context(self) -> Context:
        """Which virtual tokens are labels, for the loss."""
        return Context(self.ids, self.types, self.decay)

    def output_layer(self) -> None:
        return None

    @torch.no_grad()
    def start_from(self, target: Tensor) -> None:
        """Make `target` `[n, d]` the context, with nothing trained yet."""
        self._place(target)
        self.centre.copy_(target)

    @torch.no_grad()
    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """A saved prompt; the radii go on being measured from the context, unless it is out of their reach."""
        target = tensors["prompt_embeddings"]
        self._place(target)
        distances = (target.to(self.centre) - self.centre).norm(dim=1, keepdim=True)
        if bool((distances > self.radii * (1 + 1e-4) + 1e-6).any()):
            self.centre.copy_(target)

    def _place(self, target: Tensor) -> None:
        expected = tuple(self.embedding.weight.shape)
        if tuple(target.shape) != expected:
            raise ConfigError(f"initial vectors have shape {tuple(target.shape)}, this prompt needs {expected}.")
        self.embedding.weight.copy_(target)
        self.delta_embedding.weight.zero_()


def projection_radii(config: CPTConfig) -> list[float]:
    """How far each token may move: ε·√(d/2048) by its type, 0 for labels."""
    assert config.token_dim is not None and config.cpt_tokens_type_mask is not None
    scale = math.sqrt(config.token_dim / REFERENCE_WIDTH)
    template, given = config.opt_projection_format_epsilon * scale, config.opt_projection_epsilon * scale
    return [(0.0, template, given, template)[kind % 4] for kind in config.cpt_tokens_type_mask]


def _words(config: CPTConfig, word_embeddings: nn.Module) -> Tensor:
    """The context's word embeddings, `[n, d]`."""
    weight = next(word_embeddings.parameters())
    ids = config.cpt_token_ids or []
    if max(ids) >= weight.shape[0]:
        raise ConfigError(
            f"cpt_token_ids holds {max(ids)}, but this model has {weight.shape[0]} tokens; use its tokenizer."
        )
    return embed_words(word_embeddings, ids).float()
