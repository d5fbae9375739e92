"""`SoftPromptModel`: a frozen base model and its prompts. The names and signatures are PEFT's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import checkpoint
from softprompt.base_model import BaseModel
from softprompt.batch import bare_run, run_for
from softprompt.batch.find import BASE, placement_of
from softprompt.call import Call, check_count
from softprompt.config import PromptConfig
from softprompt.disabling import disabled, disabling
from softprompt.elsewhere import at_hand, word_table, words_of
from softprompt.errors import ConfigError
from softprompt.facts import Facts
from softprompt.fitting import fitted, method_of
from softprompt.fold_cache import FoldCache
from softprompt.heads import Heads, with_default_heads
from softprompt.injection.contract import Way
from softprompt.injection.scope import apart
from softprompt.loops import InLoops
from softprompt.prompt import KV, EmbeddingPrompt, SoftPrompt, evaluating
from softprompt.running import Run
from softprompt.running.drafting import drafting
from softprompt.running.token_scores import Asked, token_scores
from softprompt.stacking import freeze, unwrapped
from softprompt.state import leave_base_out
from softprompt.status import ModelStatus, model_status
from softprompt.store import PromptStore
from softprompt.transformers_api import OF_AN_ASSISTANT, PushToHubMixin


def get_peft_model(
    model: PreTrainedModel | nn.Module, peft_config: PromptConfig, adapter_name: str = "default", *, verify: bool = True
) -> "SoftPromptModel":
    """Freeze `model` and put a prompt before it. The base model object is kept, not copied.

    PEFT's LoRA and its other layers may be in the model already (also as PEFT's own wrapper); they train on as before.
    With `verify` the library compares itself with the model alone when it meets a class and config for the first time
    (a few calls of a dozen tokens), and raises UnsupportedError for what differs.
    """
    return SoftPromptModel(model, peft_config, adapter_name, verify=verify)


OF_THE_BASE = frozenset({
    "activation_checkpointing_disable", "activation_checkpointing_enable", "is_activation_checkpointing",
    "add_model_tags", "can_generate", "config", "dtype", "enable_input_require_grads", "disable_input_require_grads",
    "floating_point_ops", "estimate_tokens", "generation_config", "get_decoder", "get_encoder", "get_input_embeddings",
    "get_memory_footprint", "get_output_embeddings", "gradient_checkpointing_disable", "gradient_checkpointing_enable",
    "hf_device_map", "hf_quantizer", "is_gradient_checkpointing", "is_loaded_in_4bit", "is_loaded_in_8bit",
    "is_quantized", "loss_function", "main_input_name", "model_tags", "name_or_path", "num_parameters",
    "quantization_method", "resize_token_embeddings", "set_attn_implementation", "supports_gradient_checkpointing",
    "tie_weights", "vocab_size", "warnings_issued", "is_parallelizable", "model_parallel", "framework",
    "set_input_embeddings", "set_output_embeddings", "prepare_decoder_input_ids_from_labels",
    "compute_transition_scores",
})  # fmt: skip
"""What a prompted model answers for its base model, which in anything else it has knows nothing of a prompt."""

_CHOOSING = RLock()
"""Of threads that switch adapters, which must not end with one active and another that trains."""


class SoftPromptModel(PushToHubMixin, InLoops):
    """A frozen base model with one or more named prompts, one of them active.

    Outputs cover real tokens only (logits `[B, T, V]`); real tokens stand at positions p, p+1, … counted from the
    attention mask, so padding on either side changes nothing. `state_dict()` holds prompts, heads and trained LoRA, so
    that a checkpoint of a training loop does not repeat the frozen model.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        peft_config: PromptConfig,
        adapter_name: str = "default",
        *,
        verify: bool = True,
        found: BaseModel | None = None,
    ) -> None:
        """`found`: what is known of `model` already, so that it is not tried again."""
        super().__init__()
        model = unwrapped(model)
        self.base_model = model
        self.found = BaseModel.of(model, verify) if found is None else found
        self.peft_config: dict[str, PromptConfig] = {}
        self.prompt_encoder = nn.ModuleDict()
        self.folds = FoldCache()
        self.store: PromptStore | None = None
        self.heads = Heads(model)
        self.active_adapter = adapter_name
        self.add_adapter(adapter_name, peft_config)
        self.found.tried = None  # what the model was tried with is no more needed
        freeze(model)  # last: a config that does not fit leaves the model as it was
        self.set_adapter(adapter_name)
        leave_base_out(self)

    # ---- adapters ------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, peft_config: PromptConfig) -> None:
        """Make a new prompt under a name; it does not become active."""
        config = self._fill(peft_config)
        checkpoint.check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ConfigError(f"an adapter named {adapter_name!r} is there already; delete it or choose another name.")
        self._install(adapter_name, config, self._build(config))

    def _fill(self, config: PromptConfig) -> PromptConfig:
        self.found.trust(config)
        if not config.inference_mode:
            self.found.know_loss()
        filled = fitted(config, self.facts)
        name = config.base_model_name_or_path or self.base_model.name_or_path or None
        return replace(filled, base_model_name_or_path=name, modules_to_save=with_default_heads(config))

    def _build(self, config: PromptConfig) -> SoftPrompt:
        encoder = method_of(config)(config, words_of(self.base_model))
        return encoder.to(device=word_table(self.base_model).device, dtype=torch.float32)

    def _install(self, name: str, config: PromptConfig, encoder: SoftPrompt) -> None:
        for path in self.heads.paths(config):  # the steps that can fail come first
            if any(module in self._attention() for module in self.base_model.get_submodule(path).modules()):
                raise ConfigError(f"modules_to_save names {path!r}, which holds attention layers; name heads only.")
        self.heads.add(name, config)
        self.heads.requires_grad(name, False)
        self.prompt_encoder[name] = encoder.requires_grad_(False)
        self.peft_config[name] = config

    def _attention(self) -> set[nn.Module]:
        return {module for part in self.way.modules for module in part}

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Use this prompt from now on. Only its parameters train; with `inference_mode` none does."""
        self._check_known(adapter_name)
        with self.heads.alone(), _CHOOSING:
            self.active_adapter = adapter_name
            self.heads.use(adapter_name if self.enabled else None)
            self._set_trainable(None if inference_mode else adapter_name)

    def _set_trainable(self, active: str | None) -> None:
        for name, config in self.peft_config.items():
            trains = name == active and not config.inference_mode
            self.prompt_encoder[name].requires_grad_(trains)
            self.heads.requires_grad(name, trains)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a prompt. The last one stays; when the active one goes, the first of the others becomes active."""
        self._check_known(adapter_name)
        if len(self.peft_config) == 1:
            raise ConfigError(f"{adapter_name!r} is the only adapter; use get_base_model() for the model without any.")
        if adapter_name == self.active_adapter:
            self.set_adapter(next(name for name in self.peft_config if name != adapter_name))
        del self.prompt_encoder[adapter_name], self.peft_config[adapter_name]
        self.folds.clear()
        self.heads.remove(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the plain base model, its own head included, for the thread that entered it."""
        try:
            with disabling(self):
                self.heads.use(None)
                yield
        finally:
            self.heads.use(self.active_adapter if self.enabled else None)

    def _check_known(self, name: str) -> None:
        if name not in self.peft_config:
            raise ConfigError(f"there is no adapter named {name!r}; there are {', '.join(self.peft_config)}.")

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    @property
    def active_peft_config(self) -> PromptConfig:
        return self.peft_config[self.active_adapter]

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model

    def attach(self, store: PromptStore | None) -> None:
        """Let `adapter_names` also name the prompts of a store, for those that are no adapters here; None detaches."""
        self.store = store

    # ---- the prompt ----------------------------------------------------------------------------------------------

    def encoder(self, adapter_name: str | None = None) -> SoftPrompt:
        """The method object of an adapter (default: the active one)."""
        name = adapter_name or self.active_adapter
        self._check_known(name)
        encoder = self.prompt_encoder[name]
        assert isinstance(encoder, SoftPrompt)
        return encoder

    @torch.no_grad()
    def prompt_vectors(self, adapter_name: str | None = None, task: int | None = None) -> Tensor | None:
        """The virtual tokens in input space, detached, `[n, d]`; None for methods whose prompt is keys and values.

        Of a prompt of several tasks those of one, or, without `task`, the table that all of them share.
        """
        encoder = self.encoder(adapter_name)
        if not isinstance(encoder, EmbeddingPrompt):
            return None
        if task is None and encoder.num_tasks > 1:
            return encoder.saved_vectors()
        with evaluating(encoder):
            return encoder.prompt(None if task is None else torch.tensor([task])).vectors[0].detach().clone()

    @torch.no_grad()
    def fold(self, adapter_name: str | None = None, task: int | None = None) -> KV:
        """The adapter's prompt as keys and values per layer, `[1, h, p, k]` each, in its type and without gradient.

        `task` is the one that is meant of a prompt of several. Raises UnsupportedError on models that are not causal,
        where a prompt depends on the row behind it.
        """
        encoder = self.encoder(adapter_name)
        own = word_table(self.base_model)
        with evaluating(encoder), evaluating(self.base_model):
            prompt = encoder.prompt(None if task is None else torch.tensor([task]))
            run = Run(self.way, self.facts, prompt, placement_of(encoder.config))
            return run.as_kv().map(lambda part: part.to(own))

    # ---- running -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        return_dict: bool | None = None,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | None = None,
        slots: Tensor | None = None,
        per_token: bool | Asked = False,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_type_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model's `forward`; `position_ids` and `cache` (`past_key_values` before 5.24) count real tokens.

        `adapter_names` has the adapter of each row, of any methods and lengths, `"__base__"` for none; names of
        adapters here, or of the attached store's. RowsError where some cannot be used, before anything runs.
        `task_ids` `[B]` chooses each row's task of a multitask prompt. `slots` `[B, T]`, for a prompt whose placement
        is a template, says which virtual token (0…p−1) stands in a column instead of its id; −1 is an ordinary token.
        The loss of a language model also counts a row's first real token (predicted by the last virtual token of an
        embedding method) where its label is not −100. With a label for every token no cache is returned.
        `per_token`: the labels' log-probabilities (`TokenScores`) and no logits, as TRL asks for them. Inputs that are
        named here are columns of a data set that transformers' Trainer keeps.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds,
                 "labels": labels, "position_ids": position_ids, "token_type_ids": token_type_ids,
                 "cache": cache, "past_key_values": past_key_values, "start_positions": start_positions,
                 "end_positions": end_positions, "decoder_input_ids": decoder_input_ids, "pixel_values": pixel_values,
                 "input_type_mask": input_type_mask}  # fmt: skip
        inputs = {name: value for name, value in given.items() if value is not None} | kwargs
        as_tuple = not (self.base_model.config.return_dict if return_dict is None else return_dict)
        call = Call.of(inputs).plus(return_dict=True)
        if call.labels is not None and self.enabled:
            with self._calling([BASE]):  # with one head for all rows, and no other thread's
                self.found.know_loss()
        with at_hand(self.base_model), self._calling(adapter_names) as names:
            run = None
            if names is not None:
                check_count(adapter_names, inputs)
                run = run_for(self, names, task_ids, slots, call.labels_tokens)
                if run is None and adapter_names is not None and call.labels_tokens:
                    run = bare_run(self)
            if per_token:
                asked = per_token if isinstance(per_token, Asked) else Asked()
                return token_scores(self.base_model, run, call, asked.wanted, asked.temperature)
            output = self.base_model(**call.keywords(self.base_model)) if run is None else run.forward(call)
        return output.to_tuple() if as_tuple else output

    @contextmanager
    def _calling(self, adapter_names: Sequence[str] | None) -> Iterator[Sequence[str] | None]:
        """Inside the block each row goes through its own head: the names of all rows' adapters, one for all of them, or
        None for the base model alone."""
        with apart(self.base_model):
            if disabled(self):
                with self.heads.for_rows([BASE]):
                    yield None
                return
            with self.heads.for_rows(adapter_names, lambda: self.active_adapter) as names:
                yield names

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | None = None,
        slots: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model's `generate`, with the active prompt; `adapter_names`, `task_ids`, `slots` as in `forward`.

        Caches hold real tokens only, unless the prompt stands inside the rows or the model keeps a state.
        """
        assistant = kwargs.get("assistant_model")
        if isinstance(assistant, SoftPromptModel) and assistant.enabled:
            with drafting(assistant) as stand_in:
                kwargs["assistant_model"] = stand_in
                return self._generate(args, kwargs, adapter_names, task_ids, slots)
        return self._generate(args, kwargs, adapter_names, task_ids, slots)

    def _generate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: Any, task_ids: Any, slots: Any
    ) -> Any:
        with at_hand(self.base_model), self._calling(adapter_names) as names:
            run = None
            if names is not None:
                check_count(adapter_names, {"inputs": args[0] if args else None, **kwargs})
                with self._evaluating(names):
                    run = run_for(self, names, task_ids, slots, labelled=False)
            if run is None:
                return self.base_model.generate(*args, **kwargs)  # pyright: ignore[reportCallIssue]
            return run.generate(*args, **kwargs)

    @contextmanager
    def _evaluating(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Dropout off in the encoders of these adapters."""
        with ExitStack() as stack:
            for name in set(adapter_names):
                if name in self.peft_config:
                    stack.enter_context(evaluating(self.encoder(name)))
            yield

    # ---- saving and loading --------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        keep_encoder: bool = False,
        is_main_process: bool = True,
        **unused: Any,
    ) -> None:
        """Write adapters in PEFT's format: `default` into the folder itself, any other into a sub-folder of its name.

        The encoder is dropped, as the papers do; `keep_encoder` writes it to a file of its own that PEFT ignores, so
        that training can go on with `from_pretrained(…, is_trainable=True)`.
        """
        known = {"safe_serialization", "save_embedding_layers", "state_dict", "push_to_hub", "token", "repo_id",
                 "save_function"}  # fmt: skip
        for name in sorted(set(unused) - known):
            raise ConfigError(f"save_pretrained has no option {name!r}.")
        if unused.get("safe_serialization") is False:
            raise ConfigError("safe_serialization=False would write a pickle; adapters are saved as safetensors only.")
        for name in selected_adapters or list(self.peft_config):
            self._check_known(name)
            folder = Path(save_directory) / ("" if name == "default" else name)
            encoder = self.encoder(name)
            saved = {key: tensor.cpu() for key, tensor in encoder.saved_tensors().items()}
            tensors = {**saved, **self.heads.state(name)}
            kept = {key: value.detach().cpu() for key, value in encoder.state_dict().items()} if keep_encoder else None
            if is_main_process:
                checkpoint.save_adapter(folder, self.saved_config(name), tensors, kept)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        verify: bool = True,
        **hub_options: Any,
    ) -> "SoftPromptModel":
        """Put a saved prompt (ours or PEFT's) before `model`. Nothing is changed unless everything fits.

        `verify` as for `get_peft_model`.
        """
        checkpoint.check_adapter_name(adapter_name)
        model = unwrapped(model)
        saved = checkpoint.load_adapter(model_id, **checkpoint.for_hub(hub_options))
        found = BaseModel.of(model, verify)
        checkpoint.check_fits(saved, found.facts)
        Heads(model).check(saved.config, saved.tensors)
        loaded = cls(model, saved.config, adapter_name, found=found)
        loaded._load(adapter_name, saved, is_trainable)
        return loaded if is_trainable else loaded.eval()

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **hub_options: Any
    ) -> None:
        """Load one more saved prompt under a name of its own; it does not become active."""
        saved = checkpoint.load_adapter(model_id, **checkpoint.for_hub(hub_options))
        checkpoint.check_fits(saved, self.facts)
        self.heads.check(saved.config, saved.tensors)
        self.add_adapter(adapter_name, saved.config)
        self._load(adapter_name, saved, is_trainable)

    def _load(self, name: str, saved: "checkpoint.SavedAdapter", is_trainable: bool) -> None:
        config = replace(self.peft_config[name], inference_mode=not is_trainable)
        if is_trainable and saved.encoder is not None:
            self.prompt_encoder[name] = self._build(config)
            self.prompt_encoder[name].load_state_dict(saved.encoder)
        else:
            self.encoder(name).load_saved(saved.tensors)
        self.heads.load(name, saved.tensors)
        self.peft_config[name] = config
        self._set_trainable(self.active_adapter)

    # ---- what users of PEFT and transformers call ----------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    @property
    def enabled(self) -> bool:
        """False inside `disable_adapter`, in the thread that entered it."""
        return not disabled(self)

    @property
    def way(self) -> Way:
        """How keys and values get into the base model."""
        return self.found.way

    @property
    def facts(self) -> Facts:
        """What was found out about the base model."""
        return self.found.facts

    def get_model_status(self) -> ModelStatus:
        """Adapters, what trains, and how much there is."""
        return model_status(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = f"trainable%: {100 * trainable / total:.4f}"
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || {share}")  # noqa: T201 – as the name says

    def __getattr__(self, name: str) -> Any:
        """What is the base model's own and has nothing to do with its prompt, by name (`OF_THE_BASE`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", ()):
                raise
        if name in OF_THE_BASE or name in OF_AN_ASSISTANT or not hasattr(self.base_model, name):
            return getattr(self.base_model, name)
        raise AttributeError(
            f"SoftPromptModel has no {name!r}, and the {type(self.base_model).__name__}'s knows nothing of its prompt: "
            f"call forward or generate, or use get_base_model().{name} for the model without any."
        )


PeftModel = SoftPromptModel
# PEFT has one class per head; here nothing depends on the head, so its names mean the one class.
PeftModelForCausalLM = PeftModelForSequenceClassification = PeftModelForTokenClassification = SoftPromptModel
PeftModelForQuestionAnswering = PeftModelForFeatureExtraction = PeftModelForSeq2SeqLM = SoftPromptModel
