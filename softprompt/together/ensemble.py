"""Prompt ensembling: The Power of Scale for Parameter-Efficient Prompt Tuning, https://arxiv.org/abs/2104.08691

N prompts for one task on one frozen model are N models that share all their weights. They are asked in one batch: row b
goes in N times, once behind each prompt, and the answers are put together by vote or by the mean of probabilities.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import ModuleDict
from torch.nn.functional import one_hot
from transformers import LogitsProcessor, LogitsProcessorList

from softprompt.batch import run_with
from softprompt.config import EmbeddingConfig
from softprompt.call import Call
from softprompt.errors import ConfigError
from softprompt.model import SoftPromptModel
from softprompt.prompt import KV, Embeddings, SoftPrompt, evaluating

PER_ROW = ("input_ids", "inputs", "attention_mask", "inputs_embeds", "position_ids", "token_type_ids",
           "decoder_input_ids", "decoder_attention_mask")  # fmt: skip


@final
class PromptEnsemble:
    """Several adapters of one model, asked together.

    With prompts of one kind and length, and no task heads of their own, a question is one forward pass of N·B rows;
    otherwise it is N passes. `adapter_names` are all of the model's by default.
    """

    def __init__(self, model: SoftPromptModel, adapter_names: Sequence[str] | None = None) -> None:
        self.model = model
        self.names = list(adapter_names) if adapter_names is not None else list(model.peft_config)
        if not self.names:
            raise ConfigError("adapter_names is empty; name the prompts to ask.")
        self.encoders: list[SoftPrompt] = [model.encoder(name) for name in self.names]

    @torch.no_grad()
    def logits(self, **inputs: Any) -> Tensor:
        """Each prompt's logits, `[N, B, T, V]`, or `[N, B, C]` of a classifier; inputs as for the model's `forward`."""
        if inputs.get("labels") is not None:
            raise ConfigError("an ensemble has no loss; leave labels out.")
        with self._evaluating():
            stacked = self._stacked()
            if stacked is None:
                return torch.stack([self._alone(name, inputs) for name in self.names])
            rows = _rows(inputs)
            slots, inputs = inputs.get("slots"), {name: each for name, each in inputs.items() if name != "slots"}
            run = run_with(self.model, self.encoders[0].config, self._for_rows(stacked, rows), self._again(slots))
            widened = {name: self._widened(name, each) for name, each in inputs.items()}
            output = run.forward(Call.of(widened).plus(return_dict=True))
        return output.logits.unflatten(0, (len(self.names), rows))

    def probabilities(self, label_ids: Sequence[int] | None = None, **inputs: Any) -> Tensor:
        """The mean over prompts of the probabilities of classes, `[B, C]` (`[B, T, C]` where tokens have classes).

        `label_ids` `[C]` makes a language model a classifier: the classes are these tokens as each row's next one.
        """
        return mean_probabilities(self._scores(label_ids, inputs))

    def vote(self, label_ids: Sequence[int] | None = None, **inputs: Any) -> Tensor:
        """The class that most prompts choose, `[B]` (or `[B, T]`); where two are level, the likelier on the mean."""
        return most_votes(self._scores(label_ids, inputs))

    @torch.no_grad()
    def generate(self, **inputs: Any) -> Tensor:
        """Greedy or beam search on the mean of the prompts' log-probabilities of the next token, `[B, T + new]`.

        All copies of a row go on with the same token. Raises ConfigError for prompts of several lengths or kinds, and
        for sampling, where copies would part.
        """
        stacked = self._stacked()
        if stacked is None:
            raise ConfigError(
                "these prompts cannot stand in one batch, because they differ in kind, length or placement, or have "
                "task heads; an ensemble generates with prompts of one kind and length only."
            )
        self._check_search(inputs)
        rows, count = _rows(inputs), len(self.names)
        processors = LogitsProcessorList([*(inputs.pop("logits_processor", None) or []), MeanOfCopies(count)])
        slots = self._again(inputs.pop("slots", None))
        inputs = {name: self._widened(name, each) for name, each in inputs.items()}
        with self._evaluating():
            run = run_with(self.model, self.encoders[0].config, self._for_rows(stacked, rows), slots)
            output = run.generate(**inputs, logits_processor=processors)
        return output[:rows]

    def _check_search(self, options: dict[str, Any]) -> None:
        config = options.get("generation_config") or self.model.get_base_model().generation_config
        for name, plain in (("do_sample", False), ("num_return_sequences", 1), ("return_dict_in_generate", False)):
            value = options.get(name, getattr(config, name, plain))
            if value not in (None, plain):
                raise ConfigError(
                    f"{name}={value!r} is not for an ensemble, whose copies of a row go together; unset it."
                )
        for name in ("assistant_model", "past_key_values", "streamer"):
            if options.get(name) is not None:
                raise ConfigError(f"an ensemble takes no {name}; leave it out.")

    def _scores(self, label_ids: Sequence[int] | None, inputs: dict[str, Any]) -> Tensor:
        """Logits of the classes in float32, `[N, B, C]`."""
        logits = self.logits(**inputs).float()
        if label_ids is None:
            return logits
        mask = inputs.get("attention_mask")
        last = logits.shape[2] - 1
        if mask is not None:  # each row's last real token, wherever its padding is
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        chosen = torch.as_tensor(last, device=logits.device).expand(logits.shape[1])
        at_last = logits[:, torch.arange(logits.shape[1], device=logits.device), chosen]
        return at_last[..., torch.as_tensor(list(label_ids), device=logits.device)]

    def _stacked(self) -> Embeddings | KV | None:
        """All prompts as one of N, if they can be; a prompt of several tasks cannot."""
        prompts = [encoder.prompt() for encoder in self.encoders]
        if any(isinstance(heads := self.model.heads.copies[name], ModuleDict) and len(heads) for name in self.names):
            return None
        if len({_form(prompt, encoder) for prompt, encoder in zip(prompts, self.encoders, strict=True)}) > 1:
            return None
        first = prompts[0]
        if isinstance(first, Embeddings) and first.decoder is not None:
            return None
        if isinstance(first, Embeddings):
            return Embeddings(torch.cat([each.vectors for each in prompts if isinstance(each, Embeddings)]))
        parts = [each.pairs for each in prompts if isinstance(each, KV)]
        joined = iter(
            [torch.cat(tensors) for layer in zip(*parts, strict=True) for tensors in zip(*layer, strict=True)]
        )
        return first.map(lambda _: next(joined))

    def _for_rows(self, stacked: Embeddings | KV, rows: int) -> Embeddings | KV:
        first = stacked.vectors if isinstance(stacked, Embeddings) else stacked.pairs[0][0]
        return replace(stacked, rows=torch.arange(len(self.names), device=first.device).repeat_interleave(rows))

    def _alone(self, name: str, inputs: dict[str, Any]) -> Tensor:
        active = self.model.active_adapter
        self.model.set_adapter(name)
        try:
            return self.model(**{**inputs, "return_dict": True}).logits
        finally:
            self.model.set_adapter(active)

    def _widened(self, name: str, value: Any) -> Any:
        return self._again(value) if name in PER_ROW else value

    def _again(self, value: Any) -> Any:
        """Rows `[B, …]` once for each prompt, `[N·B, …]`."""
        return torch.cat([value] * len(self.names)) if isinstance(value, Tensor) else value

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        if not self.model._enabled:
            raise ConfigError("the model's adapters are disabled; ask the ensemble outside disable_adapter().")
        with evaluating(self.model):
            yield


def mean_probabilities(logits: Tensor) -> Tensor:
    """Of N prompts' logits `[N, …, C]`, the mean of their probabilities `[…, C]`."""
    return logits.softmax(-1).mean(0)


def most_votes(logits: Tensor) -> Tensor:
    """Of N prompts' logits `[N, …, C]`, the class `[…]` that most find the likeliest; the mean decides a draw."""
    votes = one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    return (votes + 0.5 * mean_probabilities(logits)).argmax(-1)


@final
class MeanOfCopies(LogitsProcessor):
    """Every copy of a row gets the mean of all copies' log-probabilities; rows are `[copies · B]`, copy by copy."""

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mean = scores.float().log_softmax(-1).unflatten(0, (self.copies, -1)).mean(0)
        return mean.repeat(self.copies, 1).to(scores.dtype)


def _form(prompt: Embeddings | KV, encoder: SoftPrompt) -> tuple[Any, ...]:
    """What prompts must have in common to be stacked."""
    if isinstance(prompt, Embeddings):
        placement = encoder.config.placement if isinstance(encoder.config, EmbeddingConfig) else None
        return (prompt.vectors.shape, placement, prompt.decoder is None)
    return (tuple(part.shape for pair in prompt.pairs for part in pair), prompt.always_visible, len(prompt.cross))


def _rows(inputs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "inputs"):
        if inputs.get(name) is not None:
            return inputs[name].shape[0]
    raise ConfigError("an ensemble needs input_ids or inputs_embeds; give the rows to ask about, by name.")
