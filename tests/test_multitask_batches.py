"""What a step of source training is made of: which tasks its batch holds, and the two parts of the teachers' loss."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from softprompt.train.multitask import divergence, relative_distance
from softprompt.train.multitask_data import TaskOrder


def test_batches_hold_a_random_number_of_tasks_drawn_by_size() -> None:
    sizes = [80, 40, 20, 10]
    members = [task for task, size in enumerate(sizes) for _ in range(size)]
    order = TaskOrder(members, batch_size=8, seed=0)
    counts, there, rows = Counter(), Counter(), Counter()
    for step in range(2000):
        held = [members[n] for n in order[step]]
        assert len(held) == 8
        counts[len(set(held))] += 1
        there.update(set(held))
        rows.update(held)
    assert set(counts) == {2, 3, 4}
    assert all(550 < count < 780 for count in counts.values())  # each number of tasks equally likely
    assert there[0] > there[1] > there[2] > there[3]
    assert rows[0] / rows[1] > 1.2 and rows[1] / rows[2] > 1.2


def test_every_example_comes_once_before_any_comes_again() -> None:
    members = [0] * 12 + [1] * 6
    order = TaskOrder(members, batch_size=5, seed=3)
    drawn = [n for step in range(40) for n in order[step]]
    for task, size in ((0, 12), (1, 6)):
        mine = [n for n in drawn if members[n] == task]
        for begin in range(0, len(mine) - size, size):
            assert len(set(mine[begin : begin + size])) == size


def test_steps_follow_from_the_seed_alone() -> None:
    members = [0] * 12 + [1] * 6
    again = TaskOrder(members, 5, seed=3)
    assert [TaskOrder(members, 5, seed=3)[step] for step in (7, 2)] == [again[7], again[2]]
    assert TaskOrder(members, 5, seed=4)[7] != again[7]


def test_divergence_and_distance() -> None:
    own, teacher = torch.randn(5, 7), torch.randn(5, 7)
    assert divergence(own, own, 3.0) == pytest.approx(0.0, abs=1e-6)
    p, q = torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=own)
    assert divergence(own, teacher, 1.0) == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()))
    small, near = divergence(own, teacher, 50.0), divergence(own, teacher, 100.0)
    assert float(small) == pytest.approx(float(near), rel=0.1)  # T² keeps its weight as T grows
    assert relative_distance(2 * own, own) == pytest.approx(1.0)
