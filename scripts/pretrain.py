"""Pretrain the small language model that ships inside the package, on a CPU.

Three steps, each restartable on its own:

    python scripts/pretrain.py prepare --corpus CORPUS --stories STORIES --work WORK
    python scripts/pretrain.py train   --work WORK --minutes 90
    python scripts/pretrain.py export  --work WORK --out softprompt/embedded

CORPUS holds train-*.jsonl.gz and heldout.jsonl.gz, STORIES holds train.jsonl and heldout.jsonl; each line is an
object with "text" and, where known, "source" and "licence". WORK receives the tokenizer, the token files and the
checkpoint. ``train`` continues from WORK/checkpoint.pt when there is one, and its learning rate follows the clock
rather than a step count, so a busy machine shortens the run instead of leaving it unfinished.

A large allocator threshold saves page faults:
    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_WAIT_POLICY=passive
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_data import BOS_ID, prepare
from pretrain_export import export
from pretrain_model import CONTEXT, LinearCrossEntropy, heldout_loss, model_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

SHORT_CONTEXT = 256  # the first part of the run: more tokens per second, and most of what is learnt is local
MICRO_TOKENS = 4096  # what one forward and backward pass holds; small enough to stay near the caches
WARMUP_STEPS = 60
GOLDEN = (math.sqrt(5) - 1) / 2


class Windows:
    """Training windows from the token file, addressed by a running number so that a resumed run needs no state.

    Multiples of the golden ratio spread the windows evenly over the file at any length of run and any window size.
    Each window is moved forward to the next start of a paragraph and given <|bos|> in front, because that is how the
    model is used: text that starts at a beginning, with <|bos|> at position 0.
    """

    def __init__(self, work: Path) -> None:
        self.tokens = np.memmap(work / "train.bin", dtype=np.uint16, mode="r")
        self.starts = np.load(work / "starts.npy")
        self.starts = self.starts[self.starts < len(self.tokens) - CONTEXT - 1]

    def batch(self, first: int, count: int, length: int) -> Tensor:
        positions = (np.arange(first, first + count) * GOLDEN % 1.0) * int(self.starts[-1])
        begins = self.starts[np.searchsorted(self.starts, positions)]
        rows = np.empty((count, length + 1), dtype=np.int64)
        rows[:, 0] = BOS_ID
        for row, begin in zip(rows, begins, strict=True):
            begin += self.tokens[begin] == BOS_ID  # a document brings its own
            row[1:] = self.tokens[begin : begin + length]
        return torch.from_numpy(rows)


def optimizers(model: LlamaForCausalLM, kind: str, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for the rest, or AdamW for everything."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in layers)]
    adam = {"betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    if kind == "adamw":
        groups = [{"params": layers, "weight_decay": 0.1}, {"params": rest}]
        return [torch.optim.AdamW(groups, lr=learning_rate, **adam)]
    muon = torch.optim.Muon(layers, lr=learning_rate, momentum=0.95, weight_decay=0.02)
    return [muon, torch.optim.AdamW(rest, lr=4e-3, **adam)]


def rate(step: int, progress: float) -> float:
    """Warm up by steps, hold, then fall linearly over the last quarter of the time."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.01, (1.0 - progress) / 0.25))


def cpu_name() -> str:
    """The processor's own name where the system tells it, for the model card."""
    facts = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", facts.read_text()) if facts.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)  # a killed run leaves the previous checkpoint whole


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.path = args, args.work / args.checkpoint
        self.model = LlamaForCausalLM(model_config())
        self.optimizers = optimizers(self.model, args.optimizer, args.lr)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        self.windows = Windows(args.work)
        self.step, self.tokens, self.sample, self.spent = 0, 0, 0, 0.0
        self.history: list[dict[str, float]] = []
        if self.path.exists():
            self.load()
        self.body = self.model.model
        if args.compile:
            self.body = torch.compile(self.model.model, dynamic=False)

    def load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.sample = state["step"], state["tokens"], state["sample"]
        self.spent, self.history = state["seconds"], state["history"]

    def save(self, seconds: float) -> None:
        save(
            self.path,
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "tokens": self.tokens,
                "sample": self.sample,
                "seconds": seconds,
                "history": self.history,
                "settings": {k: v for k, v in vars(self.args).items() if not isinstance(v, Path)},
                "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
            },
        )

    def update(self, progress: float) -> float:
        """One optimiser step; returns its training loss."""
        length = SHORT_CONTEXT if progress < self.args.short else CONTEXT
        micro, parts, loss_sum = MICRO_TOKENS // length, self.args.step_tokens // MICRO_TOKENS, 0.0
        for _ in range(parts):
            rows = self.windows.batch(self.sample, micro, length)
            self.sample += micro
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.body(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            flat = hidden.float().flatten(0, 1)
            loss = LinearCrossEntropy.apply(flat, self.model.lm_head.weight, rows[:, 1:].flatten())
            (loss / parts).backward()
            loss_sum += loss.item() / parts
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = rate(self.step, progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            optimizer.step()
            optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + self.args.step_tokens
        return loss_sum

    def validate(self, seconds: float, train_loss: float) -> None:
        row = {"minutes": round(seconds / 60, 2), "step": self.step, "tokens": self.tokens, "train": train_loss}
        for name in ("corpus", "stories"):
            total, count = heldout_loss(self.model, self.args.work / f"{name}.bin", windows=24)
            row[name] = total / count
        self.history.append(row)
        print("heldout", json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)

    def run(self) -> None:
        begun, budget = time.monotonic() - self.spent, self.args.minutes * 60.0
        next_check, average = self.spent + self.args.every, math.nan
        while (seconds := time.monotonic() - begun) < budget:
            loss = self.update(seconds / budget)
            average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
            if self.step % 20 == 0:
                print(
                    f"{seconds / 60:6.1f} min  step {self.step}  tokens {self.tokens}  loss {average:.4f}", flush=True
                )
            if seconds > next_check:
                self.validate(seconds, average)
                self.save(seconds)
                next_check = seconds + self.args.every
        self.validate(seconds, average)
        self.save(seconds)
        print("finished", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("prepare", help="train the tokenizer and write the token files")
    data.add_argument("--corpus", type=Path, required=True)
    data.add_argument("--stories", type=Path, required=True)
    train = commands.add_parser("train", help="train, or continue training, for a time budget")
    train.add_argument("--minutes", type=float, default=90.0)
    train.add_argument("--short", type=float, default=0.6, help="share of the time spent on short windows")
    train.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    train.add_argument("--lr", type=float, default=0.015, help="peak rate of the layers' matrices")
    train.add_argument("--step-tokens", type=int, default=8192, help="tokens per optimiser step")
    train.add_argument("--every", type=float, default=240.0, help="seconds between validations and checkpoints")
    train.add_argument("--checkpoint", default="checkpoint.pt")
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train.add_argument("--seed", type=int, default=0)
    export = commands.add_parser("export", help="write the model folder from the latest checkpoint")
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--checkpoint", default="checkpoint.pt")
    for command in (data, train, export):
        command.add_argument("--work", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.command == "prepare":
        prepare(args.corpus, args.stories, args.work)
    elif args.command == "train":
        Trainer(args).run()
    else:
        export(args.work, args.work / args.checkpoint, args.out)


if __name__ == "__main__":
    main()
