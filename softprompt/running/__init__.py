"""How a prompt reaches a call of the model: which way, by the kind of prompt and of model, never by the method.

- keys and values, and front embeddings folded into them: in front of what attention sees (`injection.contract`);
- embeddings that cannot be folded (encoders, models with a state, slots inside the row): in the rows
  (`injection.input_vectors`);
- embeddings on encoder-decoders: in the encoder's rows (`injection.encoder_decoder`).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.call import Call, check_rows, check_written
from softprompt.config import Placement
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.facts import Facts, plain_ids
from softprompt.fold import Folded, fold, fold_and_predict
from softprompt.injection.contract import Way
from softprompt.injection.encoder_decoder import check_decoding, cut, open_encoder
from softprompt.injection.input_vectors import embed, fill_slots, place, take
from softprompt.injection.lengths import own_lengths, padded
from softprompt.injection.stand_in import standing_in
from softprompt.join import Mixed
from softprompt.prompt import KV, Embeddings, spread
from softprompt.running.context_loss import forward_with_context
from softprompt.running.first_loss import with_first_loss, without_first
from softprompt.running.span_loss import with_kept_logits, with_span_loss

Prompt = Embeddings | KV | Folded | Mixed


@dataclass(frozen=True)
class Run:
    """One call of a base model with a prompt. `slots` `[B, T]` says where in the rows virtual tokens stand."""

    way: Way
    facts: Facts
    prompt: Prompt
    placement: Placement = Placement.FRONT
    slots: Tensor | None = None

    @property
    def base(self) -> PreTrainedModel:
        return self.way.base

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
        return self.vectors is None or self.facts.can_fold(self.placement)

    def as_kv(self) -> KV:
        if not isinstance(self.prompt, Embeddings):
            assert self.kv is not None and self.vectors is None
            return self.kv
        if not self.facts.foldable:
            what = "causal" if not self.facts.causal else "made of attention alone"
            raise UnsupportedError(
                f"{type(self.base).__name__} is not {what}, so an embedding prompt cannot be folded into keys and "
                f"values; {'use it as it is' if self.facts.no_prefix else 'train prefix_tuning instead'}."
            )
        if self.placement is not Placement.FRONT:
            raise UnsupportedError(
                f"this prompt stands inside the rows (placement={self.placement.value!r}), so it cannot be folded into "
                "keys and values in front of them."
            )
        return fold(self.way, self.prompt)

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, call: Call) -> Any:
        """The model's output over real tokens."""
        check_rows(call, self.base)
        call = call.apart()
        direct = self.folds and self.facts.causal and not call.labels_tokens
        if "logits_to_keep" in call.rest and not direct:  # columns of the rows as they were given, and all for the loss
            return with_kept_logits(self.forward(call.less("logits_to_keep")), call.rest["logits_to_keep"])
        if isinstance(self.prompt, Embeddings) and self.prompt.context is not None:
            return forward_with_context(self, self.prompt, call)
        return with_span_loss(self._forward(call), call, self.slots)

    def _forward(self, call: Call) -> Any:
        if self.facts.encoder_decoder:
            return self._forward_encoder_decoder(call)
        if self.folds and self.facts.causal:
            return self._forward_folded(call)
        if call.beyond_text:
            raise self._no_media()
        if self.facts.causal and self.slots is None and call.packed:
            raise ConfigError(
                f"this prompt stands inside the rows of {type(self.base).__name__}, so only the first of several "
                "sequences in a row (position_ids that start again) would see it; give each a row of its own."
            )
        if not self.facts.causal or call.labels_tokens:
            return self._forward_rows(call)
        return self._forward_open_rows(call)

    def _forward_folded(self, call: Call) -> Any:
        """The rows stay as they were given: all of the prompt reaches them as keys and values."""
        words = self.base.get_output_embeddings() is not None
        if not words or not call.labels_tokens:
            return self.way.call(self.as_kv(), call)
        folded = self.predicting()
        divides = folded.logits is not None and self.facts.divides_loss
        rest, first = without_first(call, folded, divides)
        output = self.way.call(folded.kv, rest)
        if folded.logits is None:  # nothing predicts the first token, and neither does what stands before it
            return output
        logits = first.of(spread(folded.logits, folded.kv.rows, len(call.labels)))
        return with_first_loss(output, self.base, logits, first.labels, rest, divides)

    def predicting(self) -> Folded:
        """The whole prompt as keys and values, with what it predicts for the first token of a row, if anything."""
        folded = fold_and_predict(self.way, self.prompt) if isinstance(self.prompt, Embeddings) else self.prompt
        return folded if isinstance(folded, Folded) else Folded(self.as_kv())

    def _no_media(self) -> UnsupportedError:
        """Why images and the like cannot come along, with a remedy that is not what is used already."""
        kind = type(self.base).__name__
        if self.vectors is None:
            return UnsupportedError(
                f"{kind} is not causal, so rows behind a prefix are rearranged, which images or other media in them "
                "cannot follow; use a causal model."
            )
        remedies = ["placement='front'"] if self.facts.foldable else []
        remedies += [] if self.facts.no_prefix or not self.facts.causal else ["prefix_tuning"]
        return UnsupportedError(
            f"this prompt stands inside the rows of {kind}, which cannot have images or other media there; use "
            f"{' or '.join(remedies) or 'a causal model of attention alone'}."
        )

    def _forward_rows(self, call: Call) -> Any:
        """Where a row's own columns matter: on encoders (heads read the first or last), and with a label for every
        token."""
        if self.facts.causal:
            call = (call if call.packed else call.with_mask()).without_cache()
        call, placement = self.placed(call, self.vectors, self.facts.padding)
        return placement.restore(self.way.call(self.kv, call))

    def placed(self, call: Call, vectors: Embeddings | None, padding: str) -> tuple[Call, Any]:
        """The call with vectors in its rows, or at their slots, and where the tokens are then."""
        embedded, lengths = None, None
        if vectors is not None:
            embedded = embed(call, self.base.get_input_embeddings())
            if self.slots is not None:
                call = call.but(ids=None, vectors=fill_slots(embedded, vectors, self.slots))
                vectors = embedded = None
            else:
                lengths = own_lengths(vectors, embedded.shape[0], embedded.device)
        return place(
            call,
            None if vectors is None or embedded is None else vectors.per_row(embedded.shape[0]),
            embedded,
            lengths=lengths,
            after_first=self.placement is Placement.AFTER_BOS,
            padding=padding,
            causal=self.facts.causal,
            position_offset=self.facts.position_offset,
        )

    def _forward_open_rows(self, call: Call) -> Any:
        """Rows of a causal model that may go on: padding first, then the prompt and the row, as a cache needs them."""
        prompt = self.vectors
        assert prompt is not None
        if call.continues:
            return self.way.call(self.kv, self._behind(call, prompt))
        if not call.packed:  # (several sequences with slots of their own are told apart by having no mask)
            call = _with_pooling_mask(call, self.base, self.slots).with_mask(always=True)
        call, placement = self.placed(call, prompt, "left")
        return placement.restore(self.way.call(self.kv, call))

    def _behind(self, call: Call, prompt: Embeddings) -> Call:
        """A later step, whose cache has already seen the prompt between the padding and the row.

        ConfigError without a mask where prompts differ in length, and so in the padding before them.
        """
        mask = call.mask
        if isinstance(mask, Tensor) and not self.facts.layers:  # a state knows what was padding, and is told no more
            return call.but(mask=mask[:, -call.rows.shape[1] :])
        if self.slots is None and prompt.lengths is not None and mask is None and self.facts.layers:
            raise ConfigError(
                "a later step of rows whose prompts differ in length needs to know what was padding; pass the "
                "attention_mask of all real tokens so far."
            )
        if self.slots is not None or not isinstance(mask, Tensor):
            return call
        seen = mask.new_ones(mask.shape[0], prompt.length)
        lengths = own_lengths(prompt, len(mask), mask.device)
        seen = seen if lengths is None else seen.masked_fill(padded(lengths, prompt.length), 0)
        widened = torch.cat([seen, mask], dim=1)
        return call.but(mask=widened.sort(dim=1, stable=True).values)

    def _forward_encoder_decoder(self, call: Call) -> Any:
        kv, vectors, slots, placement = self.kv, self.vectors, self.slots, None
        if kv is not None and kv.layers:
            check_written(call.rest.get("decoder_attention_mask"))
        if call.decodes_row:  # the decoder has no mask for it, so padding must stand behind
            call, placement = place(call, None, None, causal=False)
            if slots is not None and placement.columns is not None:
                slots = take(slots, placement.columns.argsort(dim=1).to(slots.device), 1)
        with self._open_encoder(vectors, slots), self.way.open(kv):
            output = self.base(**call.keywords(self.base))
        output = cut(output, vectors.length if vectors is not None and slots is None else 0)
        return output if placement is None else placement.restore(output)

    def _open_encoder(self, vectors: Embeddings | None, slots: Tensor | None) -> AbstractContextManager[None]:
        after_first = self.placement is Placement.AFTER_BOS
        return open_encoder(self.base, vectors, slots, after_first, self.way.learned_positions)

    # ---- generate ------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's `generate`."""
        generate: Any = self.base.generate
        cache = api.pop_cache(kwargs)
        if cache is not None:
            kwargs[api.generate_cache_name(self.base)] = cache
        if self.facts.encoder_decoder:
            kv, vectors = self.kv, self.vectors
            check_decoding(self.base, vectors, kwargs)
            if kv is not None and kv.layers:
                check_written(kwargs.get("decoder_attention_mask"))
            with self._open_encoder(vectors, self.slots), self.way.open(kv):
                output = generate(*args, **kwargs)
            return cut(output, vectors.length if vectors is not None and self.slots is None else 0)
        if self.folds:
            kv = self.as_kv().map(Tensor.contiguous)  # some families' keys are parts of a larger tensor
            with self.way.open(kv, generating=kwargs.get("position_ids") is None):
                return generate(*args, **kwargs)
        if cache is not None and api.seen_tokens(cache) > 0:
            raise ConfigError("this prompt stands inside the rows, so generate cannot start from a cache; pass none.")
        return self._generate_rows(generate, args, kwargs)

    def _generate_rows(self, generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A prompt inside the rows: generation starts from embeddings, and sees the ids of real tokens only.

        What it returns starts with the ids the caller gave.
        """
        if not self.facts.causal:
            raise UnsupportedError(f"{type(self.base).__name__} is an encoder, which cannot generate.")
        inputs = dict(kwargs)
        given = _given_ids(args, inputs)
        names = ("input_ids", "inputs_embeds", "attention_mask")
        call = Call.of({name: inputs.get(name) for name in names}).but(ids=given)
        if Call.of(kwargs).beyond_text:
            raise self._no_media()
        if not call.given:
            raise ConfigError("generate needs input_ids or inputs_embeds; give the rows to go on from.")
        _refuse_drafts(self.base, args, kwargs)
        mask = call.mask
        if mask is None:
            mask = _mask_of(self.base, call, kwargs)
            mask = mask if self.slots is None else mask | (self.slots >= 0).to(mask)
        placed, _ = self.placed(call.but(ids=given if call.vectors is None else None, mask=mask), self.vectors, "left")
        ids = None if given is None else _real_ids(given, mask, self.slots)
        options = {name: value for name, value in inputs.items() if name not in (*names, "inputs")}
        assert placed.vectors is not None
        if ids is not None and ids.shape[1] != placed.vectors.shape[1]:
            options |= _lengths_beside(placed.vectors.shape[1], args, options)
        told, token = 0 if ids is None else ids.shape[1], int(plain_ids(self.base, 1))
        with (
            standing_in(self.base, placed.vectors, told, token),
            self.way.open(self.kv, generating=kwargs.get("position_ids") is None),
        ):
            output = generate(
                None,
                *args[1:],
                **options,
                inputs_embeds=placed.vectors,
                attention_mask=placed.mask,
                input_ids=ids,
            )
        return output if given is None else _starting_with(output, given, ids)


def _lengths_beside(width: int, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The lengths that a caller gave, for transformers to take the `width` of vectors that stand beside ids off."""
    config = options.get("generation_config") or (args[1] if len(args) > 1 else None)
    found: dict[str, Any] = {}
    for name in ("max", "min"):
        new, whole = (
            options.get(each, getattr(config, each, None)) for each in (f"{name}_new_tokens", f"{name}_length")
        )
        if new is None and whole:
            found[f"{name}_length"] = whole + width
    return found


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


def _with_pooling_mask(call: Call, base: PreTrainedModel, slots: Tensor | None) -> Call:
    """The call of a sequence classifier with a mask over the padding behind its rows, if none is given.

    A decoder's classifier looks for a row's last token by the padding id; where vectors take the ids' place it cannot.
    """
    ids, padding = call.ids, api.padding_id(base)
    if ids is None or padding is None or call.mask is not None or not api.classifies_rows(base):
        return call
    empty = ids == padding if slots is None else (ids == padding) & (slots < 0).to(ids.device)
    return call.but(mask=1 - empty.long().flip(1).cumprod(1).flip(1))


def _mask_of(base: PreTrainedModel, call: Call, options: dict[str, Any]) -> Tensor:
    """As `generate` would make it: 0 at padding where the ids hold any, all ones otherwise."""
    ids = call.ids
    if ids is None:
        return torch.ones(call.rows.shape[:2], dtype=torch.long, device=call.rows.device)
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
