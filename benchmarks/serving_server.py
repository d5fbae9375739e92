"""A server in a process of its own: started, asked for its counters and its memory, killed and started again."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from common import ROOT

START = 300.0  # seconds until a server must answer: vLLM takes a minute on a slow machine
VLLM_CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


class Server:
    """A command that serves HTTP on `port`; what it prints goes to `log`."""

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None):
        self.command, self.port, self.log = list(command), port, log
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.environment |= environment or {}
        self.address = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it answers. RuntimeError with the end of its log if it ends instead."""
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process is None or self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.address}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.1)
        lines = self.log.read_text(errors="replace").splitlines()[-20:]
        self.kill()
        raise RuntimeError("the server did not start: " + " | ".join(lines))

    def kill(self) -> None:
        """At once, with all of its processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.address + path, timeout=30, trust_env=False).raise_for_status()

    def metrics(self) -> dict[str, float]:
        """The sum over labels of every number in /metrics."""
        return read_metrics(self.get("/metrics").text)

    def resident(self) -> int:
        """Bytes of memory of the process and of those it started, those they share counted once each (RSS)."""
        assert self.process is not None
        return sum(_resident(pid) for pid in family(self.process.pid))

    def worked(self) -> float:
        """Seconds that processors have spent on it; unlike time, whatever else runs on the machine."""
        assert self.process is not None
        ticks = sum(_ticks(pid) for pid in family(self.process.pid))
        return ticks / os.sysconf("SC_CLK_TCK")


class Memory:
    """Looks at the memory of a server while the block runs."""

    def __init__(self, server: Any, every: float = 0.25) -> None:
        self.server, self.every = server, every
        self._seen: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(self.every):
            self._seen.append(self.server.resident())

    def found(self) -> dict[str, float]:
        fifth = len(self._seen) // 5
        if not fifth:
            return {}
        early, late = self._seen[fifth : 2 * fifth], self._seen[-fifth:]
        return {"resident": max(self._seen), "growth": statistics.median(late) - statistics.median(early)}


def read_metrics(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def family(pid: int) -> Iterator[int]:
    """A process and those that it, or they, started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        children = task / "children"
        for child in children.read_text().split() if children.exists() else ():
            yield from family(int(child))


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def _ticks(pid: int) -> int:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # in user code, in the system
    return 0


def softprompt_server(
    base: Path, prompts: Path, folder: Path, engine: str, more: Sequence[str] = (), of_vllm: Sequence[str] = ()
) -> Server:
    """`softprompt serve`; copies of prompts and its log are kept in `folder`. `of_vllm`: flags of `vllm serve`."""
    port = free_port()
    command = [sys.executable, "-m", "softprompt.cli", "serve", str(base), "--prompts", str(prompts)]
    command += ["--engine", engine, "--port", str(port), "--name", "base", "--objects", str(folder / "objects"), *more]
    if of_vllm:
        command += ["--", *of_vllm]
    return Server(command, port, folder / f"{engine}.log", VLLM_CPU if engine == "vllm" else None)


def vllm_server(base: Path, folder: Path, flags: Sequence[str] = ()) -> Server:
    """vLLM as it is, without anything of ours."""
    port = free_port()
    main = "vllm.entrypoints.launchers.api_server.entry"  # the build for CPUs has no `vllm serve`
    command = [sys.executable, "-m", main, "--model", str(base), "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    return Server(command, port, folder / "bare.log", {**VLLM_CPU, "VLLM_PLUGINS": ""})
