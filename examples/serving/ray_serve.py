"""Replicas of `softprompt serve` under Ray Serve, which places, watches and scales them:

    serve run ray_serve:app base=meta-llama/Llama-3.1-8B-Instruct prompts=/mnt/prompts replicas=4 gpus=1

Each replica starts a server as a process of its own and hands requests through to it, and answers as they stream. Ray
Serve's own application for language models is no way: it answers for the models of its configuration, and 404 for the
names of prompts. Needs `ray[serve]` and `httpx` beside softprompt.
"""

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import httpx
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import StreamingResponse

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}
START_SECONDS = 1800


@serve.deployment(max_ongoing_requests=256, health_check_period_s=10, graceful_shutdown_timeout_s=60)
class PromptServer:
    """One server before one base model."""

    def __init__(self, base: str, prompts: str, flags: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["-m", "softprompt.cli", "serve", base, f"--prompts={prompts}", f"--port={port}", *flags]
        self.process = subprocess.Popen([sys.executable, *command])
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.AsyncClient(base_url=self.url, timeout=httpx.Timeout(10, read=None, pool=None))
        try:
            self._wait()
        except BaseException:
            self.process.kill()
            raise

    def _wait(self) -> None:
        """Until the server answers."""
        for _ in range(START_SECONDS):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}; its log has the reason")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(1)
        raise RuntimeError(f"the server did not answer within {START_SECONDS} seconds")

    async def __call__(self, request: Request) -> StreamingResponse:
        asked = self.client.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode()),
            headers=[pair for pair in request.headers.items() if pair[0].lower() not in HOP_BY_HOP],
            content=await request.body(),
        )
        answer = await self.client.send(asked, stream=True)
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        return StreamingResponse(_pieces(answer), answer.status_code, headers)

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        (await self.client.get("/health", timeout=10)).raise_for_status()

    def __del__(self) -> None:
        self.process.terminate()
        self.process.wait()


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The body as it comes; when nobody listens any more, the server is told, and frees the request's place."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def app(arguments: dict[str, str]) -> Application:
    """`base`, `prompts`; `replicas` (1), `gpus` of each (0); `flags`: more flags of `softprompt serve`."""
    replicas, gpus = int(arguments.get("replicas", "1")), float(arguments.get("gpus", "0"))
    deployment = PromptServer.options(num_replicas=replicas, ray_actor_options={"num_gpus": gpus})
    return deployment.bind(arguments["base"], arguments["prompts"], shlex.split(arguments.get("flags", "")))
