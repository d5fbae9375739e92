"""Write the demo's data-to-text set: small-town cards and plain sentences about them. Our own words, Apache-2.0.

    python scripts/make_demo_data.py [--out softprompt/demo_data]

Each row has `data`, a card such as "name: Milo | kind: cat | age: two years | colour: grey", and `text`, what a person
would say: one sentence or two. The same seed gives the same bytes. The held-out cards are new in more than their
row: each joins two values (a grey cat, say) that no training card joins, so a prompt has to have learnt the pattern.
A training row has one text; a held-out row lists every wording as a reference.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEED = 7
TRAIN_ROWS, HELD_OUT_ROWS = 740, 80
HELD_OUT_PAIRS = 6  # of each kind of card

Card = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of card: its fields in order, which may be missing, which two are paired, and its wordings."""

    fields: dict[str, list[str]]
    optional: tuple[str, ...]
    paired: tuple[str, str]
    wordings: tuple[Callable[[Card], str], ...]


def _sentences(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _if(card: Card, field: str, text: str) -> str:
    return text.format(**card) if field in card else ""


PET = Kind(
    fields={
        "name": ["Milo", "Bella", "Max", "Lily", "Sam", "Ruby", "Daisy", "Rex", "Luna", "Toby", "Rosie", "Jack"],
        "kind": ["cat", "dog", "rabbit", "pony", "duck"],
        "age": ["one year", "two years", "three years", "five years", "six months"],
        "colour": ["black", "white", "brown", "grey", "orange"],
        "likes": ["children", "long walks", "warm milk", "the garden", "to play", "to sleep"],
    },
    optional=("age", "likes"),
    paired=("kind", "colour"),
    wordings=(
        lambda c: _sentences(
            f"{c['name']} is {_a(c['colour'])} {c['kind']}{_if(c, 'age', ' who is {age} old')}.",
            _if(c, "likes", "{name} likes {likes}."),
        ),
        lambda c: _sentences(
            f"Meet {c['name']}, {_a(c['colour'])} {c['kind']}{_if(c, 'likes', ' who likes {likes}')}.",
            _if(c, "age", "{name} is {age} old."),
        ),
        lambda c: _sentences(
            f"This {c['colour']} {c['kind']} is called {c['name']}{_if(c, 'age', ' and is {age} old')}.",
            _if(c, "likes", "{name} likes {likes}."),
        ),
    ),
)

SHOP = Kind(
    fields={
        "shop": ["Green Door", "Old Mill", "Red House", "Corner Shop", "Little Star", "Happy Fox", "White Horse"],
        "sells": ["bread", "books", "toys", "flowers", "hats", "fish"],
        "place": ["by the river", "in the square", "near the church", "behind the school", "on the hill"],
        "price": ["cheap", "fair", "high"],
        "open": ["every day", "in the morning", "on Monday", "at night"],
    },
    optional=("price", "open"),
    paired=("sells", "place"),
    wordings=(
        lambda c: _sentences(
            f"The {c['shop']} sells {c['sells']} {c['place']}{_if(c, 'price', ', and its prices are {price}')}.",
            _if(c, "open", "It is open {open}."),
        ),
        lambda c: _sentences(
            f"You can buy {c['sells']} at the {c['shop']} {c['place']}{_if(c, 'open', ', which is open {open}')}.",
            _if(c, "price", "The prices are {price}."),
        ),
        lambda c: _sentences(
            f"The {c['shop']} is a shop {c['place']} that sells {c['sells']}.",
            _if(c, "price", "Its prices are {price}."),
            _if(c, "open", "It is open {open}."),
        ),
    ),
)

EVENT = Kind(
    fields={
        "event": ["a dance", "a race", "a play", "a big dinner", "a music night", "a story hour"],
        "place": ["the park", "the school", "the town hall", "the library", "the beach"],
        "day": ["Monday", "Friday", "Saturday", "Sunday"],
        "time": ["two", "four", "six", "seven"],
        "cost": ["free", "one pound", "five pounds"],
    },
    optional=("time", "cost"),
    paired=("event", "place"),
    wordings=(
        lambda c: _sentences(
            f"There is {c['event']} at {c['place']} on {c['day']}{_if(c, 'time', ' at {time}')}.", _cost(c)
        ),
        lambda c: _sentences(
            f"Come to {c['place']} on {c['day']}{_if(c, 'time', ' at {time}')} for {c['event']}.", _cost(c)
        ),
        lambda c: _sentences(
            f"On {c['day']} there will be {c['event']} at {c['place']}.",
            _if(c, "time", "It starts at {time}."),
            _cost(c),
        ),
    ),
)


def _cost(card: Card) -> str:
    if "cost" not in card:
        return ""
    return "It is free." if card["cost"] == "free" else f"It costs {card['cost']}."


WEATHER = Kind(
    fields={
        "where": ["the valley", "the north", "the south", "the hills", "the city"],
        "morning": ["rain", "sun", "fog", "snow", "clouds"],
        "afternoon": ["rain", "sun", "fog", "snow", "clouds"],
        "wind": ["strong", "light", "cold", "warm"],
    },
    optional=("wind",),
    paired=("morning", "afternoon"),
    wordings=(
        lambda c: _sentences(
            f"In {c['where']} there will be {c['morning']} in the morning and {c['afternoon']} in the afternoon.",
            _if(c, "wind", "The wind is {wind}."),
        ),
        lambda c: _sentences(
            f"{_capital(c['where'])} will have {c['morning']} in the morning and {c['afternoon']} in the afternoon"
            f"{_if(c, 'wind', ', with a {wind} wind')}.",
        ),
        lambda c: _sentences(
            f"Expect {c['morning']} in {c['where']} in the morning.",
            f"Later there will be {c['afternoon']}{_if(c, 'wind', ' and a {wind} wind')}.",
        ),
    ),
)

KINDS = (PET, SHOP, EVENT, WEATHER)


def draw_card(kind: Kind, random_: random.Random) -> Card:
    card = {field: random_.choice(values) for field, values in kind.fields.items()}
    return {field: value for field, value in card.items() if field not in kind.optional or random_.random() < 0.7}


def pair_of(kind: Kind, card: Card) -> tuple[str, str]:
    return card[kind.paired[0]], card[kind.paired[1]]


def kept_apart(kind: Kind, random_: random.Random) -> set[tuple[str, str]]:
    """The pairs of values that only held-out cards may join; every single value stays in training cards."""
    first, second = (kind.fields[field] for field in kind.paired)
    return set(random_.sample([(a, b) for a in first for b in second], HELD_OUT_PAIRS))


def data_text(card: Card) -> str:
    return " | ".join(f"{field}: {value}" for field, value in card.items())


def rows(held_out: bool, count: int, apart: list[set[tuple[str, str]]], random_: random.Random) -> list[dict]:
    """`count` different cards, the kinds in turn, with one wording or (held out) all of them."""
    found: dict[str, dict] = {}
    while len(found) < count:
        number = len(found) % len(KINDS)
        card = draw_card(KINDS[number], random_)
        if (pair_of(KINDS[number], card) in apart[number]) != held_out or data_text(card) in found:
            continue
        texts = [wording(card) for wording in KINDS[number].wordings]
        found[data_text(card)] = {"data": data_text(card), "text": texts if held_out else random_.choice(texts)}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("softprompt/demo_data"))
    folder = parser.parse_args().out
    random_ = random.Random(SEED)
    apart = [kept_apart(kind, random_) for kind in KINDS]
    folder.mkdir(parents=True, exist_ok=True)
    for name, held_out, count in (("train", False, TRAIN_ROWS), ("heldout", True, HELD_OUT_ROWS)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(held_out, count, apart, random_)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
