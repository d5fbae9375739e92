"""The other process of test_conformance.py: loads saved cells and writes what they compute.

Reads one JSON object per line: the cell and its folder; writes `outputs.safetensors` there and answers ``done``, or
the error in one line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"


def answer(line: str) -> str:
    import conformance
    import families
    from safetensors.torch import save_file

    from softprompt import SoftPromptModel

    request = json.loads(line)
    folder = Path(request.pop("folder"))
    cell = conformance.Cell(**request)
    try:
        model = SoftPromptModel.from_pretrained(families.build(cell.family, cell.task), folder)
        save_file(conformance.flat_outputs(cell, model), folder / "outputs.safetensors")
    except Exception as error:  # whatever it is, the test that asked shows it
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "done"


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(answer(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
