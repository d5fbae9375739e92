"""DeepSpeed ZeRO-3 through transformers' Trainer: two processes train what one trains without it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# Runs the example, and says how much of the frozen weights this process holds.
SCRIPT = """
import sys
from transformers import Trainer
import zero3

class Counting(Trainer):
    def train(self):
        super().train()
        parts = [p for p in self.model.parameters() if not p.requires_grad]
        whole = sum(p.ds_numel for p in parts)
        held = sum(p.numel() if p.numel() == p.ds_numel else p.ds_tensor.numel() for p in parts)
        prompt = next(p for p in self.model.parameters() if p.requires_grad)
        print("holds", held / whole, prompt.numel() == prompt.ds_numel, flush=True)

zero3.Trainer = Counting
zero3.main(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = root / "examples" / "scaling"
    (tmp_path / "run.py").write_text(SCRIPT)
    paths = os.pathsep.join(map(str, (root, place)))
    settings = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shared = subprocess.run(
        [*launch, "run.py", "shared"], env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert shared.returncode == 0, shared.stderr
    held = [line.split()[1:] for line in shared.stdout.splitlines() if line.startswith("holds")]
    assert len(held) == 2
    assert all(float(share) < 0.55 and whole == "True" for share, whole in held)

    monkeypatch.syspath_prepend(str(place))
    example: Any = __import__("zero3")
    example.main(str(tmp_path / "alone"), None)
    one, two = (losses(tmp_path / name) for name in ("alone", "shared"))
    assert two == pytest.approx(one, abs=2e-3)  # the log rounds
    prompts = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "shared")]
    torch.testing.assert_close(prompts[1], prompts[0], rtol=1e-3, atol=1e-4)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [float(row["loss"]) for row in history if "loss" in row]
