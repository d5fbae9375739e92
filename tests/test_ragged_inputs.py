"""Rows with prompts of different lengths and everything that may come with them; a row never sees another's prompt."""

from collections.abc import Callable
from typing import Any

import hf_cache
import pytest
import ragged_kit as kit
import tiny
import torch
import transformers as hf
from ragged_kit import LENGTHS, ROWS, TOKENS, Model
from torch import Tensor

from softprompt.base_model import find_way
from softprompt.call import Call
from softprompt.config import Placement
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.join import Mixed
from softprompt.prompt import KV, Embeddings
from softprompt.running import Run

KINDS = ("vectors", "keys", "both")
AFTER, FRONT, TEMPLATE = Placement.AFTER_BOS, Placement.FRONT, Placement.TEMPLATE
SAME = 6  # tokens of each row where none is padded


def rows_like_alone(model: Model, kind: str, placement: Placement, field: str, of_row: Callable[[int], Any]) -> None:
    """`of_row` gives row i's inputs `[1, …]`; all of them together give each row what it gets alone."""
    _, joined, single = model.prompts(kind)
    each = [of_row(row) for row in range(len(ROWS))]
    batch = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    with torch.no_grad():
        got = model.run(joined, placement).forward(Call.of(batch))[field]
        for row, own in enumerate(each):
            kit.close(got[row], model.forward_alone(single[row], placement, **own)[field][0])


def ids(row: int) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (1, SAME), generator=torch.Generator().manual_seed(row))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", [FRONT, AFTER])
def test_token_types_and_positions_of_encoders(placement: Placement, kind: str) -> None:
    types = torch.tensor([[0, 0, 0, 1, 1, 1]])
    model, zeros = Model("bert", "MASKED_LM"), torch.zeros_like(types)
    rows_like_alone(
        model,
        kind,
        placement,
        "logits",
        lambda row: {"input_ids": ids(row), "token_type_ids": types if row % 2 else zeros},
    )
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    rows_like_alone(
        model, kind, placement, "logits", lambda row: {"input_ids": ids(row), "position_ids": positions + row}
    )
    from_two = 2 + torch.arange(SAME)[None]
    rows_like_alone(
        Model("roberta", "MASKED_LM"),
        kind,
        placement,
        "logits",
        lambda row: {"input_ids": ids(row), "position_ids": from_two + row},
    )


@pytest.mark.parametrize(("family", "kind", "placement"), [
    ("gptj", "vectors", FRONT), ("gptj", "keys", FRONT), ("falcon_gqa", "keys", FRONT), ("llama", "keys", FRONT),
    ("llama", "both", AFTER), ("gpt2", "vectors", AFTER), ("lfm2", "vectors", FRONT), ("lfm2", "both", AFTER),
])  # fmt: skip
@pytest.mark.parametrize("masked", [True, False])
def test_positions_of_decoders(family: str, kind: str, placement: Placement, masked: bool) -> None:
    more = {"attention_mask": torch.ones(1, SAME, dtype=torch.long)} if masked else {}
    positions = torch.tensor([[0, 1, 2, 5, 6, 7]])
    if not masked and placement is FRONT and family != "lfm2":
        positions = torch.arange(SAME)[None]  # a gap without a mask is where another sequence begins
    rows_like_alone(
        Model(family), kind, placement, "logits",
        lambda row: {"input_ids": ids(row), "position_ids": positions + row % 2, **more},
    )  # fmt: skip


def square(row: int, causal: bool) -> Tensor:
    """A mask `[1, 1, T, T]` that hides one column of a row from its other tokens."""
    seen = torch.ones(1, 1, SAME, SAME, dtype=torch.bool)
    seen[..., 1 + row % 3] = False
    seen |= torch.eye(SAME, dtype=torch.bool)
    return seen.tril() if causal else seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("additive", [True, False])
def test_square_masks(kind: str, additive: bool) -> None:
    def of(row: int, causal: bool = False) -> Tensor:
        seen = square(row, causal)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen

    bert, llama = Model("bert", "MASKED_LM"), Model("llama")
    rows_like_alone(bert, kind, FRONT, "logits", lambda row: {"input_ids": ids(row), "attention_mask": of(row)})
    if kind == "keys":
        for model in (llama, Model("gptj"), Model("mpt")):
            if not additive or model is not llama:
                continue
            causal = lambda row: {"input_ids": ids(row), "attention_mask": of(row, True)}  # noqa: E731
            rows_like_alone(model, kind, FRONT, "logits", causal)
        return
    labelled = lambda row: {"input_ids": ids(row), "attention_mask": of(row, True), "labels": ids(row)}  # noqa: E731
    rows_like_alone(llama, kind, AFTER, "logits", labelled)
    _, joined, _ = llama.prompts(kind)
    rows = {"input_ids": torch.cat([ids(row) for row in range(6)]), "attention_mask": of(0, True).expand(6, -1, -1, -1)}
    with pytest.raises(ConfigError, match=r"prompts of different lengths, which needs one of \[B, T\]"):
        llama.run(joined, AFTER).forward(Call.of(rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", [FRONT, AFTER])
def test_classifiers(placement: Placement, kind: str) -> None:
    """Encoders read column 0, decoders a row's last token."""
    rows_like_alone(Model("bert", "SEQ_CLS"), kind, placement, "logits", lambda row: {"input_ids": ids(row)})
    if kind != "both" or placement is AFTER:
        rows_like_alone(Model("gpt2", "SEQ_CLS"), kind, placement, "logits", lambda row: {"input_ids": ids(row)})
    if kind != "both":
        rows_like_alone(Model("bloom", "SEQ_CLS"), kind, placement, "logits", lambda row: {"input_ids": ids(row)})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_answer_spans(kind: str, side: str) -> None:
    model = Model("bert", "QUESTION_ANS")
    leaves, joined, single = model.prompts(kind)
    batch = tiny.ragged(TOKENS, side=side)
    first = batch["attention_mask"].argmax(dim=1)
    begin, end = torch.tensor([1, 0, 2, 0, 1, 4]), torch.tensor([2, 2, 5, 0, 1, 5])
    spans = {"start_positions": begin + first, "end_positions": end + first}
    got = model.run(joined).forward(Call.of({**batch, **spans})).loss
    alone = [
        model.run(Embeddings(torch.zeros(1, 0, 32)) if single[row] is None else single[row]).forward(
            Call(ids=own, rest={"start_positions": begin[row : row + 1], "end_positions": end[row : row + 1]})
        )
        for row, own in enumerate(kit.each_row(batch))
    ]
    expected = torch.stack([each.loss for each in alone]).mean()
    kit.close(got, expected)
    kit.same_gradients(got, expected, leaves)


# ---- slots -----------------------------------------------------------------------------------------------------------


def with_slots() -> tuple[dict[str, Tensor], Tensor]:
    """Rows with padding behind them in which the virtual tokens of their own prompts stand anywhere, in order."""
    generator = torch.Generator().manual_seed(3)
    own = [LENGTHS[prompt] for prompt in ROWS]
    batch = tiny.ragged(tuple(length + more for length, more in zip(TOKENS, own, strict=True)))
    slots = torch.full_like(batch["input_ids"], -1)
    for row, (length, more) in enumerate(zip(TOKENS, own, strict=True)):
        where = torch.randperm(length + more, generator=generator)[:more].sort().values
        slots[row, where] = torch.arange(more)
    return batch, slots


@pytest.mark.parametrize(("family", "task"), [
    ("bert", "MASKED_LM"), ("roberta", "MASKED_LM"), ("llama", "CAUSAL_LM"), ("bloom", "CAUSAL_LM"),
    ("lfm2", "CAUSAL_LM"), ("mamba", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM"),
])  # fmt: skip
def test_slots_count_the_virtual_tokens_of_a_rows_own_prompt(family: str, task: str) -> None:
    model = Model(family, task)
    leaves, joined, _ = model.prompts("vectors")
    batch, slots = with_slots()
    more = {"decoder_input_ids": torch.tensor([[2, 5, 9]])} if task == "SEQ_2_SEQ_LM" else {}
    expanded = {name: value.expand(len(ROWS), -1) for name, value in more.items()}
    with torch.no_grad():
        got = model.run(joined, TEMPLATE, slots).forward(Call.of({**batch, **expanded})).logits
        for row, own in enumerate(kit.each_row(batch)):
            prompt, mine = leaves[ROWS[row]][0][None], slots[row : row + 1, : own.shape[1]]
            if prompt.shape[1]:
                expected = (
                    model.run(Embeddings(prompt), TEMPLATE, mine).forward(Call.of({"input_ids": own, **more})).logits
                )
            else:
                expected = model.base(input_ids=own, **more).logits
            kit.close(got[row][: expected.shape[1]], expected[0])


def test_a_slot_that_a_rows_own_prompt_has_not() -> None:
    model = Model("llama")
    _, joined, _ = model.prompts("vectors")
    batch, slots = with_slots()
    slots[1, 0] = 3
    with pytest.raises(ConfigError, match="slots of row 1 go up to 3, but its prompt has 3 virtual tokens"):
        model.run(joined, TEMPLATE, slots).forward(Call.of(dict(batch)))


# ---- rows are apart --------------------------------------------------------------------------------------------------


def poison(prompt: Any, which: int) -> Any:
    """The same prompt with no number in one of its parts."""

    def change(values: Tensor) -> Tensor:
        values = values.clone()
        values[which] = torch.nan
        return values

    if isinstance(prompt, KV):
        return prompt.map(change)
    if isinstance(prompt, Embeddings):
        return Embeddings(change(prompt.vectors), prompt.rows, prompt.lengths)
    return Mixed(poison(prompt.kv, which), poison(prompt.vectors, which))


IN_FRONT = ("gpt2", "llama", "mistral_window", "bloom", "mpt", "gptj")
REACHED = [(family, kind) for family in IN_FRONT for kind in ("vectors", "keys")] + [
    *((family, kind) for family in ("bert", "t5", "bart", "lfm2") for kind in KINDS),
    ("mamba", "vectors"),
]


@pytest.mark.pairwise
@pytest.mark.parametrize("which", [0, 2, 3])
@pytest.mark.parametrize(("family", "kind"), REACHED)
def test_a_row_never_sees_another_rows_prompt(family: str, kind: str, which: int) -> None:
    """No number in one prompt: every other row has the same bits, and every other prompt the same gradient."""
    task = {"bert": "MASKED_LM", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    model = Model(family, task)
    leaves, joined, _ = model.prompts(kind)
    batch = tiny.ragged(TOKENS)
    if task == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    others = [row for row, prompt in enumerate(ROWS) if prompt != which]
    of = [each for index, part in enumerate(leaves) for each in part if index != which and each.numel()]

    def outcome(prompt: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = model.run(prompt).forward(Call.of(dict(batch))).logits
        assert prompt is joined or bool(logits[[row for row in range(6) if row not in others]].isnan().any())
        return logits[others], torch.autograd.grad(
            (logits[others] * batch["attention_mask"][others][..., None]).sum(), of
        )

    expected, wanted = outcome(joined)
    got, gradients = outcome(poison(joined, which))
    assert torch.equal(got, expected)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert torch.equal(mine, theirs)


# ---- what does not go ------------------------------------------------------------------------------------------------


def test_later_steps_need_a_mask_where_prompts_differ() -> None:
    model = Model("lfm2")
    _, joined, _ = model.prompts("vectors")
    batch = torch.cat([ids(row) for row in range(6)])
    cache = hf_cache.of(model.run(joined).forward(Call.of({"input_ids": batch, "use_cache": True})))
    with pytest.raises(ConfigError, match="pass the attention_mask of all real tokens so far"):
        model.run(joined).forward(Call.of({"input_ids": batch[:, :1], **hf_cache.given(model.base, cache)}))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_room_is_counted_by_row(family: str) -> None:
    """The longest prompt and the longest row would not fit together, but they are not together."""
    model = Model(family, "MASKED_LM" if family == "bert" else "CAUSAL_LM")
    _, joined, single = model.prompts("keys")
    batch = tiny.ragged((5, 3, tiny.CONTEXT, 4, 2, 6))
    with torch.no_grad():
        got = model.run(joined).forward(Call.of(dict(batch))).logits[2]
        kit.close(got, model.base(input_ids=batch["input_ids"][2:3]).logits[0])
    with pytest.raises(ConfigError, match="learned positions"):
        model.run(joined).forward(Call.of(tiny.ragged((tiny.CONTEXT, 3, 4, 4, 2, 6))))
    assert single[2] is None


def test_a_decoder_that_is_told_no_positions() -> None:
    """Its table counts them itself, so a prefix cannot move them."""
    config = hf.M2M100Config(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                          max_position_embeddings=64)  # fmt: skip
    way, facts = find_way(hf.M2M100ForConditionalGeneration(config).eval())
    pairs = tuple((torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8)) for _ in facts.layers)
    rows = {"input_ids": torch.tensor([[5, 6]]), "decoder_input_ids": torch.tensor([[2, 7]])}
    with pytest.raises(UnsupportedError, match="told no positions"):
        Run(way, facts, KV(pairs)).forward(Call.of(rows))
