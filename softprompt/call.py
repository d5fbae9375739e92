"""One call of a model: its arguments by what they mean, whatever a release of transformers names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.errors import ConfigError


@dataclass(frozen=True)
class Call:
    """Rows as `ids` `[B, T]`, or `vectors` `[B, T, d]` in their place, and what goes with them.

    `mask` `[B, cached + T]` or of four dimensions; `positions` `[B|1, T]`, or `[3|4, B, T]` with images; `cache` is
    what holds earlier tokens, `labels` what a loss is of. `rest` are all other arguments, by their names.

        call = Call.of({"input_ids": ids, "past_key_values": cache})
        model(**call.keywords(model.forward))  # under the names that this model takes
    """

    ids: Tensor | None = None
    vectors: Tensor | None = None
    mask: Any = None
    positions: Tensor | None = None
    cache: Any = None
    labels: Any = None
    rest: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(given: Mapping[str, Any]) -> Call:
        """A call with these keyword arguments. ConfigError for a cache by two names."""
        rest = dict(given)
        fields = {name: rest.pop(argument, None) for name, argument in _ARGUMENTS.items()}
        return Call(**fields, cache=api.pop_cache(rest), rest=rest)

    @staticmethod
    def to(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """A call of a module as a hook sees it; arguments without a name are told by the order of its own."""
        named = dict(zip(api.parameters(module.forward), args, strict=False)) if args else {}
        return Call.of({**named, **kwargs})

    def keywords(self, module: nn.Module) -> dict[str, Any]:
        """The same as keyword arguments of a module, those alone that are given.

        A cache that the module takes by no name of its own goes under transformers' name, for what it calls.
        """
        found = {argument: getattr(self, name) for name, argument in _ARGUMENTS.items()}
        if self.cache is not None:
            found[api.cache_name(module.forward) or api.CACHE_NAME] = self.cache
        return {**{name: value for name, value in found.items() if value is not None}, **self.rest}

    # ---- the same with something else --------------------------------------------------------------------------------

    def but(self, **changed: Any) -> Call:
        """The same call with other fields."""
        return replace(self, **changed)

    def plus(self, **more: Any) -> Call:
        """The same call with more, or other, arguments among `rest`."""
        return replace(self, rest={**self.rest, **more})

    def less(self, *names: str) -> Call:
        """The same call without these arguments of `rest`."""
        return replace(self, rest={name: value for name, value in self.rest.items() if name not in names})

    # ---- what it says ------------------------------------------------------------------------------------------------

    @property
    def given(self) -> bool:
        """Whether there are any rows."""
        return self.ids is not None or self.vectors is not None

    @property
    def rows(self) -> Tensor:
        """The rows, as ids or as vectors."""
        found = self.ids if self.vectors is None else self.vectors
        if found is None:
            raise ConfigError("the model is called without input_ids and inputs_embeds; give one of them.")
        return found

    @property
    def square(self) -> bool:
        """Whether there is a mask of four dimensions, which says what each token sees."""
        return isinstance(self.mask, Tensor) and self.mask.ndim == 4

    @property
    def flat_mask(self) -> Tensor | None:
        """The mask `[B, T]` that says which tokens are padding, if that is what is given."""
        return self.mask if isinstance(self.mask, Tensor) and self.mask.ndim == 2 else None

    @property
    def continues(self) -> bool:
        """Whether a cache that has seen tokens comes with the rows."""
        return self.cache is not None and bool(api.seen_tokens(self.cache) > 0)

    @property
    def packed(self) -> bool:
        """Whether a row holds several sequences (positions that start again, and no mask).

        Positions of three dimensions are those of images, and stand still within one.
        """
        if self.positions is None or self.positions.ndim != 2 or self.mask is not None:
            return False
        return bool((self.positions[:, 1:] <= self.positions[:, :-1]).any())

    @property
    def labels_tokens(self) -> bool:
        """Whether every token of rows that are given from their beginning has a label."""
        labels = self.labels
        if not isinstance(labels, Tensor) or labels.is_floating_point() or not self.given:
            return False
        return labels.shape == self.rows.shape[:2] and not self.continues

    @property
    def beyond_text(self) -> bool:
        """Whether images, videos or sounds come with the rows."""
        return any(api.reads_media(name) and value is not None for name, value in self.rest.items())

    @property
    def decodes_row(self) -> bool:
        """Whether an encoder-decoder's decoder gets the row itself, shifted, as some heads do without a target."""
        if any(self.rest.get(name) is not None for name in _DECODER_INPUTS):
            return False
        return not isinstance(self.labels, Tensor) or self.labels.ndim < 2 or self.labels.is_floating_point()

    # ---- changed for a purpose -----------------------------------------------------------------------------------

    def apart(self) -> Call:
        """With no cache where a row holds several sequences.

        transformers keeps them apart only where there is none, and makes one by default: then each would see the
        earlier.
        """
        if self.positions is None or self.cache is not None or torch.compiler.is_compiling() or not self.packed:
            return self
        return self.plus(use_cache=False)

    def with_mask(self, always: bool = False) -> Call:
        """With a mask of ones, if none is given: without one, transformers takes any gap in the positions for the start
        of another sequence, which then would not see the virtual token in its row."""
        if self.mask is not None or (self.positions is None and not always):
            return self
        rows = self.rows
        return self.but(mask=torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device))

    def without_cache(self) -> Call:
        """With no cache, which would hold rows as they were rearranged. ConfigError for one that is given."""
        if self.cache is not None:
            raise ConfigError("labels and a cache together: the loss needs the whole row, so pass no cache.")
        return self.plus(use_cache=False)


_ARGUMENTS = {
    "ids": "input_ids",
    "vectors": "inputs_embeds",
    "mask": "attention_mask",
    "positions": "position_ids",
    "labels": "labels",
}
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs")


def check_rows(call: Call, base: PreTrainedModel) -> None:
    """ConfigError for an input of each token that has not one entry per token of the rows.

    They are of the real tokens, whatever the prompt: a mask or labels with p more columns, as PEFT's users make them,
    would be read as if the row began p tokens later.
    """
    if not call.given:
        return
    tokens = call.rows.shape[1]
    found: dict[str, Any] = {"token_type_ids": call.rest.get("token_type_ids"), "position_ids": call.positions}
    if call.cache is None:
        found["attention_mask"] = call.flat_mask
    if not base.config.is_encoder_decoder and not api.classifies_rows(base):
        found["labels"] = call.labels
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] == tokens:
            continue
        if name == "labels" and value.is_floating_point():
            continue
        raise ConfigError(
            f"{name} has shape {tuple(value.shape)}, but the rows have {tokens} tokens; give one entry for each real "
            "token: virtual tokens need none."
        )


def check_written(mask: Any) -> None:
    """ConfigError for a `decoder_attention_mask` with padding before what is written: a decoder counts its distance to
    a prefix by columns."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all()):
        raise ConfigError(
            "decoder_attention_mask hides the beginning of a row, but this decoder counts its positions from the first "
            "column, behind the prefix; pad decoder_input_ids on the right."
        )


def check_count(adapter_names: Any, inputs: Mapping[str, Any]) -> None:
    """ConfigError unless there is one adapter name for each row of the inputs."""
    if adapter_names is None:
        return
    if isinstance(adapter_names, str) or not all(isinstance(each, str) for each in adapter_names) or not adapter_names:
        raise ConfigError(f"adapter_names={adapter_names!r}; give a list with the name of an adapter for each row.")
    for name in ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids"):
        rows = inputs.get(name)
        if rows is not None and len(rows) != len(adapter_names):
            raise ConfigError(
                f"{len(adapter_names)} adapter_names and {len(rows)} rows in {name}; give one name per row."
            )
