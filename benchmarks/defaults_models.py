"""A small T5 trained from scratch for the sweep of the defaults: minutes on one core.

It reads children's stories and the texts of the sweep's own training rows (E2E references, SST-2 phrases; no labels, no
meaning representations), in 2,000 word pieces that are learned from the same text, and writes missing spans
(1910.10683, section 3.1.4). It is kept in build/defaults/ and made again when that is gone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT, assets
from defaults_data import texts_to_read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PLACE = ROOT / "build" / "defaults"
VOCABULARY, WIDTH, LAYERS, HEADS, ROW = 2000, 96, 2, 4, 64
SENTINELS = 12
STEPS, BATCH, RATE, WARMUP = 500, 16, 3e-3, 50
MASKED, SPAN = 0.15, 3


def tiny_t5() -> Path:
    """The folder of the model, trained first if it is not there."""
    folder = PLACE / "tiny-t5"
    if not (folder / "model.safetensors").is_file():
        _train(folder)
    return folder


def _train(folder: Path) -> None:
    texts = texts_to_read()
    tokenizer = _t5_tokenizer(texts)
    torch.manual_seed(0)
    model = _t5(tokenizer)
    batches = _corrupted(_rows(texts, tokenizer), tokenizer, random.Random(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    begun, recent = time.perf_counter(), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], float(loss.detach())]
        if (step + 1) % 50 == 0:
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}, loss {mean:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)


def _t5(tokenizer: Any) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            decoder_start_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportCallIssue]
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=3 * WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _t5_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(single="$A </s>", pair=None, special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=192
    )


def _rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The texts behind each other, cut into rows of `ROW` tokens, shuffled."""
    ids = [token for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in row]  # pyright: ignore
    rows = [ids[start : start + ROW] for start in range(0, len(ids) - ROW, ROW)]
    random.Random(0).shuffle(rows)
    return rows


def _forever(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    place = 0
    while True:
        yield [rows[(place + number) % len(rows)] for number in range(BATCH)]
        place += BATCH


def _corrupted(rows: Sequence[list[int]], tokenizer: Any, chance: random.Random) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for a T5: spans of 3 tokens, 15 % of the row, replaced by sentinels and to be written behind them."""
    end = tokenizer.eos_token_id
    marks = [tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(SENTINELS)]
    spans = round(MASKED * ROW / SPAN)
    gap = ROW // spans
    for picked in _forever(rows):
        sources, targets = [], []
        for row in picked:
            source, target, place = [], [], 0
            for number in range(spans):  # one span somewhere in each stretch of the row, so that all rows are as long
                start = number * gap + chance.randrange(1, gap - SPAN)
                source += [*row[place:start], marks[number]]
                target += [marks[number], *row[start : start + SPAN]]
                place = start + SPAN
            sources.append([*source, *row[place:], end])
            targets.append([*target, marks[spans], end])
        yield {"input_ids": torch.tensor(sources), "labels": torch.tensor(targets)}


if __name__ == "__main__":
    assets()
    torch.set_num_threads(1)
    print(tiny_t5())
