"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning, https://arxiv.org/abs/2104.08691

The prompt is a free table P ∈ R^{p×d} in front of the embedded input: [P; E(x)] (section 2). It starts from a
uniform draw on ±0.5, from the embeddings of common words, from a text, or from the class labels (section 2.1).
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, final

import torch
from torch import Tensor, nn

from softprompt.config import EmbeddingConfig, parse_enum
from softprompt.elsewhere import embed_words
from softprompt.errors import ConfigError
from softprompt.prompt import EmbeddingPrompt, need_count
from softprompt.vocabulary import check_ids


class PromptTuningInit(str, Enum):
    """Where the virtual tokens start.

    `RANDOM` is the paper's uniform draw on ±0.5 (PEFT draws from N(0, 1), some fifty times wider than embeddings are).
    `SAMPLE_VOCAB` is PEFT's draw from all words, with replacement; `COMMON_VOCAB` the paper's from the 5,000 most
    common ones, without. PEFT reads a prompt that began as `COMMON_VOCAB` or `CLASS_LABELS`: the start is over by then.
    """

    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    COMMON_VOCAB = "COMMON_VOCAB"
    TEXT = "TEXT"
    CLASS_LABELS = "CLASS_LABELS"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(EmbeddingConfig):
    """Prompt tuning's choices.

    `TEXT` tokenises with `tokenizer_name_or_path`, the other starts too where it is set, else with the base model's;
    text is cut or repeated to p tokens. What class labels leave open, and all of `COMMON_VOCAB`, is drawn from the
    `common_vocab_size` first ordinary tokens of the vocabulary, which tokenizers keep in order of frequency.
    """

    PEFT_TYPE = "PROMPT_TUNING"

    prompt_tuning_init: PromptTuningInit | str = field(
        default=PromptTuningInit.RANDOM,
        metadata={"help": "start from RANDOM, SAMPLE_VOCAB, COMMON_VOCAB, TEXT or CLASS_LABELS"},
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "the text to start from"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "tokenizer for the text or the labels"})
    tokenizer_kwargs: dict[str, Any] | None = None
    class_labels: list[str] | None = field(default=None, metadata={"help": "label words to start from"})
    common_vocab_size: int = field(default=5000, metadata={"help": "how many tokens COMMON_VOCAB draws from"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("common_vocab_size")
        init = parse_enum(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        self._set("prompt_tuning_init", init)
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            raise ConfigError("tokenizer_kwargs may not hold 'trust_remote_code': a prompt never runs code; remove it.")
        needs = {
            PromptTuningInit.TEXT: ("prompt_tuning_init_text", "tokenizer_name_or_path"),  # as in PEFT
            PromptTuningInit.CLASS_LABELS: ("class_labels",),
        }
        for name in needs.get(init, ()):
            if not getattr(self, name):
                raise ConfigError(f"prompt_tuning_init={init.value!r} needs {name}, which is not set.")
        if init not in needs and self.tokenizer_kwargs:
            raise ConfigError("tokenizer_kwargs is only used with prompt_tuning_init='TEXT' or 'CLASS_LABELS'.")


@final
class PromptEmbedding(EmbeddingPrompt):
    """The table of virtual tokens: indices `[B, n]` → vectors `[B, n, d]`.

    `word_embeddings` is the base model's input embedding, needed for every start but RANDOM.
    """

    name = "prompt_tuning"
    config_class = PromptTuningConfig
    table_is_prompt = True

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        need_count(config, "token_dim")
        self.config = config
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)  # pyright: ignore[reportArgumentType]
        if config.inference_mode:
            return
        with torch.no_grad():
            if config.prompt_tuning_init is PromptTuningInit.RANDOM:
                self.embedding.weight.uniform_(-0.5, 0.5)
            elif word_embeddings is None:
                raise ConfigError(
                    f"prompt_tuning_init={config.prompt_tuning_init!r} needs the model's word embeddings."
                )
            else:
                self.embedding.weight.copy_(initial_rows(config, word_embeddings))

    def forward(self, indices: Tensor) -> Tensor:
        return self.embedding(indices)

    def output_layer(self) -> None:
        return None


def initial_rows(config: PromptTuningConfig, word_embeddings: nn.Module) -> Tensor:
    """The table's start, `[n, d]` in float32, for every init that reads the vocabulary."""
    count, weight = config.num_virtual_tokens, next(word_embeddings.parameters())

    def embed(ids: list[int] | Tensor) -> Tensor:
        return embed_words(word_embeddings, ids).float()

    if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
        return embed(torch.randint(weight.shape[0], (count,)))
    tokenizer = _tokenizer(config)

    def embed_text(ids: list[int]) -> Tensor:
        check_ids(word_embeddings, ids, tokenizer)
        return embed(ids)

    if config.prompt_tuning_init is PromptTuningInit.TEXT:
        ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
        if not ids:
            raise ConfigError(
                f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens; give another."
            )
        return embed_text((ids * math.ceil(count / len(ids)))[:count])
    means = [embed_text(ids).mean(0) for ids in _label_ids(config, tokenizer)]
    common = common_tokens(tokenizer, min(config.common_vocab_size, weight.shape[0]))
    rest = embed(_drawn([token for token in common if token < weight.shape[0]], count - len(means)))
    return torch.cat([torch.stack(means), rest]) if means else rest


def _label_ids(config: PromptTuningConfig, tokenizer: Any) -> list[list[int]]:
    """The tokens of each class label; none for another start."""
    labels = config.class_labels or [] if config.prompt_tuning_init is PromptTuningInit.CLASS_LABELS else []
    if len(labels) > config.num_virtual_tokens:
        raise ConfigError(
            f"{len(labels)} class_labels do not fit into num_virtual_tokens={config.num_virtual_tokens}; use more."
        )
    found = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    for label, ids in zip(labels, found, strict=True):
        if not ids:
            raise ConfigError(f"the class label {label!r} has no tokens; give another word for it.")
    return found


def common_tokens(tokenizer: Any, limit: int = 5000, texts: Iterable[str] | None = None) -> list[int]:
    """The ids of the `limit` most common ordinary tokens: as counted in `texts`, else in the vocabulary's own order.

    A SentencePiece vocabulary is sorted by likelihood (which is what the paper goes by), one of byte pairs or word
    pieces by when a piece was merged. Special, unused and byte-fallback tokens are left out.
    """
    special = set(tokenizer.all_special_ids)
    if texts is not None:
        counts = Counter(token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"])
        return [token for token, _ in counts.most_common() if token not in special][:limit]
    pieces = sorted((token, piece) for piece, token in tokenizer.get_vocab().items())
    return [token for token, piece in pieces if token not in special and not _NO_WORD.fullmatch(piece)][:limit]


_NO_WORD = re.compile(r"<0x[0-9A-Fa-f]{2}>|[\[<]unused_?\d+[\]>]|<extra_id_\d+>|madeupword\d+")


def _drawn(tokens: list[int], count: int) -> list[int]:
    """`count` of them, each at most once."""
    if len(tokens) < count:
        raise ConfigError(
            f"{count} virtual tokens cannot be drawn without repetition from {len(tokens)} common tokens; raise "
            "common_vocab_size or use fewer virtual tokens."
        )
    return [tokens[place] for place in torch.randperm(len(tokens))[:count].tolist()]


def _tokenizer(config: PromptTuningConfig) -> Any:
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path or config.base_model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(name or "", **(config.tokenizer_kwargs or {}))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {name!r}; give another tokenizer_name_or_path.") from error
