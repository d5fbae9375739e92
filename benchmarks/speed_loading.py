"""How long does it take to load many adapters, and what do registered ones cost that nobody has used yet?

    python benchmarks/speed_loading.py

Ours: `softprompt.store.PromptStore` on a folder of adapters, and `load_adapter` of a model; PEFT: `load_adapter`. The
memory of registered adapters is that of a process of its own, before and after it opens the store.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measure import Arm, Makers
from shapes import wrap
from speed import Bench, Column, Group, Options, Table, main

COLUMNS = (
    Column("time ÷ ours", "time", "ms", under="ours"),
    Column("memory", "resident", "MB", under=None),
)
NOTE = (
    "Prompt tuning, p virtual tokens. The row of ours is what it takes, the others are divided by it: median of the "
    "ratios of single rounds, and their range. Files were in the system's cache. Memory: growth of the resident pages "
    "of a new process that opens a store of so many adapters and uses none."
)
REGISTER = """
import gc, json, sys, time
from counts import status
import softprompt.store
import softprompt
gc.collect()
before, begun = status("VmRSS"), time.perf_counter()
store = softprompt.store.PromptStore(sys.argv[1], max_bytes=10**9)
seconds = time.perf_counter() - begun
print(json.dumps({"count": len(store), "seconds": seconds, "resident": (status("VmRSS") or 0) - (before or 0)}))
"""


def groups(options: Options) -> Iterator[Group]:
    shape, dtype = options.shape
    prompt = options.size(100)
    setting = {"model": shape, "dtype": dtype, "device": options.device, "p": prompt}
    used, registered = options.size(200), options.size(10_000)
    yield Group(setting | {"adapters": used}, lambda bench: loading(bench, shape, dtype, prompt, used), quick=True)
    arms = lambda bench: registering(bench, shape, dtype, prompt, registered)  # noqa: E731
    yield Group(setting | {"adapters": registered}, arms, quick=True, rounds=1)


def loading(bench: Bench, shape: str, dtype: str, prompt: int, count: int) -> Makers:
    """Loading every one of `count` adapters once."""
    import peft

    import softprompt

    base = bench.base(shape, dtype)
    folder = adapters(base, prompt, count)
    facts = wrap(softprompt, base, "prompt tuning", prompt).facts
    return {
        "ours": lambda: Arm(lambda: through_store(Path(folder.name), facts)),
        "ours, mapped": lambda: Arm(lambda: through_store(Path(folder.name), facts, mapped=True)),
        "ours, load_adapter": lambda: Arm(lambda: one_by_one(softprompt, base, Path(folder.name))),
        "PEFT": lambda: Arm(lambda: one_by_one(peft, base, Path(folder.name))),
    }


def adapters(base: Any, prompt: int, count: int) -> tempfile.TemporaryDirectory[str]:
    """A folder with `count` saved adapters, each in a folder of its own."""
    import softprompt

    folder = tempfile.TemporaryDirectory()
    first = Path(folder.name) / "adapter0"
    wrap(softprompt, base, "prompt tuning", prompt).save_pretrained(first)
    for number in range(1, count):
        shutil.copytree(first, first.with_name(f"adapter{number}"), copy_function=os.link)
    return folder


def through_store(folder: Path, facts: Any, mapped: bool = False) -> dict[str, float]:
    """Opening the store is counted too."""
    from softprompt.store import PromptStore

    begun = time.perf_counter()
    store = PromptStore(folder, max_bytes=10**9, mapped=mapped)
    good, bad = store.load(store, facts)
    seconds = time.perf_counter() - begun
    assert not bad and len(good) == len(store) > 0
    return {"time": seconds}


def one_by_one(library: Any, base: Any, folder: Path) -> dict[str, float]:
    """`load_adapter` for each; making the model is not counted."""
    places = sorted(folder.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.PeftModel.from_pretrained(base, places[0], adapter_name="first")
        begun = time.perf_counter()
        for number, place in enumerate(places):
            model.load_adapter(place, adapter_name=f"number{number}")
    return {"time": time.perf_counter() - begun}


def registering(bench: Bench, shape: str, dtype: str, prompt: int, count: int) -> Makers:
    """Opening a store of `count` adapters."""
    folder = adapters(bench.base(shape, dtype), prompt, count)

    def open_them() -> dict[str, float]:
        paths = [str(Path(__file__).parent), str(Path(sys.modules["softprompt"].__path__[0]).parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-c", REGISTER, folder.name]
        printed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if printed.returncode:
            raise RuntimeError(printed.stderr.strip().splitlines()[-1])
        found = json.loads(printed.stdout.splitlines()[-1])
        assert found["count"] == count
        return {"time": found["seconds"], "resident": found["resident"]}

    return {"ours": lambda: Arm(open_them, dict)}  # every run is a new process: nothing to warm up


TABLE = Table("speed_loading", __doc__ or "", groups, COLUMNS, NOTE)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
