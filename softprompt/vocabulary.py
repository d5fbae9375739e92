"""Token ids against the table that turns them into vectors: a tokenizer may know more tokens than the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError


def check_ids(words: nn.Module, ids: Sequence[int] | Tensor, tokenizer: Any = None) -> None:
    """ConfigError if one of the ids `[…]` has no row in the table of the word embeddings `words`."""
    check_tokens(ids, next(words.parameters()).shape[0], tokenizer)


def check_tokens(ids: Sequence[int] | Tensor, rows: int, tokenizer: Any = None) -> None:
    """ConfigError if one of the ids `[…]` is not among the `rows` tokens of a model."""
    found = torch.as_tensor(ids)
    if found.numel() == 0 or (int(found.min()) >= 0 and int(found.max()) < rows):
        return
    wrong = int(found.max()) if int(found.max()) >= rows else int(found.min())
    known = "" if tokenizer is None else f"the tokenizer has {len(tokenizer)} tokens, and "
    enough = wrong + 1 if tokenizer is None else max(len(tokenizer), wrong + 1)
    remedy = f", or call model.resize_token_embeddings({enough})" if wrong >= 0 else ""
    raise ConfigError(
        f"{known}the text has token {wrong}, but the model knows {rows} tokens; use the tokenizer that the model was "
        f"trained with{remedy}."
    )
