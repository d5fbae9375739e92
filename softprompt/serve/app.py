"""OpenAI's API over an engine of ours: `create_app` for any server of ASGI apps, `run` for `softprompt serve`."""

import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

import softprompt
from softprompt.errors import ConfigError
from softprompt.serve.access import Access, Keys, may_see
from softprompt.serve.admin import admin_router
from softprompt.serve.answers import Service
from softprompt.serve.changes import UnknownPromptError
from softprompt.serve.chat import chat
from softprompt.serve.completions import complete
from softprompt.serve.engine import Engine
from softprompt.serve.errors import RequestError, add_handlers, json_response, unknown_model
from softprompt.serve.library import PromptLibrary
from softprompt.serve.limits import BodyLimit, Gate
from softprompt.serve.logs import LOGGER, Observed, log_settings
from softprompt.serve.metrics import Metrics
from softprompt.serve.options import ServeOptions
from softprompt.serve.page import page_router
from softprompt.serve.responses import respond
from softprompt.serve.text import TextCoder
from softprompt.serve.version import Version

STOPPING = 30  # seconds that answers under way have to end when the server is to stop
KEEP_ALIVE = 75  # seconds; longer than the 60 of common balancers, which then are the ones to close a connection


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def create_app(engine: Engine, library: PromptLibrary, options: ServeOptions) -> FastAPI:
    """The app; it starts and stops `engine`, and leaves scanning and watching `library` to the caller.

    ConfigError for a file of API keys that cannot be read.
    """
    name = options.name or options.base
    service = Service(
        engine=engine,
        library=library,
        options=options,
        name=name,
        text=TextCoder(engine.tokenizer),
        gate=Gate(options.max_batch, options.max_waiting, lambda: engine.counts()["waiting"]),
        metrics=Metrics(lambda: {**engine.counts(), "prompts": len(library.names())}),
        started=int(time.time()),
    )
    failures: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    app = FastAPI(
        title="softprompt",
        version=softprompt.__version__,
        docs_url=None,
        redoc_url=None,  # both load scripts from elsewhere
        lifespan=_lifespan,
        responses=failures,
    )
    app.state.service = service
    add_handlers(app)
    _add_routes(app)
    app.include_router(admin_router(library, options.admin_key, may_see))
    app.include_router(page_router())
    if options.keys is not None:  # what is added last is outermost
        app.add_middleware(Access, keys=Keys(options.keys), admin_key=options.admin_key, base=name)
    app.add_middleware(BodyLimit, most=options.max_body, seconds=options.timeout)
    app.add_middleware(Observed, count=service.metrics.count)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    await service.engine.start()
    try:
        yield
    finally:
        await service.engine.stop()
        service.text.close()


def _add_routes(app: FastAPI) -> None:
    app.post("/v1/completions")(complete)
    app.post("/v1/chat/completions")(chat)
    app.post("/v1/responses")(respond)
    app.get("/v1/models")(_models)
    app.get("/v1/models/{name:path}")(_model)
    app.get("/health")(_health)
    app.get("/metrics")(_metrics)


async def _models(request: Request) -> Response:
    """What requests may call: the base model, and the prompts."""
    service: Service = request.app.state.service
    data = [_described(service, None)]
    for name in service.library.names():
        with suppress(UnknownPromptError):  # removed since
            data.append(_described(service, service.library.get(name)))
    return json_response({"object": "list", "data": [model for model in data if may_see(request, model["id"])]})


async def _model(name: str, request: Request) -> Response:
    """One of them."""
    service: Service = request.app.state.service
    if not may_see(request, name):
        raise unknown_model(name)
    with service.use(name) as version:
        return json_response(_described(service, version))


def _described(service: Service, version: Version | None) -> dict[str, Any]:
    """As OpenAI's and, for `root`, `parent` and `max_model_len`, vLLM's; what is ours stands apart."""
    described = {
        "id": version.name if version else service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "softprompt",
        "root": service.name,
        "parent": service.name if version else None,
        "max_model_len": service.most,
    }
    if version:
        described["prompt"] = {
            "method": version.method,
            "virtual_tokens": version.length,
            "digest": version.digest,
            "in_template": version.slots,
        }
    return described


async def _health(request: Request) -> Response:
    """Whether this server can answer, for balancers."""
    service: Service = request.app.state.service
    wrong = service.engine.health()
    if wrong is not None:
        raise RequestError(503, wrong, code="unhealthy")
    return json_response({"status": "ok"})


async def _metrics(request: Request) -> Response:
    """For Prometheus."""
    service: Service = request.app.state.service
    return service.metrics.response()


@contextmanager
def open_app(options: ServeOptions) -> Iterator[FastAPI]:
    """The app that options describe, its base model and prompts loaded and watched, inside the block.

    Raises SoftPromptError for what is wrong with them.
    """
    from softprompt.serve.base import LentBase, fingerprint_of
    from softprompt.serve.batching import TransformersEngine
    from softprompt.serve.watch import open_library

    options = options.resolved()
    assert options.name is not None
    engine = TransformersEngine.of(options)
    path = options.base
    base = LentBase(engine.way, engine.facts, engine.tokenizer, path, options.name, fingerprint_of(path))
    with open_library(options, base) as library:
        yield create_app(engine, library, options)


def run(options: ServeOptions) -> None:
    """Load and serve until SIGINT or SIGTERM; then answers under way have some time to end.

    Raises SoftPromptError for what is wrong with the options, a port that is taken among it.
    """
    import logging.config

    import uvicorn

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # so that what is temporary is cleaned up
    with _bound(options.host, options.port) as bound, suppress(KeyboardInterrupt):
        logging.config.dictConfig(log_settings())
        logging.captureWarnings(True)
        with open_app(options) as app:
            config = uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=STOPPING,
                timeout_keep_alive=KEEP_ALIVE,
            )
            service: Service = app.state.service
            told = service.name, len(service.library.names()), *bound.getsockname()[:2]
            LOGGER.info("serving %s and %d prompts at http://%s:%d", *told)
            uvicorn.Server(config).run([bound])


def _bound(host: str, port: int) -> socket.socket:
    """A socket for the server, which nobody can reach before it listens. ConfigError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}); choose another port.") from error
    return bound
