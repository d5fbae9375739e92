"""Prompts that stand in a template: the text of a request fills it, as `softprompt generate` fills it."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from softprompt.serve.version import Version

WHERE = "the text"


@dataclass(frozen=True)
class TextRow:
    """Token ids of a text; `slots`, where it fills a template: the virtual token in place of each id, −1 for none."""

    ids: tuple[int, ...]
    slots: tuple[int, ...] = ()

    @property
    def virtual(self) -> int:
        """Virtual tokens between its words."""
        return sum(slot >= 0 for slot in self.slots)

    @property
    def real(self) -> int:
        """Tokens of words, the template's own among them."""
        return len(self.ids) - self.virtual


def template_of(version: Version | None) -> str | None:
    """The template that a prompt stands in; None for one before, or behind the first word of, a text."""
    return _template(version.folder) if version is not None and version.slots else None


@lru_cache(1024)  # folders of versions never change
def _template(folder: Path) -> str | None:
    from softprompt.checkpoint import load_adapter
    from softprompt.config import EmbeddingConfig, Placement

    config = load_adapter(folder).config
    return config.template if isinstance(config, EmbeddingConfig) and config.placement is Placement.TEMPLATE else None


def in_template(template: str, text: str, tokenizer: Any) -> TextRow:
    """A template filled up to where the answer begins. The text is its only field, or a JSON object of several.

    ConfigError, DataError.
    """
    from softprompt.cli.cloze import fields_of
    from softprompt.cli.prompted import example_of
    from softprompt.data import input_rows
    from softprompt.data.columns import scalar
    from softprompt.data.rows import Row
    from softprompt.template import Answer, Template

    parsed = Template(template)
    if parsed.has_mask:
        given = Row(WHERE, fields_of(text, parsed, parsed.fields, WHERE, ""))
        fields = {name: scalar(given, name) for name in dict.fromkeys(parsed.fields)}
        row = parsed.encode(tokenizer, fields, answer=Answer.NEXT)
        return TextRow(tuple(row.input_ids), tuple(row.slots))
    ((ids, slots),) = input_rows([example_of(text, parsed, WHERE, "")], tokenizer)
    return TextRow(tuple(ids), tuple(slots or ()))
