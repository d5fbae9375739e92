"""The model card, filled in from a run's own numbers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from transformers import PretrainedConfig

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The embedded language model

A causal language model of {millions:.2f} million parameters, pretrained from scratch by `scripts/pretrain.py` and
shipped inside the package, so that tests, examples and first steps need no download. This file is written by that
script's export step; its numbers come from the run and from the exported files.
{notice}
It is a toy. It writes short plain English that mostly holds together for a sentence or two, knows next to nothing, and
follows no instructions. Use it to see a soft prompt learn something in seconds, not to judge how good a method is.

## Architecture

Llama with grouped-query attention: {layers} layers, hidden size {hidden}, {heads} heads of {head_dim} with
{kv_heads} key-value heads, feed-forward {ffn}, tied embeddings, context {context}, RoPE theta 10000. The weights are
stored in float16 and load in float32.

The tokenizer is a byte-level BPE of {vocab} tokens trained on the same mixture, with `<|pad|>`, `<|bos|>` and
`<|eos|>`. Any text decodes back to itself. Digits are single tokens, and a run of newlines is one token of its own.
`tokenizer(text)` puts `<|bos|>` in front, as in training. The chat template is plain text, `User: ...` and
`Assistant: ...` on separate lines, which is the form of the task dialogues in the data. The model is not tuned for
chat.

## Training

{steps} optimiser steps, {tokens:.1f} million tokens ({passes:.2f} passes over the mixture below), in {minutes:.0f}
minutes of wall-clock on a CPU ({threads} threads of an {cpu}, shared with other work), in bfloat16 autocast with
float32 master weights, {step_tokens} tokens a step.
{optimizer}
Linear warm-up over the first steps, a constant rate, and a linear decay over the last quarter of the time. Windows of
256 tokens for the first {short:.0%} of the time and of 1024 after that.

| Held-out text | documents | bytes | tokens | nats per token | bits per byte |
|---|---|---|---|---|---|
{heldout}

Each held-out file is read in windows of 1024 tokens that start with `<|bos|>`; the end of a document counts as a token.
The first is a random 1% of the corpus documents, so its chapters come from books whose other chapters were trained on;
the second is the last 300 stories of the story sample.

{curve}

## Data

| Group | documents | MB | weight | share of the training stream |
|---|---|---|---|---|
{mixture}

The weight is how often a document appears in one pass. Simple text is weighted up and specialist text down, because
the model is meant to write plain English.

Sources (GitHub repositories) by licence:

{licences}

OpenStax: attribution OpenStax, Rice University, <https://openstax.org>, at revisions licensed CC BY 4.0. Standard
Ebooks: the underlying works are in the public domain in the United States.

## Samples

Unedited; the prompt is in bold.

{samples}

## Limits

- English only, from mostly old fiction, children's stories and textbooks; the names, manners and prejudices of those
  texts come along. No filtering for harmful content was done beyond dropping paragraphs with slurs.
- Facts, arithmetic and instructions are far beyond this size. Longer text loses its thread or repeats.
- The story sample is generated text from the TinyStories training set, so the second held-out figure says little about
  other English.

## Licence

The weights and tokenizer files are under Apache-2.0. The training data keep their own licences, listed above; some of
them are share-alike (CC BY-SA 4.0, CDLA-Sharing 1.0). No training text is included here.
"""
NOTICE = (
    "\n**Unfinished:** these are interim weights from a run still under way ({done:.0f} of {planned:.0f} minutes).\n"
)
MUON = "Muon for the layers' matrices (rate {lr:g}), AdamW for the embedding and the norms."
ADAMW = "AdamW (rate {lr:g})."
HELDOUT_NAMES = {"corpus": "corpus, 1% of documents", "stories": "TinyStories sample"}


def table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def curve(history: list[dict[str, float]]) -> str:
    """About ten rows of the validation history, the last one included."""
    picked = history[:: max(1, len(history) // 10)]
    rows = picked if picked[-1] is history[-1] else [*picked, history[-1]]
    lines = [
        [f"{r['minutes']:.0f}", f"{r['step']}", f"{r['train']:.3f}", f"{r['corpus']:.3f}", f"{r['stories']:.3f}"]
        for r in rows
    ]
    head = (
        "During the run, nats per token on the first 24 windows of each held-out file. They are windows of 1024 "
        "throughout, so\nwhile the model trains on windows of 256 most of each lies beyond the positions it knows.\n\n"
    )
    return head + "| minutes | step | training | corpus | stories |\n|---|---|---|---|---|\n" + table(lines)


def mixture(groups: list[dict[str, Any]]) -> str:
    whole = sum(g["stream_bytes"] for g in groups)
    rows = []
    for g in groups:
        size, share = f"{g['bytes'] / 1e6:.1f}", f"{g['stream_bytes'] / whole:.0%}"
        rows.append([g["group"], str(g["documents"]), size, f"{g['weight']:g}", share])
    return table(rows)


def licences(groups: list[dict[str, Any]]) -> str:
    by_licence: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        for source, licence in group["sources"]:
            by_licence[licence].add(source)
    return "\n".join(f"- **{name}**: {', '.join(sorted(found))}" for name, found in sorted(by_licence.items()))


def heldout(results: dict[str, dict[str, float]]) -> str:
    return table(
        [
            [
                HELDOUT_NAMES[name],
                str(r["documents"]),
                str(r["bytes"]),
                str(r["tokens"]),
                f"{r['nats_per_token']:.3f}",
                f"{r['bits_per_byte']:.3f}",
            ]
            for name, r in results.items()
        ]
    )


def samples(rows: list[dict[str, str]]) -> str:
    def quoted(row: dict[str, str]) -> str:
        lines = "\n".join(f"> {line}  " for line in row["text"].splitlines())
        bold = "  \n> ".join(f"**{line}**" for line in row["prompt"].splitlines())
        return f"{row['how'].capitalize()}:\n\n> {bold}{lines[2:] if lines else ''}"

    return "\n\n".join(map(quoted, rows))


def card(run: dict[str, Any], data: dict[str, Any], config: PretrainedConfig) -> str:
    settings, minutes = run["settings"], run["seconds"] / 60
    notice = "" if run["complete"] else NOTICE.format(done=minutes, planned=settings["minutes"])
    return CARD.format(
        millions=run["parameters"] / 1e6,
        notice=notice,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        kv_heads=config.num_key_value_heads,
        ffn=config.intermediate_size,
        context=config.max_position_embeddings,
        vocab=config.vocab_size,
        steps=run["step"],
        tokens=run["tokens"] / 1e6,
        passes=run["tokens"] / data["stream_tokens"],
        minutes=minutes,
        optimizer=(MUON if settings["optimizer"] == "muon" else ADAMW).format(lr=settings["lr"]),
        short=settings["short"],
        step_tokens=settings["step_tokens"],
        heldout=heldout(run["heldout"]),
        curve=curve(run["history"]),
        mixture=mixture(data["mixture"]),
        licences=licences(data["mixture"]),
        samples=samples(run["samples"]),
        **run["machine"],
    )
