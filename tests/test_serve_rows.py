"""Rows and prompts that come and go: what is left is what was put in, and nothing of those that have gone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt.prompt import KV
from softprompt.serve.prompt_pool import PromptPool
from softprompt.serve.row_cache import RowCache

LAYERS, HEADS, SIZE = 2, 2, 3


def read(lengths: list[int], bad: bool) -> tuple[DynamicCache, list[Tensor]]:
    """A cache of rows padded on the left, with NaN at the padding, and each row's own `[L, 2, h, n, k]`."""
    width, cache = max(lengths), DynamicCache()
    whole = torch.randn(LAYERS, 2, len(lengths), HEADS, width, SIZE)
    for row, length in enumerate(lengths):
        whole[:, :, row, :, : width - length] = torch.nan
    if bad:
        whole[:] = torch.nan
    for layer in range(LAYERS):
        cache.update(whole[layer, 0], whole[layer, 1], layer)
    return cache, [whole[:, :, row, :, width - length :] for row, length in enumerate(lengths)]


@pytest.mark.slow
def test_rows_join_and_leave() -> None:
    draw, cache = random.Random(3), RowCache()
    rows: list[tuple[Tensor, bool]] = []
    widened = 0
    for _ in range(300):
        if not rows or draw.random() < 0.3:
            lengths = [draw.choice((1, 2, 5, 9, 40)) for _ in range(draw.randint(1, 3))]
            bad, before = draw.random() < 0.3, cache.width
            new, own = read(lengths, bad)
            cache.join(new, lengths)
            widened += bool(rows) and cache.width > before
            rows += [(each, bad) for each in own]
        while rows and draw.random() < 0.4:
            gone = draw.randrange(len(rows))
            cache.leave(gone)
            rows[gone] = rows[-1]
            rows.pop()
        if not rows:
            assert not cache.layers and not cache.tokens
            continue
        told, mask = cache.step()
        token = torch.randn(LAYERS, 2, len(rows), HEADS, 1, SIZE)
        for layer in range(LAYERS):
            assert told.get_mask_sizes(1, layer) == (cache.width + 1, 0)
            found = told.update(token[layer, 0], token[layer, 1], layer)
            for side, values in enumerate(found):
                assert mask.shape == (len(rows), values.shape[2])
                for row, (own, bad) in enumerate(rows):
                    expected = torch.cat([own[layer, side], token[layer, side, row]], dim=1)
                    torch.testing.assert_close(
                        values[row][:, mask[row].bool()], expected, equal_nan=bad, atol=0, rtol=0
                    )
                    assert not values[row][:, ~mask[row].bool()].any()  # zeros, and no NaN
        cache.stepped()
        rows = [(torch.cat([own, token[:, :, row]], dim=3), bad) for row, (own, bad) in enumerate(rows)]
        assert cache.lengths == [own.shape[3] for own, _ in rows]
    assert widened > 5


def test_prompts_come_and_go() -> None:
    draw, pool = random.Random(4), PromptPool()
    known: dict[str, KV] = {}
    users: list[str | None] = []
    for number in range(300):
        if draw.random() < 0.5:
            key: str | None = draw.choice([None, f"{draw.randrange(12)}"])
            if key is not None and key not in known:
                length = draw.choice((1, 3, 4, 30))
                parts = torch.randn(LAYERS, 2, 1, HEADS, length, SIZE)
                parts = parts * torch.nan if number % 7 == 0 else parts
                known[key] = KV(tuple((part[0], part[1]) for part in parts))
            if key is not None:
                pool.take(key, known[key])
            users.append(key)
        elif users:
            gone = users.pop(draw.randrange(len(users)))
            if gone is not None:
                pool.give_back(gone)
        there = {each for each in users if each is not None}
        assert len(pool) == len(there)
        assert pool.tokens == len(there) * max((known[each].length for each in there), default=0)
        found = pool.of(users)
        if found is None:
            assert not there
            continue
        assert found.rows is not None and found.lengths is not None
        assert all(len(part) == len(found.lengths) for pair in found.layers for part in pair)
        for row, key in zip(found.rows.tolist(), users, strict=True):
            length = 0 if key is None else known[key].length
            assert found.lengths[row] == length
            for layer in range(LAYERS):
                for side in range(2):
                    whole = found.layers[layer][side][row]
                    assert not whole[:, : found.length - length].any()
                    if key is not None:
                        own = known[key].layers[layer][side][0]
                        assert torch.equal(whole[:, found.length - length :].nan_to_num(7), own.nan_to_num(7))
