"""What was found out about a base model and how prompts do on it: for a user's model, and for bug reports."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.base_model import BaseModel
from softprompt.canary import FOLDED, KEYS, ROWS, Comparison, compare_folded, compare_keys, compare_rows, verdict
from softprompt.config import EmbeddingConfig
from softprompt.elsewhere import own_class
from softprompt.errors import ConfigError, SoftPromptError
from softprompt.prompt import METHODS
from softprompt.stacking import unwrapped

REACH = 4096
"""How long a window or a chunk may be for a row to be made that passes it."""


@final
@dataclass(frozen=True)
class Fact:
    """One fact, its value, and how it was found."""

    name: str
    value: Any
    how: str = ""


@final
@dataclass(frozen=True)
class Row:
    """One comparison, and the methods it is for: `status` is equal, differs, refused or not tried.

    `difference` is that of the states, by their size; up to `tolerance` it is rounding.
    """

    method: str
    comparison: str
    status: str
    difference: float | None = None
    tolerance: float | None = None
    message: str = ""


@final
@dataclass(frozen=True)
class Report:
    """All of it. `str(report)` is the table, `to_json()` the same for programs."""

    model: str
    backend: str
    dtype: str
    way: str
    versions: dict[str, str]
    facts: list[Fact]
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether nothing differs from the model alone; what is refused is not wrong."""
        return all(row.status != "differs" for row in self.rows)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "ok": self.ok}, ensure_ascii=False, indent=2)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.model} ({self.dtype}, {self.backend} attention, {versions})",
            f"way in: {self.way}",
            "",
            "facts",
        ]
        wide = max(len(fact.name) for fact in self.facts) if self.facts else 0
        lines += [f"  {each.name:<{wide}}  {each.value}{f'  ({each.how})' if each.how else ''}" for each in self.facts]
        lines += ["", "a prompt of real tokens against these tokens in the row"]
        wide = max(len(row.comparison) for row in self.rows)
        for row in self.rows:
            by = "" if row.difference is None else f"  {row.difference:.1e} (rounding up to {row.tolerance:.0e})"
            lines.append(f"  {row.comparison:<{wide}}  {row.status}{by}{f'  {row.message}' if row.message else ''}")
            if row.method:
                lines[-1] += f"  [{row.method}]"
        return "\n".join(lines)


def check(model: PreTrainedModel | nn.Module, method: str | None = None, reach: int = REACH) -> Report:
    """Compare prompts on a base model with the same tokens in the row, in every way that is used.

    `method` names one of `METHODS`, of whose kind of prompt alone is asked then; windows and chunks of up to `reach`
    tokens are passed. Nothing raises that the model does: it stands in the report. ConfigError for an unknown method.

        print(softprompt.check(model))
    """
    base, chosen = unwrapped(model), _methods(method)
    try:
        found = BaseModel.of(base, far=reach)
    except SoftPromptError as error:
        return _report(base, "none", [], [Row(", ".join(chosen), "wrapping", "refused", message=str(error))])
    keys, vectors = (_of_kind(chosen, embeddings) for embeddings in (False, True))
    rows: list[Row] = []
    if keys or (vectors and found.facts.foldable):
        rows += _rows(found, keys, KEYS, compare_keys(found.way, found.facts, reach), found.facts.no_prefix)
    if vectors:
        reason = found.facts.no_vectors
        folded = compare_folded(found.way, found.facts) if found.facts.foldable else []
        inside = compare_rows(found.way, found.facts, reach)
        rows += _rows(found, vectors, FOLDED, folded, "")
        rows += _rows(found, vectors, ROWS, inside, reason)
    before = [each for each in found.compared if each.status == "differs" and each.kind == KEYS]
    if before and found.way.name == "cache":
        rows.insert(0, Row("", "through the attention interface", "refused", None, None, verdict(base, before)))
    return _report(base, found.way.name, _facts(found), rows)


def _rows(found: BaseModel, methods: list[str], kind: str, compared: list[Comparison], reason: str) -> list[Row]:
    """The comparisons of a kind; what is not used, since it would be wrong, is refused with the `reason`."""
    names = ", ".join(methods)
    if reason:
        return [Row(names, kind, "refused", message=reason)]
    return [
        Row(names, f"{kind}: {each.what}", each.status, each.difference, each.tolerance, each.message)
        for each in compared
    ]


def _facts(found: BaseModel) -> list[Fact]:
    facts, how = found.facts, found.facts.how
    shapes = sorted({(each.heads, each.key_size, each.value_size) for each in facts.layers})
    values: dict[str, Any] = {
        "causal": facts.causal,
        "encoder_decoder": facts.encoder_decoder,
        "foldable": facts.foldable,
        "layers": f"{len(facts.layers)} of (heads, key size, value size) {', '.join(map(str, shapes)) or '–'}",
        "reach": facts.reach if facts.reach is not None else "all",
        "hidden_size": facts.hidden_size,
        "context": facts.context if facts.context is not None else "no end",
        "learned_positions": facts.learned_positions,
        "position_offset": facts.position_offset,
        "cache": api.cache_name(found.base.forward) or "takes none",
    }
    return [Fact(name, value, how.get(name, "")) for name, value in values.items()]


def _report(base: PreTrainedModel, way: str, facts: list[Fact], rows: list[Row]) -> Report:
    from softprompt import __version__

    versions = {
        "softprompt": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    words = str(base.dtype).removeprefix("torch.")
    return Report(own_class(base).__name__, api.backend_of(base.config), words, way, versions, facts, rows)


def _methods(method: str | None) -> list[str]:
    if method is None:
        return sorted(METHODS)
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}; there are {', '.join(sorted(METHODS))}.")
    return [method]


def _of_kind(methods: list[str], embeddings: bool) -> list[str]:
    return [name for name in methods if issubclass(METHODS[name].config_class, EmbeddingConfig) is embeddings]
