"""Which token comes next, row by row: penalties, temperature, top-k, top-p, and log-probabilities.

A row's choice depends on its own scores and its own random numbers alone, whatever rows are beside it: one number in
[0, 1) per token, from the row's seed, looked up in the running sum of the probabilities.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, nextafter
from random import Random

import torch
from torch import Tensor

from softprompt.errors import ConfigError
from softprompt.serve.engine import Sampling

GREEDY = 1e-5  # temperatures below this are 0, as in vLLM


@dataclass
class Sampler:
    """How one row chooses. `ends` are the tokens that end an answer; `counts` what it has generated, if that counts."""

    sampling: Sampling
    ends: tuple[int, ...]
    random: Random = field(init=False)
    counts: Counter[int] = field(default_factory=Counter)
    chosen: int = 0

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.random = Random(None if seed is None else seed % (1 << 64))  # which takes −1 for 1

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < GREEDY

    @property
    def filters(self) -> bool:
        return self.sampling.top_p < 1 or self.sampling.top_k > 0

    def note(self, token: int) -> None:
        """It was chosen."""
        self.chosen += 1
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self.counts[token] += 1


@dataclass(frozen=True)
class Choice:
    """A token; with its log-probability and the `top` likeliest ones, as (token, log-probability), where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """ConfigError for numbers that mean nothing."""
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
        if not isfinite(getattr(sampling, name)):
            raise ConfigError(f"{name}={getattr(sampling, name)!r} must be a finite number.")
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ConfigError(
            f"temperature={sampling.temperature!r} and top_k={sampling.top_k!r} must be at least 0, and "
            f"top_p={sampling.top_p!r} more than 0 and at most 1."
        )
    if sampling.max_tokens < 1 or sampling.min_tokens < 0 or sampling.min_tokens > sampling.max_tokens:
        raise ConfigError(
            f"max_tokens={sampling.max_tokens!r} must be at least 1, and min_tokens={sampling.min_tokens!r} between 0 "
            "and that."
        )
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= vocabulary:
        raise ConfigError(f"logprobs={sampling.logprobs!r} must be between 0 and {vocabulary}, the number of tokens.")


def choose(scores: Tensor, samplers: Sequence[Sampler]) -> list[Choice | None]:
    """The next token of each row, given its scores `[B, V]`; None for a row whose best score is no finite number.

    Log-probabilities are the model's own, before penalties and temperature.
    """
    scores = scores.float()
    wrong = (~scores.amax(dim=1).isfinite()).tolist()
    adjusted = _adjusted(scores, samplers)
    tokens = adjusted.argmax(dim=1).tolist()
    for filters in (False, True):  # rows are taken together only with rows that are treated alike
        rows = [
            row
            for row, each in enumerate(samplers)
            if not wrong[row] and not each.greedy and each.filters is filters
        ]  # fmt: skip
        if rows:
            drawn = _drawn(adjusted[rows], [samplers[row] for row in rows], filters)
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    choices: list[Choice | None] = [None if bad else Choice(token) for bad, token in zip(wrong, tokens, strict=True)]
    for row, sampler in enumerate(samplers):
        if not wrong[row]:
            if sampler.sampling.logprobs is not None:
                choices[row] = _with_logprobs(tokens[row], scores[row], sampler.sampling.logprobs)
            sampler.note(tokens[row])
    return choices


def _adjusted(scores: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Scores with penalties, and without the tokens that would end an answer too early."""
    before = scores
    for row, sampler in enumerate(samplers):
        early = sampler.chosen < sampler.sampling.min_tokens and sampler.ends
        if not early and not sampler.counts:
            continue
        if scores is before:
            scores = scores.clone()
        if sampler.counts:
            ids = torch.tensor(list(sampler.counts), device=scores.device)
            times = torch.tensor(list(sampler.counts.values()), device=scores.device, dtype=scores.dtype)
            penalty = sampler.sampling.frequency_penalty * times + sampler.sampling.presence_penalty
            scores[row, ids] -= penalty
        if early:
            scores[row, list(sampler.ends)] = -torch.inf
    return scores


def _drawn(scores: Tensor, samplers: Sequence[Sampler], filters: bool) -> list[int]:
    """Tokens drawn from scores `[S, V]`, in float64: adding up a vocabulary in less loses its rare words."""
    temperatures = torch.tensor([each.sampling.temperature for each in samplers], device=scores.device)
    scores = scores.double()
    scores = (scores - scores.amax(dim=1, keepdim=True)) / temperatures.double()[:, None]
    order: Tensor | None = None
    if filters:
        scores, order = scores.sort(dim=1, descending=True, stable=True)
    chances = scores.softmax(dim=1)
    if filters:
        chances = chances * _kept(chances, samplers)
    sums = chances.cumsum(dim=1)
    totals = sums[:, -1].tolist()
    numbers = [
        min(each.random.random() * total, nextafter(total, 0)) for each, total in zip(samplers, totals, strict=True)
    ]
    wanted = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None]
    places = torch.searchsorted(sums, wanted, right=True)
    return (places if order is None else order.gather(1, places))[:, 0].tolist()


def _kept(chances: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Which of the tokens `[S, V]`, the likeliest first, are in the top k and, of those, in the top p."""
    size = chances.shape[1]
    most = torch.tensor([each.sampling.top_k or size for each in samplers], device=chances.device)[:, None]
    share = torch.tensor([each.sampling.top_p for each in samplers], device=chances.device, dtype=torch.float64)
    kept = torch.arange(size, device=chances.device)[None] < most
    left = chances * kept
    before = left.cumsum(dim=1) - left
    kept &= before < share[:, None] * left.sum(dim=1, keepdim=True)
    kept[:, 0] = True  # also of a share so small that it rounds to nothing
    return kept


def _with_logprobs(token: int, scores: Tensor, count: int) -> Choice:
    """With the natural log-probabilities of one row, scores `[V]`."""
    logprobs = scores.log_softmax(dim=0)
    values, ids = logprobs.topk(count)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), top)
