"""Style transfer: plain English into Shakespeare's, pairs made by rule from Shakespeare's own sentences.

The assets hold no parallel text in two styles, so one side is made here. The *target* of a pair is a sentence of tiny
Shakespeare as it stands. Its *source* is the same sentence with the words and endings of `RULES` in today's English
("thou hast" → "you have", "'tis" → "it is", "banish'd" → "banished"). Only sentences of 4 to 14 words in which one word
or more changes are taken, and none that still holds an old verb form which the rules do not know ("thou knowest").

What this asks of a model: to repeat a sentence and to put the old words in the right places; which ones is not fully
determined by the source ("you" is "thou", "thee", "ye" or "you"). What it is not: the sources are not what a person
would write today, word order and the rest of the vocabulary stay old, and the rules are blind to grammar ("mine" stays,
"thine" becomes "your"). There is one reference. Repeating the source unchanged is the baseline to beat (arm `copy`).

The speeches are in the order of the plays: the sentences of the first 75 % are for training, of the next 10 % for
choosing, of the last 15 % for the test, so that no scene is in two parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

LENGTH = (4, 14)  # words of a sentence
SHARES = (0.75, 0.85)

WORDS = {
    "thou": "you", "thee": "you", "ye": "you", "thy": "your", "thine": "your", "thyself": "yourself",
    "hath": "has", "doth": "does", "hast": "have", "dost": "do", "wilt": "will", "shalt": "shall", "wert": "were",
    "canst": "can", "didst": "did", "hadst": "had", "wouldst": "would", "shouldst": "should", "couldst": "could",
    "'tis": "it is", "'twas": "it was", "'twere": "it were", "'twill": "it will", "is't": "is it", "ere": "before",
    "nay": "no", "ay": "yes", "o'er": "over", "ne'er": "never", "e'er": "ever", "prithee": "please",
    "methinks": "I think", "hither": "here", "thither": "there", "whither": "where", "wherefore": "why",
    "unto": "to", "'gainst": "against", "'twixt": "between", "betwixt": "between", "spake": "spoke", "oft": "often",
    "aught": "anything", "nought": "nothing", "ope": "open", "ta'en": "taken", "do't": "do it", "on't": "on it",
    "in't": "in it", "to't": "to it", "for't": "for it", "thou'rt": "you are", "'em": "them", "bade": "told",
    "yonder": "there", "whence": "from where", "thence": "from there", "hence": "from here", "sirrah": "fellow",
}  # fmt: skip
# after the words, in this order
RULES = (
    (re.compile(r"\b(you) art\b", re.IGNORECASE), r"\1 are"),
    (re.compile(r"\b(a)rt (you)\b", re.IGNORECASE), r"\1re \2"),
    (re.compile(r"\b([a-z]{3,})'d\b", re.IGNORECASE), r"\1ed"),
    (re.compile(r"\b([a-z]{3,})'st\b", re.IGNORECASE), r"\1"),
)
_ANY = "|".join(sorted(map(re.escape, WORDS), key=len, reverse=True))
_WORD = re.compile(rf"(?<![\w'])({_ANY})(?![\w'])", re.IGNORECASE)
_UNKNOWN = re.compile(r"\b(you \w{2,}e?st|\w{3,}eth|art)\b", re.IGNORECASE)  # old forms that are left in a source


def plain(sentence: str) -> str:
    """The sentence with the old words and endings replaced."""

    def modern(found: re.Match[str]) -> str:
        word = WORDS[found[0].lower()]
        return word[0].upper() + word[1:] if found[0].lstrip("'")[:1].isupper() else word

    text = _WORD.sub(modern, sentence)
    for pattern, instead in RULES:
        text = pattern.sub(instead, text)
    return text


def sentences(speech: str) -> Iterator[str]:
    """The sentences of a speech, without the speaker's name."""
    _, _, said = speech.partition(":\n")
    yield from (part.strip() for part in re.split(r"(?<=[.!?;])\s+", said.replace("\n", " ")))


def pair(sentence: str) -> dict[str, str] | None:
    """`{plain, old}`, or None for a sentence that is too short or long, changes too little, or keeps an old verb."""
    words, source = sentence.split(), plain(sentence)
    if not LENGTH[0] <= len(words) <= LENGTH[1] or "--" in sentence or _UNKNOWN.search(source):
        return None
    return {"plain": source, "old": sentence} if source != sentence else None


def style_rows(data: Path) -> dict[str, list[dict[str, str]]]:
    """Pairs of each part, none twice, in the order of the plays."""
    speeches = (data / "tinyshakespeare" / "speeches.jsonl").read_text(encoding="utf-8").splitlines()
    parts: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
    seen: set[str] = set()
    for number, line in enumerate(speeches):
        share = number / len(speeches)
        part = "train" if share < SHARES[0] else "dev" if share < SHARES[1] else "test"
        for sentence in sentences(json.loads(line)["text"]):
            row = pair(sentence)
            if row is not None and sentence not in seen:
                seen.add(sentence)
                parts[part].append(row)
    return parts
