"""The base model as the library of prompts sees it: what fits before it, what a prompt folds to, its words."""

from typing import Any, Protocol

from torch import Tensor

from softprompt.geometry import Geometry
from softprompt.prompt import KV
from softprompt.store.loaded import LoadedPrompt


class Base(Protocol):
    """`LentBase` is an engine's own model; `FolderBase` reads one onto the CPU while something has to be folded.

    `name`: what requests call the base model itself, which no prompt may be called. `fingerprint`: hex digits that
    change with the weights. `dtype`: the number format it is served in, such as "bfloat16".
    """

    name: str
    fingerprint: str
    dtype: str
    tokenizer: Any

    @property
    def geometry(self) -> Geometry: ...

    def fold(self, loaded: LoadedPrompt) -> KV:
        """As `SoftPromptModel.fold`, on the CPU. UnsupportedError for what cannot be keys and values."""
        ...

    def words(self) -> Tensor:
        """The word embeddings `[V, d]`."""
        ...
