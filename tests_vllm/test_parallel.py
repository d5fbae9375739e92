"""Two processes with half of the heads each answer the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kit
import pytest
from kit import Answer, assert_same


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tensor_parallel(family: str, tmp_path: Path) -> None:
    rows = [(name, ids) for name in (None, "prefix_tuning", "p_tuning") for ids in kit.texts(2, (9, 40))]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps(rows))
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, family, str(tmp_path), str(asked)], env=environment, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "prompts"
    engine = kit.Engine(None, None, kit.build(family), folder)  # type: ignore[arg-type]
    for (name, ids), (tokens, top) in zip(rows, json.loads((tmp_path / "answers.json").read_text()), strict=True):
        found = Answer(tokens, [{int(token): score for token, score in place.items()} for place in top])
        assert_same(found, engine.expect(name, ids))


def main(family: str, folder: Path, asked: Path) -> None:
    rows = [(name, ids) for name, ids in json.loads(asked.read_text())]
    with kit.engine(family, folder, tensor_parallel_size=2) as engine:
        answers = engine.ask(rows)
        (folder / "answers.json").write_text(json.dumps([(answer.ids, answer.top) for answer in answers]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
