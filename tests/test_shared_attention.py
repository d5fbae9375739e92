"""Attention over a shared prefix equals attention over keys that were concatenated row by row, gradients included."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import shared_kit
import torch
from shared_kit import HEADS, ROWS, SPANS, batch, gradients, hidden, in_front, naive
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softprompt.attention import attend, groups_of, shared
from softprompt.attention.shared import plain

WAYS = {"attend": attend, "plain": plain}
NAMES = ("query", "key", "value", "prefix key", "prefix value")


@pytest.fixture
def fast_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain formula may not help out."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the plain formula was used")

    monkeypatch.setattr(shared, "plain", refuse)


def same(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-9, msg=lambda text: f"{what}: {text}")


def check(given: shared_kit.Batch, way: Callable[..., Tensor], what: str) -> None:
    leaves, others = given.leaves(), given.leaves()
    got, expected = way(*leaves.arguments), naive(others)
    same(got, expected, f"{what}, output")
    for name, one, other in zip(NAMES, gradients(got, leaves), gradients(expected, others), strict=True):
        same(one, other, f"{what}, gradient of {name}")
    with torch.no_grad():
        same(way(*given.arguments), expected, f"{what}, without gradient")


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_concatenation(heads: str, span: str, kind: str, fast_only: None) -> None:
    given = batch(heads, span, kind, causal=span == "whole")
    for number, before in enumerate(shared_kit.biases(given)):
        for name, way in WAYS.items():
            check(replace(given, before=before), way, f"{name}, prefix bias {number}")


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["one for all", "groups of different size", "ragged"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("heads", HEADS)
def test_with_a_mask_of_the_rows_own(heads: str, span: str, kind: str, fast_only: None) -> None:
    """The first query of the first row sees the prompt alone."""
    given = batch(heads, span, kind)
    rows, of_query, queries, keys = *given.query.shape[:3], given.key.shape[2]
    for shape in ((rows, 1), (rows, of_query), (1, 1)):
        masked = replace(given, bias=hidden((*shape, queries, keys)))
        for number, before in enumerate(shared_kit.biases(given)[::2]):
            for name, way in WAYS.items():
                check(replace(masked, before=before), way, f"{name}, mask {shape}, prefix bias {number}")


@pytest.mark.parametrize("loud", ["prefix", "rows"])
def test_scores_far_apart(loud: str, fast_only: None) -> None:
    """Scores in the hundreds on one side: the exponentials of either alone would overflow or vanish."""
    given = batch(kind="ragged")
    states = [
        each * (200 if number == (3 if loud == "prefix" else 1) else 1) for number, each in enumerate(given.states)
    ]
    for name, way in WAYS.items():
        check(given.with_states(*states), way, name)


@pytest.mark.parametrize("kind", ["one for all", "pairs, crosswise"])
def test_tensors_that_are_not_contiguous(kind: str, fast_only: None) -> None:
    """As models have them: heads and tokens transposed; also the last dimension, and a prefix that was expanded."""
    given = batch(kind=kind, causal=True)
    for dims in ((1, 2), (2, 3), (1, 3)):
        turned = given.with_states(*(each.transpose(*dims).contiguous().transpose(*dims) for each in given.states))
        assert not turned.query.is_contiguous()
        for name, way in WAYS.items():
            same(way(*turned.arguments), way(*given.arguments), f"{name}, {dims}")
            leaves = turned.with_states(*(each.requires_grad_() for each in turned.states))
            output = way(*leaves.arguments)
            grad = torch.randn_like(output).transpose(*dims).contiguous().transpose(*dims)
            got = torch.autograd.grad(output, leaves.states, grad)
            plainly = given.leaves()
            wanted = torch.autograd.grad(naive(plainly), plainly.states, grad.contiguous())
            for one, other, what in zip(got, wanted, NAMES, strict=True):
                same(one, other, f"{name}, {dims}, gradient of {what}")
    one = [given.prefix_key[:, :1].expand_as(given.prefix_key), given.prefix_value[:, :1].expand_as(given.prefix_value)]
    check(given.with_states(*given.states[:3], *one), attend, "expanded")


def test_values_of_another_size_than_keys() -> None:
    given = batch("GQA", kind="ragged", causal=True)
    query, key, value, prefix_key, prefix_value = given.states
    check(given.with_states(query, key, value[..., :3], prefix_key, prefix_value[..., :3]), attend, "narrow values")


def test_gradients_of_biases() -> None:
    """T5 has its position bias trained, and the prefix's columns of it."""
    given = batch("MHA", "chunk", "ragged")
    tensors = [torch.randn(1, 4, 3, width, dtype=torch.float64, requires_grad=True) for width in (7, 5)]
    biased = replace(given, bias=tensors[0], before=tensors[1])
    got, expected = attend(*biased.arguments), naive(biased)
    same(got, expected, "output")
    weights = torch.randn_like(got)
    for one, other in zip(*(torch.autograd.grad(each, tensors, weights) for each in (got, expected)), strict=True):
        assert other.abs().max() > 1e-2
        same(one, other, "gradient of a bias")


def test_a_row_without_a_prompt_has_its_own_attention_alone(fast_only: None) -> None:
    given = batch(kind="some empty", causal=True)
    key, value = given.key[3:].repeat_interleave(2, 1), given.value[3:].repeat_interleave(2, 1)
    given = replace(given, rows=[2, 0, 3, 1])
    for way in WAYS.values():
        expected = scaled_dot_product_attention(given.query[3:], key, value, is_causal=True, scale=given.scale)
        same(way(*given.arguments)[3:], expected, "row 3")


# ---- derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kind"),
    [("MHA", "groups of different size"), ("GQA", "one for all"), ("GQA", "some empty"), ("MQA", "ragged pairs")],
)
def test_gradcheck(heads: str, kind: str, fast_only: None) -> None:
    """Against finite differences in float64."""
    given = batch(heads, "chunk", kind)
    given = replace(given, bias=hidden((4, 1, 3, 7)), before=torch.randn(4, 1, 3, 5, dtype=torch.float64)).leaves()

    def function(*states: Tensor) -> Tensor:
        return attend(*given.with_states(*states).arguments)

    assert torch.autograd.gradcheck(function, given.states)


@pytest.mark.slow
def test_gradcheck_of_the_causal_way(fast_only: None) -> None:
    given = batch(kind="pairs", causal=True).leaves()
    assert torch.autograd.gradcheck(lambda *states: attend(*given.with_states(*states).arguments), given.states)


@pytest.mark.parametrize("needed", range(5))
def test_gradients_of_one_input_alone(needed: int, fast_only: None) -> None:
    """A frozen prompt, a first layer whose rows need none, and so on."""
    given, expected = batch(kind="ragged, of different size", causal=True), None
    for way in (lambda each: attend(*each.arguments), naive):
        states = [each.clone().requires_grad_(number == needed) for number, each in enumerate(given.states)]
        (got,) = torch.autograd.grad(way(given.with_states(*states)).square().sum(), states[needed])
        expected = got if expected is None else expected
        same(got, expected, NAMES[needed])


def test_a_second_derivative_is_refused_not_wrong() -> None:
    given = batch(causal=True).leaves()
    (first,) = torch.autograd.grad(attend(*given.arguments).square().sum(), given.query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ---- types -------------------------------------------------------------------------------------------------------


def ordinary(given: shared_kit.Batch) -> Tensor:
    """torch's own attention over concatenated keys, row by row, in the batch's type."""
    outputs = []
    for number in range(len(given.query)):
        key, value = in_front(given, number)
        mask, length = None, key.shape[1] - given.key.shape[2]
        if given.causal:
            mask = torch.ones(given.query.shape[2], given.key.shape[2], dtype=torch.bool).tril()
            mask = torch.nn.functional.pad(mask, (length, 0), value=True)
        if given.bias is not None:
            mask = torch.nn.functional.pad(given.bias[number], (length, 0))
        row = given.query[number : number + 1]
        outputs.append(scaled_dot_product_attention(row, key[None], value[None], mask, scale=given.scale))
    return torch.cat(outputs)


@pytest.mark.pairwise
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["one for all", "ragged, of different size"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_is_as_exact_as_the_ordinary_kernel(way: str, dtype: torch.dtype, heads: str, kind: str, masked: bool) -> None:
    """Beside the truth in float64, the error is that of torch's own attention in the same type, or little more."""
    given = batch(heads, kind=kind, causal=not masked).to(dtype)
    exact = given.to(torch.float64).leaves()
    if masked:
        mask = hidden((4, 1, 5, 5), dtype)
        given, exact = replace(given, bias=mask), replace(exact, bias=mask.double())
    truth = naive(exact)
    truths = (truth, *gradients(truth, exact))
    errors = []
    for each in (WAYS[way], None):
        leaves = given.leaves()
        output = ordinary(leaves) if each is None else each(*leaves.arguments)
        found = (output, *gradients(output, leaves))
        assert all(value.dtype is dtype for value in found)
        errors.append([error(*pair) for pair in zip(found, truths, strict=True)])
    for name, ours, theirs in zip(("output", *NAMES), *errors, strict=True):
        assert ours <= 2 * theirs + torch.finfo(dtype).eps / 4, f"{name}: {ours:.2e}, of the ordinary {theirs:.2e}"


def error(got: Tensor, right: Tensor) -> float:
    return float(((got.double() - right).norm() / right.norm()).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    """A thousandth of the weight on a large value: as a number of the type, the other share would be one."""
    query = torch.ones(1, 1, 1, 1)
    keys = torch.full((1, 1, 1, 1), 6.90625), torch.zeros(1, 1, 1, 1)  # e^6.90625 = 998.5
    values = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1000.0)
    states = [each.to(dtype) for each in (query, keys[1], values[1], keys[0], values[0])]
    given = shared_kit.Batch(*states, scale=1.0)
    assert float(attend(*given.arguments)) == pytest.approx(1000 / 999.5, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_sees_nothing_of_its_own(dtype: torch.dtype) -> None:
    """As padding on the left does: exactly the prompt, no number is lost to the lowest one of the type."""
    given = replace(batch().to(dtype), bias=torch.full((4, 1, 5, 5), torch.finfo(dtype).min, dtype=dtype))
    key, value = (each.expand(4, -1, -1, -1).repeat_interleave(2, 1) for each in given.states[3:])
    expected = scaled_dot_product_attention(given.query, key, value, scale=given.scale)
    for way in WAYS.values():
        leaves = given.leaves()
        got = way(*leaves.arguments)
        torch.testing.assert_close(got, expected, atol=4 * torch.finfo(dtype).eps, rtol=0)
        found = gradients(got, leaves)
        assert all(each.isfinite().all() for each in found)
        assert not any(each.any() for each in found[1:3])  # the rows' own keys and values


# ---- which rows have which prompt --------------------------------------------------------------------------------


def test_groups_are_few_and_hold_every_row_once() -> None:
    rows = [3, 1, 3, 0, 2, 3, 1]
    groups = groups_of(len(rows), 9, rows, (9, 2, 0, 5), torch.device("cpu"))
    assert sorted((group.count, group.sharing, group.length) for group in groups) == [(1, 1, 9), (1, 2, 2), (1, 3, 5)]
    assert sorted(row for group in groups for row in group.of_rows(torch.arange(7)).tolist()) == [0, 1, 2, 3, 5, 6]
    assert len(groups_of(64, 9, list(range(64)), None, torch.device("cpu"))) == 1


def test_a_prompt_too_few_is_refused() -> None:
    """The CPU's kernel does not check sizes: it would read the memory behind the keys."""
    given = batch(kind="one each")
    query, key, value, prefix_key, prefix_value = given.states
    for parts in ((prefix_key[:3], prefix_value[:3]), (prefix_key, prefix_value[:, :, 1:])):
        fewer = given.with_states(query, key, value, *parts)
        groups = groups_of(4, 5, [0, 1, 2, 3], None, query.device)
        with pytest.raises(AssertionError):
            attend(query, key, value, replace(fewer.prefix, groups=groups))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["one each", "groups of different size", "ragged", "ragged, of different size"])
def test_a_poisoned_prompt_reaches_no_other_row(kind: str, way: str) -> None:
    """Everything that the prompt's own rows have no part in is bit for bit the same."""
    given = batch(kind=kind, causal=True).to(torch.float32)
    assert given.rows is not None
    for prompt in range(len(given.prefix_key)):
        others = torch.tensor([row for row, own in enumerate(given.rows) if own != prompt])
        rest = [each for each in range(len(given.prefix_key)) if each != prompt]
        found = []
        for each in (given, poisoned(given, prompt)):
            leaves = each.leaves()
            output = WAYS[way](*leaves.arguments)
            parts = gradients(output, leaves)
            found.append([part[others] for part in (output, *parts[:3])] + [part[rest] for part in parts[3:]])
            own = output[[row for row in range(4) if row not in others]]
            assert own.isnan().all() if each is not given else not own.isnan().any()
        assert all(torch.equal(clean, other) for clean, other in zip(*found, strict=True))


def poisoned(given: shared_kit.Batch, prompt: int) -> shared_kit.Batch:
    length = shared_kit.LENGTH if given.lengths is None else given.lengths[prompt]
    parts = [part.clone() for part in given.states[3:]]
    for part in parts:
        part[prompt, :, -length:] = torch.nan
    return given.with_states(*given.states[:3], *parts)


# ---- dropout -----------------------------------------------------------------------------------------------------

DRAWS, RATE = 20_000, 0.2


def test_dropout_has_the_mean_and_the_spread_of_the_formula() -> None:
    """Each row of a large batch draws a mask of its own, over the prefix that all share as over its own keys.

    Weights are kept with probability 1 − r, independently, and divided by it: o = Σ w·v on average, with the variance
    Σ w²·v²·r / (1 − r). The mean of n draws is off by five of its standard deviations once in a million.
    """
    for heads in HEADS:
        one = batch(heads, "one")
        got = attend(*many(one).arguments, dropout=RATE)[:, :, 0].double()
        key, value = in_front(one, 0)
        weights = (one.query[0] @ key.mT * one.scale).softmax(-1)
        mean, variance = weights @ value, weights.square() @ value.square() * RATE / (1 - RATE)
        assert ((got.mean(0) - mean[:, 0]).abs() < 5 * (variance[:, 0] / DRAWS).sqrt()).all()
        torch.testing.assert_close(got.var(0), variance[:, 0], rtol=8 * (2 / DRAWS) ** 0.5, atol=0)


def test_dropout_of_rows_that_share_a_prompt_is_independent() -> None:
    """Two rows of one prompt: what dropout does to the one says nothing about the other."""
    one = batch("GQA", "one")
    loud = one.with_states(*one.states[:2], 0 * one.value, *one.states[3:])  # the prefix's values alone are seen
    got = attend(*many(loud).arguments, dropout=RATE)[:, 0, 0, 0]
    first, second = (part - part.mean() for part in got.view(2, -1))
    correlation = (first * second).mean() / (first.std() * second.std())
    assert correlation.abs() < 5 / (DRAWS / 2) ** 0.5
    assert len(got.unique()) > 2 ** (shared_kit.LENGTH - 1)


def test_dropout_gives_the_gradients_of_the_same_draw() -> None:
    """Against finite differences, with the generator wound back before every call."""
    given = batch("GQA", "chunk", "ragged, of different size").leaves()

    def function(*states: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attend(*given.with_states(*states).arguments, dropout=RATE)

    assert torch.autograd.gradcheck(function, given.states, fast_mode=True)
    assert not torch.equal(function(*given.states), attend(*given.arguments))


def many(one: shared_kit.Batch) -> shared_kit.Batch:
    """The first row, as often as draws are wanted; one prompt for all."""
    rows = (each[:1].expand(DRAWS, -1, -1, -1) for each in one.states[:3])
    return one.with_states(*rows, *one.states[3:]).to(torch.float32)
