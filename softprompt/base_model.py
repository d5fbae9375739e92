"""A base model that prompts stand before: the way into it, its facts, and what of them has been compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, final

import torch
import transformers
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.canary import FAR, Comparison, compare_folded, compare_keys, compare_rows, verdict
from softprompt.config import EmbeddingConfig, Placement, PromptConfig
from softprompt.elsewhere import own_class, sharded, word_table
from softprompt.errors import UnsupportedError
from softprompt.facts import Facts, Tried, probe, probed, refuses_vectors
from softprompt.injection.cache_kv import CacheWay, fills_cache
from softprompt.injection.contract import Way
from softprompt.injection.interface import BACKENDS, own_backend
from softprompt.prompt import evaluating
from softprompt.stacking import has_layers

_LOCK = Lock()
_KNOWN: dict[tuple[Any, ...], list[Comparison]] = {}
"""What has been compared in this process, by model and kind (`_key`)."""


@final
@dataclass
class BaseModel:
    """The way into a base model and its facts, found once; `verify` compares before anything is trusted.

    found = BaseModel.of(base)
    found.way, found.facts
    """

    way: Way
    facts: Facts
    verify: bool = True
    far: int = FAR
    compared: list[Comparison] = field(default_factory=list)
    _config: str = ""
    tried: Tried | None = None
    """What the model made of the tokens that it was tried with."""

    @staticmethod
    def of(base: PreTrainedModel, verify: bool = True, far: int = FAR) -> BaseModel:
        """UnsupportedError for a model that this version has no way into, naming what does work.

        On a causal model keys and values are compared at once, since vectors are folded into them; what else is
        compared when a prompt of its kind comes (`trust`).
        """
        way, facts, tried = probed(base)
        found = BaseModel(way, facts, verify, far, tried=tried)
        if found.facts.causal and found.facts.layers:
            found._trust_keys()
        found.facts = replace(found.facts, vectors=found._no_vectors)
        return found

    @property
    def base(self) -> PreTrainedModel:
        return self.way.base

    def know_loss(self) -> None:
        """Try the model's loss, if that has not been done; where it was never asked for it costs nothing."""
        if self.facts.causal and self.facts.foldable:
            _ = self.facts.divides_loss

    def trust(self, config: PromptConfig) -> None:
        """Compare what a prompt with this config needs. UnsupportedError for what differs from the model alone."""
        if isinstance(config, EmbeddingConfig):
            inside = config.placement is not Placement.FRONT and self.facts.causal and self.facts.foldable
            reason = self._known(compare_rows) if inside and not self.facts.no_vectors else ""
            if reason:
                raise UnsupportedError(f"{reason}; use placement='front', or prefix_tuning.")
        elif not self.facts.causal and not self.facts.no_prefix:
            self._trust_keys()
        if isinstance(config, EmbeddingConfig) and not self.facts.causal and self.facts.no_vectors:
            self._trust_keys()  # so that the refusal advises them only where they are right
        _ = self.facts.padding  # tried now, and not inside a call that is compiled or exported

    def _trust_keys(self) -> None:
        """Keys and values through this way, else through the cache; facts say where neither is right."""
        reason = self._known(compare_keys)
        if not reason:
            return
        plain = own_backend(api.own(self.base).config) in BACKENDS
        if plain and not isinstance(self.way, CacheWay) and self.facts.foldable and fills_cache(self.base):
            before = self.way, self.facts, self.tried
            if self._through_the_cache():
                return
            self.way, self.facts, self.tried = before
        self.facts = replace(self.facts, no_prefix=reason, foldable=False)

    def _through_the_cache(self) -> bool:
        """Whether keys and values through the cache are right; the way is that one then."""
        self.way = CacheWay(self.base)
        try:
            with torch.no_grad(), evaluating(self.base):
                seen, self.tried = probe(self.way, self.facts)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # its layers ask their cache for more than keys and values; the first reason stays
            return False
        self.facts = replace(seen, vectors=self.facts.vectors)
        return bool(self.facts.layers) and not self._known(compare_keys)

    def _no_vectors(self) -> str:
        """Why vectors cannot stand in this model's input, if they cannot, or do not what words do."""
        if self.verify and self.facts.foldable:  # where vectors that are no words are tried along
            reason = self._known(compare_folded)
            return reason and (refuses_vectors(self.base) or reason)
        return refuses_vectors(self.base) or self._known(compare_rows)

    def _known(self, compare: Any) -> str:
        """The verdict of a comparison, which is made once for all models of a class, config and backend."""
        if not self.verify or sharded(self.base):  # parts of a model that is shared out cannot be called alone
            return ""
        if not self._config:
            self._config = json.dumps(self.base.config.to_dict(), sort_keys=True, default=str)
        key = (compare.__name__, self.way.name, self.far, self._config, *_key(self.base))
        with _LOCK:
            found = _KNOWN.get(key)
        if found is None:
            found = compare(self.way, self.facts, self.far, self.tried)
            with _LOCK:
                _KNOWN[key] = found
        self.compared += [each for each in found if each not in self.compared]
        return verdict(self.base, found)


def find_way(base: PreTrainedModel, verify: bool = True) -> tuple[Way, Facts]:
    """The way into a model, and its facts; see `BaseModel.of`."""
    found = BaseModel.of(base, verify)
    found.tried = None
    return found.way, found.facts


def _key(base: PreTrainedModel) -> tuple[Any, ...]:
    """What a comparison holds for beside a config: class, number type, device, backends, PEFT's layers, versions."""
    words = word_table(base)
    backends = tuple(own_backend(each) for each in api.configs_of(base))
    versions = (transformers.__version__, torch.__version__)
    return own_class(base), words.dtype, words.device.type, backends, has_layers(base), versions
