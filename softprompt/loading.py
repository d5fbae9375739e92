"""The frozen model and its tokenizer, from a folder, a hub name, or the package itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from softprompt import transformers_api as api
from softprompt.elsewhere import loader_of, place_of
from softprompt.errors import ConfigError
from softprompt.recipe import DTYPES, EMBEDDED, Recipe
from softprompt.recipe.placing import Places, device_map_of, max_memory_of


@dataclass(frozen=True)
class Dispatch:
    """Where transformers puts the layers of a base model, by accelerate: `from_pretrained`'s arguments."""

    device_map: str | Places
    offload_folder: str | None = None
    max_memory: dict[int | str, int | str] | None = None

    @classmethod
    def of(cls, recipe: Recipe | None) -> Self | None:
        """What a recipe says, if it says anything."""
        placed = None if recipe is None else device_map_of(recipe)
        if recipe is None or placed is None:
            return None
        return cls(placed, recipe.offload_folder, max_memory_of(recipe))

    def options(self) -> dict[str, Any]:
        """Those that are set. ``ConfigError`` without accelerate, and for processes that would all take all GPUs."""
        if find_spec("accelerate") is None:
            raise ConfigError("device_map needs the package accelerate; run: pip install 'softprompt[big]'")
        if isinstance(self.device_map, str) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"device_map is {self.device_map!r}, which every one of several processes would fill all devices by; "
                "use shard: true, or give a mapping"
            )
        return {name: value for name, value in vars(self).items() if value is not None}


def resolve_model(name: str) -> str:
    """``name`` as transformers takes it: the embedded model's folder for ``"embedded"``, anything else unchanged."""
    if name != EMBEDDED:
        return name
    from softprompt.embedded import PATH

    return str(PATH)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, with a pad token (the end token where it has none of its own)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    except MemoryError:
        raise
    except Exception as error:  # a damaged folder raises anything from KeyError to the parsers' own types
        raise _cannot_load("tokenizer", name, error) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer of {name} has neither a pad token nor an end token; set one in its files")
    return tokenizer


def load_base(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    label_names: list[str] | None = None,
    dtype: str = "float32",
    device: str = "auto",
    cloze: bool = False,
    dispatch: Dispatch | None = None,
) -> PreTrainedModel:
    """The base model in eval mode; with ``label_names`` one that classifies, its head new and seeded by the caller.

    For a ``cloze`` task a language model of any kind: masked, causal or encoder-decoder, as its config says.
    With ``dispatch`` its layers go where that says, and ``device`` is not looked at.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), **(dispatch.options() if dispatch else {})}
    auto: Any = AutoModelForCausalLM
    if label_names is not None:
        auto = AutoModelForSequenceClassification
        options["id2label"] = dict(enumerate(label_names))
        options["label2id"] = {label: number for number, label in enumerate(label_names)}
        options["ignore_mismatched_sizes"] = True  # a head for other labels is replaced, as a missing one is made
    path = resolve_model(name)
    try:
        with quietly(), _complete():
            if label_names is None and (cloze or _is_encoder_decoder(path)):
                auto = language_model_class(path)
            random = torch.get_rng_state()
            model, report = auto.from_pretrained(path, output_loading_info=True, **options)
    except MemoryError:
        raise
    except Exception as error:  # a damaged folder raises anything from KeyError to the parsers' own types
        raise _cannot_load("model", name, error) from None
    if dispatch:
        _draw_heads(model, random)
    if cloze and report["missing_keys"]:
        raise ConfigError(
            f"{name} has no weights for predicting words ({len(report['missing_keys'])} tensors of "
            f"{type(model).__name__} are missing); a cloze task needs a model with its language model's head"
        )
    if model.config.pad_token_id is None:  # a classifying decoder finds its last real token by this
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval() if dispatch else model.to(pick_device(device)).eval()


@torch.no_grad()
def _draw_heads(model: PreTrainedModel, random: torch.Tensor) -> None:
    """Draw heads in memory, as loading does from `random` on, that are to be read from files which do not have them."""
    body = set(model.base_model.modules())
    lost = [part for part in model.modules() if part is not model and part not in body and _lost(part)]
    if not lost:
        return
    from accelerate.hooks import remove_hook_from_module

    torch.set_rng_state(random)
    for part in lost:
        place = place_of(part)
        loader_of(part).original_devices.clear()  # nothing is to be put back there
        remove_hook_from_module(part)
        part.to_empty(device=place, recurse=False)
        api.initialize(model, part)


def _lost(part: torch.nn.Module) -> bool:
    """Whether a module waits for weights that are not there, or for another number of labels."""
    loader = loader_of(part)
    for name, parameter in part.named_parameters(recurse=False) if loader else ():
        try:
            if parameter.is_meta and loader.weights_map[name].shape != parameter.shape:
                return True
        except KeyError:
            return True
    return False


def _is_encoder_decoder(path: str) -> bool:
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(path).is_encoder_decoder)


def language_model_class(path: str) -> Any:
    """The auto class of the language model that a config describes, by the architecture it was saved with."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    config = AutoConfig.from_pretrained(path)
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    saved = (config.architectures or [""])[0]
    causal = saved.endswith(("ForCausalLM", "LMHeadModel")) or type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForMaskedLM


@contextmanager
def _complete() -> Iterator[None]:
    """With all weights in every process: under accelerate's launcher all but the first would get none."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bar, which a small model outruns, and its report that a new head is new."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU when there is one; a device that is not there is a ``ConfigError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); use cpu or auto") from None
    return device


def _cannot_load(what: str, name: str, error: Exception) -> ConfigError:
    place = Path(resolve_model(name))
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
    if "offload_folder" in reason:
        return ConfigError(f"some weights of {name} must be written to disk again to stay there; give offload_folder")
    if "mismatched" in reason:
        reason = "its weights have other shapes than its config says"
    elif isinstance(error, LookupError):
        reason = f"{type(error).__name__} {reason}"
    if place.is_dir() and not (place / "config.json").is_file():
        return ConfigError(f"{place} holds no model (it has no config.json); give a model's folder")
    if place.exists():
        return ConfigError(f"the {what} in {place} cannot be loaded ({reason}); check the folder")
    if place.is_absolute() or len(place.parts) > 2:  # no name on the hub looks like that
        return ConfigError(f"there is no model folder {name}; check the path")
    remedy = "give the folder of a model, or a hub name that can be reached"
    return ConfigError(f"there is no folder {name}, and as a hub name it has no usable {what} ({reason}); {remedy}")
