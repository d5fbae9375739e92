"""What the canary costs: loading a model, a prompt, and a first call, with the comparison and without.

    python benchmarks/canary.py            writes benchmarks/results/canary.json

Two models: the one in the package, loaded from its folder, and a Llama of SmolLM2-135M's shape with random weights. A
first call is `generate` of 64 tokens behind a row of 32. The comparison is made once per process, so each round is a
process of its own with one thread, with and without in turn; seconds are those of the processor, and importing is not
counted. `share` is by how much putting the prompt there takes longer, by all three. (What the comparison runs for the
first time, the first call need not; that is less than what first calls differ by among themselves.) Beside it stand the
tokens that the body of the model sees while the prompt is put there, which do not depend on the machine.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers as hf  # noqa: E402

import softprompt  # noqa: E402
from softprompt.embedded import PATH  # noqa: E402

ROUNDS = {"embedded": 9, "SmolLM2-135M's shape": 5}
NEW_TOKENS = 64  # of a first call, as many as `softprompt generate` writes
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}  # fmt: skip


def one(model: str, prompt: str, verify: bool) -> dict[str, float]:
    """The processor's seconds for loading a model, for a prompt before it and for a first call; calls and tokens while
    it is put there."""
    torch.set_num_threads(1)
    hf.logging.disable_progress_bar()
    seen, times = {"calls": 0, "tokens": 0}, [process_time()]

    def count(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["calls"] += 1
        seen["tokens"] += output[0].shape[0] * output[0].shape[1]

    base = hf.AutoModelForCausalLM.from_pretrained(model).eval()
    times.append(process_time())
    handle = base.base_model.register_forward_hook(count, with_kwargs=True)
    placed = softprompt.PeftModel.from_pretrained(base, prompt, verify=verify)
    handle.remove()
    times.append(process_time())
    placed.generate(torch.arange(20, 52)[None], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    times.append(process_time())
    load, place, call = (after - before for before, after in pairwise(times))
    return {"load": load, "place": place, "call": call, **seen}


def elsewhere(model: str, prompt: str, verify: bool) -> dict[str, float]:
    """`one`, in a process of its own."""
    command = [sys.executable, __file__, model, prompt, str(verify)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout)


def measured(name: str, model: str, method: type, folder: Path) -> dict[str, Any]:
    prompt = str(folder / f"{name}-{method.__name__}")
    config = method(task_type="CAUSAL_LM", num_virtual_tokens=20)
    softprompt.get_peft_model(hf.AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(prompt)
    rounds = [(elsewhere(model, prompt, True), elsewhere(model, prompt, False)) for _ in range(ROUNDS[name])]

    def median(part: str, arm: int) -> float:
        names = ("load", "place", "call") if part == "whole" else (part,)
        return statistics.median(sum(each[arm][name] for name in names) for each in rounds)

    whole = median("whole", 1)
    return {
        "model": name,
        "method": method.__name__,
        "whole_s": [median("whole", 0), whole],
        "place_s": [median("place", 0), median("place", 1)],
        "call_s": [median("call", 0), median("call", 1)],
        "share": (median("place", 0) - median("place", 1)) / whole,
        "calls": [rounds[0][0]["calls"], rounds[0][1]["calls"]],
        "tokens": [rounds[0][0]["tokens"], rounds[0][1]["tokens"]],
    }


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE)).save_pretrained(folder / "shape")
        for title, model in {"embedded": str(PATH), "SmolLM2-135M's shape": str(folder / "shape")}.items():
            for method in (softprompt.PrefixTuningConfig, softprompt.PromptTuningConfig):
                rows.append(measured(title, model, method, folder))
                print(rows[-1], flush=True)
    versions = {"torch": torch.__version__, "transformers": hf.__version__, "python": platform.python_version()}
    result = {"rounds": ROUNDS, "threads": 1, "versions": versions, "rows": rows}
    (ROOT / "benchmarks" / "results" / "canary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(one(sys.argv[1], sys.argv[2], sys.argv[3] == "True")))
    else:
        main()
