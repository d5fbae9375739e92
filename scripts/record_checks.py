"""Write docs/checking.md: `softprompt check` as it is printed, on three models.

    python scripts/record_checks.py

The models: the one in the package; DiffLlama, tiny and random, whose attention has something of its own beside
transformers' interface; T5, tiny and random.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402

PATH = ROOT / "docs" / "checking.md"
HEAD = """# Is it right on my model?

Written by `python scripts/record_checks.py` from real runs; not to be edited by hand.

A prompt of *real tokens* must do what these tokens do in the row. When a base model is wrapped for the first time (per
class, config, number type, attention backend, and versions of torch and transformers), the library compares the two:
rows without padding and padded on either side, one token later with a cache, and past the sliding window or the chunk
if the model has one of up to 64 tokens. That takes two short calls of the model beside the one that finds its facts,
three before a prompt of vectors. What differs

- goes another way in, if that one is equal: keys and values through the cache that layers read instead of transformers'
  attention interface, vectors in the rows instead of folded into keys and values;
- else is refused with an `UnsupportedError` that says what differs by how much, with which versions.

No list of families decides what is trusted. `get_peft_model(…, verify=False)` and `from_pretrained(…, verify=False)`
leave the comparison out. Hybrids keep a state that is not among keys and values, so a prefix there is compared with
itself: rows with padding and a cache with the same rows without.

`softprompt check MODEL [--method NAME] [--json]` prints all of it, for windows and chunks of up to 4,096 tokens; in
Python it is `softprompt.check(model)`. It ends with exit status 1 where something differs and would be used. Put its
output into a bug report.

"""


def cost() -> str:
    """From what benchmarks/canary.py measured."""
    found = json.loads((ROOT / "benchmarks" / "results" / "canary.json").read_text(encoding="utf-8"))
    lines = [
        "## What it costs",
        "",
        "Loading a model, a prompt of 20 virtual tokens and `generate` of 64 tokens behind a row of 32, each time in a",
        "new process, medians of the processor's seconds, imports left out; `python benchmarks/canary.py`. Tokens are",
        "those that the model sees while the prompt is put there.",
        "",
        "| model | method | all, seconds | putting the prompt there, with and without | more, of all | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        place = " and ".join(f"{each:.3f}" for each in row["place_s"])
        whole, tokens = f"{row['whole_s'][1]:.2f}", " and ".join(map(str, row["tokens"]))
        cells = [row["model"], row["method"], whole, place, f"{row['share']:.1%}", tokens]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(name: str, path: str) -> str:
    command = [sys.executable, "-m", "softprompt.cli", "check", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return f"```console\n$ softprompt check {name}\n{done.stdout.strip()}\n```\n"


def main() -> None:
    torch.manual_seed(0)
    diff = hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**{**tiny.GQA, "vocab_size": 99}))
    t5 = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    text = HEAD + "## The model in the package\n\n" + run("embedded", "embedded")
    with tempfile.TemporaryDirectory() as folder:
        for title, name, model in (
            ("A decoder with attention of its own beside the interface", "diffllama-tiny", diff),
            ("An encoder-decoder", "t5-tiny", t5),
        ):
            path = Path(folder) / name
            model.save_pretrained(path)
            text += f"\n## {title}\n\n{run(name, str(path))}"
    text += "\n" + cost()
    temporary = PATH.with_name(".checking.md.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, PATH)


if __name__ == "__main__":
    main()
