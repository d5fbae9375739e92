"""What the canary costs: loading a prompt and a first call, with the comparison and without.

    python benchmarks/canary.py            writes benchmarks/results/canary.json

Two models: the one in the package, loaded from its folder, and a Llama of SmolLM2-135M's shape with random weights. A
first call is `generate` of 20 tokens behind a row of 32. Each is measured in turn, several rounds, in one process; the
share is the canary's time by that of loading the base model, the prompt, and the first call. Beside it, the tokens that
the body of the model sees, which do not depend on the machine.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers as hf  # noqa: E402

import softprompt  # noqa: E402
from softprompt import base_model  # noqa: E402
from softprompt.embedded import PATH  # noqa: E402

ROUNDS = 7
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}  # fmt: skip


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = perf_counter()
    result = call()
    return perf_counter() - begin, result


def one(load: Callable[[], Any], prompt: Path, method: type, verify: bool) -> dict[str, float]:
    """Seconds of loading a model, a prompt before it, and of a first call; calls and tokens while it is put there."""
    base_model._KNOWN.clear()
    loading, base = timed(load)
    seen = {"calls": 0, "tokens": 0}

    def count(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["calls"] += 1
        seen["tokens"] += output[0].shape[0] * output[0].shape[1]

    handle = base.base_model.register_forward_hook(count, with_kwargs=True)
    placing, model = timed(lambda: softprompt.PeftModel.from_pretrained(base, prompt, verify=verify))
    handle.remove()
    ids = torch.arange(20, 52)[None]
    calling, _ = timed(lambda: model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False))
    return {"load": loading, "place": placing, "call": calling, **seen}


def measured(name: str, load: Callable[[], Any], method: type, folder: Path) -> dict[str, Any]:
    prompt = folder / f"{name}-{method.__name__}"
    config = method(task_type="CAUSAL_LM", num_virtual_tokens=20)
    softprompt.get_peft_model(load(), config).save_pretrained(prompt)
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(ROUNDS):
        rounds.append((one(load, prompt, method, True), one(load, prompt, method, False)))
    canary = [with_it["place"] - without["place"] for with_it, without in rounds]
    whole = [without["load"] + without["place"] + without["call"] for _, without in rounds]
    return {
        "model": name,
        "method": method.__name__,
        "canary_s": statistics.median(canary),
        "load_place_call_s": statistics.median(whole),
        "share": statistics.median(part / all_ for part, all_ in zip(canary, whole, strict=True)),
        "calls": [rounds[0][0]["calls"], rounds[0][1]["calls"]],
        "tokens": [rounds[0][0]["tokens"], rounds[0][1]["tokens"]],
    }


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE)).save_pretrained(folder / "shape")
        models = {
            "embedded": lambda: hf.AutoModelForCausalLM.from_pretrained(PATH).eval(),
            "SmolLM2-135M's shape": lambda: hf.AutoModelForCausalLM.from_pretrained(folder / "shape").eval(),
        }
        for title, load in models.items():
            for method in (softprompt.PrefixTuningConfig, softprompt.PromptTuningConfig):
                rows.append(measured(title, load, method, folder))
                print(rows[-1], flush=True)
    versions = {"torch": torch.__version__, "transformers": hf.__version__, "python": platform.python_version()}
    result = {"rounds": ROUNDS, "threads": 1, "versions": versions, "rows": rows}
    (ROOT / "benchmarks" / "results" / "canary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
