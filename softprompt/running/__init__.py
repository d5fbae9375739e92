"""How a prompt reaches a call of the model: which door, by the kind of prompt and of model, never by the method.

- keys and values, and front embeddings folded into them: the attention door (`doors.attention`), or the cache door
  (`doors.cache`) on families that attend in code of their own;
- embeddings that cannot be folded (encoders, models with a state, slots inside the row): in the rows
  (`doors.embedding`);
- embeddings on encoder-decoders: in the encoder's rows (`doors.encoder`).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.batch.join import Mixed
from softprompt.config import Placement
from softprompt.doors.cache import Door
from softprompt.doors.decoder import check_decoding
from softprompt.doors.embedding import embed, fill_slots, place, take
from softprompt.doors.encoder import cut, open_encoder
from softprompt.doors.lengths import own_lengths, padded
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.fold import Folded, fold, fold_and_predict
from softprompt.geometry import Geometry
from softprompt.inputs import (
    apart,
    beyond_text,
    cached,
    check_written,
    decodes_row,
    labels_tokens,
    packed,
    with_mask,
    with_pooling_mask,
    without_cache,
)
from softprompt.prompt import KV, Embeddings, spread
from softprompt.running.context_loss import forward_with_context
from softprompt.running.first_loss import with_first_loss, without_first
from softprompt.running.span_loss import with_kept_logits, with_span_loss

Prompt = Embeddings | KV | Folded | Mixed


@dataclass(frozen=True)
class Run:
    """One call of a base model with a prompt. `slots` `[B, T]` says where in the rows virtual tokens stand."""

    door: Door
    geometry: Geometry
    prompt: Prompt
    placement: Placement = Placement.FRONT
    slots: Tensor | None = None

    @property
    def base(self) -> PreTrainedModel:
        return self.door.base

    @property
    def vectors(self) -> Embeddings | None:
        """What of the prompt is vectors in the model's input."""
        if isinstance(self.prompt, Embeddings):
            return self.prompt
        return self.prompt.vectors if isinstance(self.prompt, Mixed) else None

    @property
    def kv(self) -> KV | None:
        """What of the prompt is keys and values already."""
        if isinstance(self.prompt, KV):
            return self.prompt
        return None if isinstance(self.prompt, Embeddings) else self.prompt.kv

    @property
    def folds(self) -> bool:
        """Whether the whole prompt is, or can be turned into, keys and values in front of every row."""
        return self.vectors is None or can_fold(self.geometry, self.placement)

    def as_kv(self) -> KV:
        if not isinstance(self.prompt, Embeddings):
            assert self.kv is not None and self.vectors is None
            return self.kv
        if not self.geometry.foldable:
            what = "causal" if not self.geometry.causal else "made of attention alone"
            raise UnsupportedError(
                f"{type(self.base).__name__} is not {what}, so an embedding prompt cannot be folded into keys and "
                "values; train prefix_tuning instead."
            )
        if self.placement is not Placement.FRONT:
            raise UnsupportedError(
                f"this prompt stands inside the rows (placement={self.placement.value!r}), so it cannot be folded into "
                "keys and values in front of them."
            )
        return fold(self.door, self.prompt)

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, inputs: dict[str, Any]) -> Any:
        """The model's output over real tokens, on keyword inputs that were given."""
        inputs = apart(inputs)
        direct = self.folds and self.geometry.causal and not labels_tokens(inputs)
        if "logits_to_keep" in inputs and not direct:  # columns of the rows as they were given, and all for the loss
            rest = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
            return with_kept_logits(self.forward(rest), inputs["logits_to_keep"])
        if isinstance(self.prompt, Embeddings) and self.prompt.context is not None:
            return forward_with_context(self, self.prompt, inputs)
        return with_span_loss(self._forward(inputs), inputs, self.slots)

    def _forward(self, inputs: dict[str, Any]) -> Any:
        if self.geometry.encoder_decoder:
            return self._forward_encoder_decoder(inputs)
        if self.folds and self.geometry.causal:
            return self._forward_folded(inputs)
        if beyond_text(inputs):
            raise self._no_media()
        if self.geometry.causal and self.slots is None and packed(inputs):
            raise ConfigError(
                f"this prompt stands inside the rows of {type(self.base).__name__}, so only the first of several "
                "sequences in a row (position_ids that start again) would see it; give each a row of its own."
            )
        if not self.geometry.causal or labels_tokens(inputs):
            return self._forward_rows(inputs)
        return self._forward_open_rows(inputs)

    def _forward_folded(self, inputs: dict[str, Any]) -> Any:
        """The rows stay as they were given: all of the prompt reaches them as keys and values."""
        words = self.base.get_output_embeddings() is not None
        if not words or not labels_tokens(inputs):
            return self.door.call(self.as_kv(), inputs)
        folded = self.predicting()
        divides = self.geometry.divides_loss and folded.logits is not None
        rest, first = without_first(inputs, folded, divides)
        output = self.door.call(folded.kv, rest)
        if folded.logits is None:  # nothing predicts the first token, and neither does what stands before it
            return output
        logits = first.of(spread(folded.logits, folded.kv.rows, len(inputs["labels"])))
        return with_first_loss(output, self.base, logits, first.labels, rest, divides)

    def predicting(self) -> Folded:
        """The whole prompt as keys and values, with what it predicts for the first token of a row, if anything."""
        folded = fold_and_predict(self.door, self.prompt) if isinstance(self.prompt, Embeddings) else self.prompt
        return folded if isinstance(folded, Folded) else Folded(self.as_kv())

    def _no_media(self) -> UnsupportedError:
        return UnsupportedError(
            f"this prompt stands inside the rows of {type(self.base).__name__}, which cannot have images or other "
            "media there; use a model of attention alone with placement='front', or prefix_tuning."
        )

    def _forward_rows(self, inputs: dict[str, Any]) -> Any:
        """Where a row's own columns matter: on encoders (heads read column 0), and with a label for every token."""
        if self.geometry.causal:
            inputs = without_cache(inputs if packed(inputs) else with_mask(inputs))
        inputs, placement = self.placed(inputs, self.vectors, "right")
        return placement.restore(self.door.call(self.kv, inputs))

    def placed(self, inputs: dict[str, Any], vectors: Embeddings | None, padding: str) -> tuple[dict[str, Any], Any]:
        """The inputs with vectors in their rows, or at their slots, and where the tokens are then."""
        geometry, embedded, lengths = self.geometry, None, None
        if vectors is not None:
            embedded = embed(inputs, self.base.get_input_embeddings())
            if self.slots is not None:
                inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
                inputs["inputs_embeds"] = fill_slots(embedded, vectors, self.slots)
                vectors = embedded = None
            else:
                lengths = own_lengths(vectors, len(embedded), embedded.device)
        return place(
            inputs,
            None if vectors is None or embedded is None else vectors.per_row(embedded.shape[0]),
            embedded,
            lengths=lengths,
            after_first=self.placement is Placement.AFTER_BOS,
            padding=padding,
            causal=geometry.causal,
            position_offset=geometry.position_offset,
        )

    def _forward_open_rows(self, inputs: dict[str, Any]) -> Any:
        """Rows of a causal model that may go on: padding first, then the prompt and the row, as a cache needs them."""
        prompt = self.vectors
        assert prompt is not None
        if cached(inputs):
            return self.door.call(self.kv, self._behind(inputs, prompt))
        if not packed(inputs):  # (several sequences with slots of their own are told apart by having no mask)
            inputs = with_mask(with_pooling_mask(inputs, self.base, self.slots), always=True)
        inputs, placement = self.placed(inputs, prompt, "left")
        return placement.restore(self.door.call(self.kv, inputs))

    def _behind(self, inputs: dict[str, Any], prompt: Embeddings) -> dict[str, Any]:
        """Inputs of a later step, whose cache has already seen the prompt between the padding and the row.

        ConfigError without a mask where prompts differ in length, and so in the padding before them.
        """
        mask = inputs.get("attention_mask")
        if self.slots is None and prompt.lengths is not None and mask is None and self.geometry.layers:
            raise ConfigError(
                "a later step of rows whose prompts differ in length needs to know what was padding; pass the "
                "attention_mask of all real tokens so far."
            )
        if self.slots is not None or not isinstance(mask, Tensor):
            return inputs
        seen = mask.new_ones(mask.shape[0], prompt.length)
        lengths = own_lengths(prompt, len(mask), mask.device)
        seen = seen if lengths is None else seen.masked_fill(padded(lengths, prompt.length), 0)
        widened = torch.cat([seen, mask], dim=1)
        return {**inputs, "attention_mask": widened.sort(dim=1, stable=True).values}

    def _forward_encoder_decoder(self, inputs: dict[str, Any]) -> Any:
        kv, vectors, slots, placement = self.kv, self.vectors, self.slots, None
        if kv is not None and kv.layers:
            check_written(inputs)
        if decodes_row(inputs):  # the decoder has no mask for it, so padding must stand behind
            inputs, placement = place(inputs, None, None, causal=False)
            if slots is not None and placement.columns is not None:
                slots = take(slots, placement.columns.argsort(dim=1).to(slots.device), 1)
        with self.door.open(kv), self._open_encoder(vectors, slots):
            output = cut(self.base(**inputs), vectors.length if vectors is not None and slots is None else 0)
        return output if placement is None else placement.restore(output)

    def _open_encoder(self, vectors: Embeddings | None, slots: Tensor | None) -> AbstractContextManager[None]:
        after_first = self.placement is Placement.AFTER_BOS
        return open_encoder(self.base, vectors, slots, after_first, self.door.learned_positions)

    # ---- generate ------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's `generate`."""
        generate: Any = self.base.generate
        if self.geometry.encoder_decoder:
            kv, vectors = self.kv, self.vectors
            check_decoding(self.base, vectors, kwargs)
            if kv is not None and kv.layers:
                check_written(kwargs)
            with self.door.open(kv), self._open_encoder(vectors, self.slots):
                output = generate(*args, **kwargs)
            return cut(output, vectors.length if vectors is not None and self.slots is None else 0)
        if self.folds:
            kv = self.as_kv().map(Tensor.contiguous)  # some families' keys are parts of a larger tensor
            with self.door.open(kv, generating=kwargs.get("position_ids") is None):
                return generate(*args, **kwargs)
        return self._generate_rows(generate, args, kwargs)

    def _generate_rows(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A prompt inside the rows: generation starts from embeddings, and sees the ids of real tokens only.

        What it returns starts with the ids the caller gave.
        """
        if not self.geometry.causal:
            raise UnsupportedError(f"{type(self.base).__name__} is an encoder, which cannot generate.")
        if beyond_text(kwargs):
            raise self._no_media()
        inputs = dict(kwargs)
        inputs["input_ids"] = given = _given_ids(args, inputs)
        if given is None and inputs.get("inputs_embeds") is None:
            raise ConfigError("generate needs input_ids or inputs_embeds; give the rows to go on from.")
        if cached({"past_key_values": inputs.get("past_key_values") or inputs.get("cache_params")}):
            raise ConfigError("this prompt stands inside the rows, so generate cannot start from a cache; pass none.")
        _refuse_drafts(self.base, args, kwargs)
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = _mask_of(self.base, inputs, kwargs)
            inputs["attention_mask"] = mask = mask if self.slots is None else mask | (self.slots >= 0).to(mask)
        names = ("input_ids", "inputs_embeds", "attention_mask")
        rows = {name: inputs[name] for name in names if inputs.get(name) is not None}
        if "inputs_embeds" in rows:
            rows.pop("input_ids", None)
        placed, _ = self.placed(rows, self.vectors, "left")
        ids = None if given is None else _real_ids(given, mask, self.slots)
        options = {name: value for name, value in inputs.items() if name not in (*rows, "inputs", "input_ids")}
        with self.door.open(self.kv, generating=kwargs.get("position_ids") is None):
            output = generate(None, *args[1:], **options, **placed, input_ids=ids)
        return output if given is None else _starting_with(output, given, ids)


def can_fold(geometry: Geometry, placement: Placement) -> bool:
    """Whether a model can take vectors that stand there as keys and values."""
    return geometry.foldable and placement is Placement.FRONT


def _refuse_drafts(base: PreTrainedModel, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """transformers takes the number of ids for the length of the cache there, which vectors in the rows are not in."""
    config = options.get("generation_config") or (args[1] if len(args) > 1 else None) or base.generation_config
    names = ("prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")
    found = {name: options.get(name, getattr(config, name, None)) for name in names}
    found["assistant_model"] = options.get("assistant_model", args[5] if len(args) > 5 else None)
    for name, value in found.items():
        if value is not None:
            raise ConfigError(
                f"this prompt stands inside the rows, so generate cannot use {name}; leave it out, the tokens are the "
                "same without it."
            )


def _given_ids(args: tuple[Any, ...], inputs: dict[str, Any]) -> Tensor | None:
    for value in (*args[:1], inputs.get("inputs"), inputs.get("input_ids")):
        if value is not None:
            return value
    return None


def _mask_of(base: PreTrainedModel, inputs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """As `generate` would make it: 0 at padding where the ids hold any, all ones otherwise."""
    ids = inputs.get("input_ids")
    if ids is None:
        return torch.ones(inputs["inputs_embeds"].shape[:2], dtype=torch.long, device=inputs["inputs_embeds"].device)
    pad = options.get("pad_token_id", base.generation_config.pad_token_id if base.generation_config else None)
    end = options.get("eos_token_id", base.generation_config.eos_token_id if base.generation_config else None)
    ends = end if isinstance(end, list) else [end]
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


def _real_ids(ids: Tensor, mask: Tensor, slots: Tensor | None) -> Tensor:
    """The ids logits processors see: without slots, which stand for no word, and with padding in front."""
    if slots is None:
        return ids
    keep = (mask != 0) & (slots < 0).to(mask.device)
    width = max(1, int(keep.sum(1).max()))
    order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -width:]
    shown = ids.gather(1, order)
    first = ids.gather(1, keep.to(torch.int8).argmax(1, keepdim=True))
    return torch.where(keep.gather(1, order), shown, first)  # a row's own id, so that no processor counts another


def _starting_with(output: Any, given: Tensor, ids: Tensor | None) -> Any:
    assert ids is not None
    sequences = output if isinstance(output, Tensor) else output.sequences
    begin = given.repeat_interleave(sequences.shape[0] // given.shape[0], dim=0).to(sequences.device)
    sequences = torch.cat([begin, sequences[:, ids.shape[1] :]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output
