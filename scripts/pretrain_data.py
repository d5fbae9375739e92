"""Corpus mixture, tokenizer and token files for scripts/pretrain.py."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>")
PAD_ID, BOS_ID, EOS_ID = range(3)
STORIES = "thesophiaxu/CrowdGPT"  # where the story sample, whose lines name no source, comes from
# One newline run is one token on its own, and digits stay single: prompts are cut at line ends and values, and there
# the text before the cut must give the same tokens whatever follows.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ (message['role'] | capitalize) + ': ' + message['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)


class Group(NamedTuple):
    name: str
    weight: float  # how often a document of the group appears in the training stream
    pattern: str  # searched in the document's source


CHILDREN = (
    "grimm|aesop|andrew-lang|baum_|beatrix-potter|rudyard-kipling|milne|nesbit|lofting|lewis-carroll|barrie|spyri|"
    "black-beauty|hodgson-burnett|pollyanna|wind-in-the-willows|bambi|george-macdonald|montgomery|little-women|"
    "tower-treasure|irish-fairy-tales|treasure-island|tom-sawyer|call-of-the-wild|white-fang"
)
GROUPS = (
    Group("short children's stories (TinyStories)", 3.0, "CrowdGPT|moe-routing-bench|smallGPT"),
    Group("African Storybook and Book Dash", 2.0, "global-asp/|bookdash/"),
    Group("Bible in Basic English", 2.0, "bible_databases"),
    Group("graded news and plain-language guides", 2.0, "OneStopEnglish|plainlanguage"),
    Group("open conversation", 2.0, "Topical-Chat"),
    Group("task dialogue", 1.5, "dstc8"),
    Group("children's books and tales", 2.0, rf"(?:standardebooks|HendrikBK)/.*(?:{CHILDREN})"),
    Group("other fiction", 0.7, "standardebooks/"),
    Group("textbooks (OpenStax)", 0.5, "openstax/"),
)


class Document(NamedTuple):
    text: str
    source: str
    licence: str
    group: Group


def read(file: Path) -> Iterator[Document]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            source = row.get("source") or STORIES
            group = next(g for g in GROUPS if re.search(g.pattern, source))
            licence = row.get("licence") or "CDLA-Sharing-1.0 (TinyStories)"
            yield Document(row["text"].strip(), source.split(":")[0], licence, group)


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS_ID)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[PAD_ID],
        bos_token=SPECIALS[BOS_ID],
        eos_token=SPECIALS[EOS_ID],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,  # decoding must give the text back unchanged
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def mix(documents: list[Document], seed: int = 0) -> list[Document]:
    """Repeat or drop documents by their group's weight, and shuffle."""
    random = np.random.default_rng(seed)
    copies = [int(d.group.weight + random.random()) for d in documents]
    stream = np.repeat(np.arange(len(documents)), copies)
    random.shuffle(stream)
    return [documents[i] for i in stream]


def encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """<|bos|> text <|eos|> for every document, end to end."""
    parts: list[np.ndarray] = []
    for start in range(0, len(documents), 500):
        texts = [d.text for d in documents[start : start + 500]]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            parts.append(np.array([BOS_ID, *encoding.ids, EOS_ID], dtype=np.uint16))
    return np.concatenate(parts)


def paragraph_starts(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    newline = [i for i in range(VOCAB_SIZE) if (s := tokenizer.decode([i])) and set(s) == {"\n"}]
    begins = np.flatnonzero(np.isin(tokens, newline)) + 1
    return np.union1d(begins, np.flatnonzero(tokens == BOS_ID))


def describe(documents: list[Document], stream: list[Document]) -> list[dict[str, Any]]:
    rows = []
    for group in GROUPS:
        unique = [d for d in documents if d.group is group]
        rows.append(
            {
                "group": group.name,
                "weight": group.weight,
                "documents": len(unique),
                "bytes": sum(len(d.text.encode()) for d in unique),
                "stream_bytes": sum(len(d.text.encode()) for d in stream if d.group is group),
                "sources": sorted({(d.source, d.licence) for d in unique}),
            }
        )
    return rows


def prepare(corpus: Path, stories: Path, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    files = [*sorted(corpus.glob("train-*.jsonl.gz")), stories / "train.jsonl"]
    documents = [d for file in files for d in read(file)]
    stream = mix(documents)
    tokenizer = train_tokenizer(stream[::2])  # half is plenty for merge counts
    save_tokenizer(tokenizer, work / "tokenizer")
    tokens = encode(tokenizer, stream)
    tokens.tofile(work / "train.bin")
    np.save(work / "starts.npy", paragraph_starts(tokenizer, tokens))
    facts: dict[str, Any] = {"stream_tokens": len(tokens), "mixture": describe(documents, stream), "heldout": {}}
    for name, file in {"corpus": corpus / "heldout.jsonl.gz", "stories": stories / "heldout.jsonl"}.items():
        held = list(read(file))
        encode(tokenizer, held).tofile(work / f"{name}.bin")
        facts["heldout"][name] = {"documents": len(held), "bytes": sum(len(d.text.encode()) for d in held)}
    (work / "data.json").write_text(json.dumps(facts, indent=1))
    print(f"{len(documents)} documents, {len(tokens)} tokens in the training stream")
