"""A plugin for `vllm serve`: the names of prompts in vLLM's own OpenAI API, and routes to load and unload them.

vLLM finds it by its entry point (`vllm.endpoint_plugins`) where `VLLM_PLUGINS` names it. A prompt's name is registered
as the name of a LoRA adapter would be, so that every API that takes a model's name takes it, and the handlers' engine
client is replaced by `PromptClient`, which knows what it means. Real LoRA adapters go on working beside.
"""

import asyncio
import atexit
import logging
import weakref
from argparse import Namespace
from contextlib import ExitStack
from typing import Any, final

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

from softprompt.serve.access import Access, Keys, may_see
from softprompt.serve.admin import admin_router
from softprompt.serve.base import FolderBase
from softprompt.serve.changes import Changes, UnknownPromptError
from softprompt.serve.library import PromptLibrary
from softprompt.serve.page import page_router
from softprompt.serve.version import Version
from softprompt.serve.vllm.client import PromptClient, PromptModel
from softprompt.serve.vllm.reported import Counter, Reported
from softprompt.serve.vllm.same_model import check_same_model
from softprompt.serve.vllm.settings import Settings
from softprompt.serve.watch import watching

LOGGER = logging.getLogger("vllm.softprompt")
MESSAGE_PARTS = {"text", "thinking", "input", "output", "image", "audio", "video", "prompt", "refusal", "tool"}
"""vLLM takes an adapter of such a name for what goes with messages of such parts, whatever model is asked for."""


@final
class Plugin:
    """What vLLM calls, in this order: `attach_router` while the app is built, `init_state` when the engine runs."""

    name = "softprompt"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """ConfigError, which ends the server before it has begun."""
        settings = Settings.of(app.state.args.kv_transfer_config)
        self._app = app
        app.add_middleware(Reported)
        if settings.keys is not None:
            base = (app.state.args.served_model_name or [app.state.args.model])[0]
            app.add_middleware(Access, keys=Keys(settings.keys), admin_key=settings.admin_key, base=base)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        settings, config = Settings.of(args.kv_transfer_config), engine_client.model_config
        check_same_model(config)
        models = state.openai_serving_models
        base = FolderBase(config.model, models.base_model_paths[0].name, str(config.dtype).removeprefix("torch."))
        alone = args.api_server_count in (None, 1) and args.data_parallel_size == 1
        if settings.admin_key is not None and not alone:
            LOGGER.warning(
                "nobody can load or unload prompts by hand, which would reach one of several API servers; change the "
                "folder, at which each looks every %g seconds, or give --api-server-count 1",
                settings.watch_seconds,
            )
        library = PromptLibrary(settings.prompts, base, settings.objects, folded=True, sole=settings.sole and alone)
        atexit.register(library.close)
        library.subscribe(Names(models, library, asyncio.get_running_loop()).told)
        await asyncio.to_thread(library.scan)
        _put_before(engine_client, PromptClient(engine_client, Counter()), state)
        assert self._app is not None
        self._app.include_router(admin_router(library, settings.admin_key if alone else None, may_see))
        self._app.include_router(page_router())
        watched = ExitStack()
        watched.enter_context(watching(library, settings.watch_seconds))
        atexit.register(watched.close)


def _put_before(engine: Any, client: PromptClient, state: State) -> None:
    """Every handler that generates gets the client; what else vLLM does with its engine stays as it is."""
    other = client.not_filling()
    for handler in vars(state)["_state"].values():
        if getattr(handler, "engine_client", None) is engine:
            handler.engine_client = client if handler is state.openai_serving_completion else other
            if isinstance(handler, BeamSearchOnlineMixin):
                handler.beam_search = handler.engine_client.beams(handler.beam_search)
    decisions = state.serving_structured_decisions
    if decisions is not None:
        decisions.strategy.context.engine_client = other


@final
class Names:
    """Keeps vLLM's table of adapters as the library says; the table belongs to the event loop."""

    def __init__(self, models: Any, library: PromptLibrary, loop: asyncio.AbstractEventLoop) -> None:
        self._models, self._library, self._loop = models, library, loop

    def told(self, changes: Changes) -> None:
        """Called by the library, in any thread."""
        self._loop.call_soon_threadsafe(self._change, changes)

    def _change(self, changes: Changes) -> None:
        table = self._models.lora_requests
        for name in changes.removed:
            if isinstance(table.get(name), PromptModel):
                del table[name]
        for name, version in {**changes.added, **changes.replaced}.items():
            taken = self._taken(name)
            if taken is not None:
                LOGGER.error("the prompt %r is not served: %s", name, taken)
                continue
            try:
                table[name] = self._model(version)
            except UnknownPromptError:
                continue  # replaced once more since: that is told next

    def _taken(self, name: str) -> str | None:
        there = self._models.lora_requests.get(name)
        if self._models.is_base_model(name):
            return "the base model has this name."
        if name in MESSAGE_PARTS:
            return "vLLM takes this name for a part of messages; rename its folder."
        return None if there is None or isinstance(there, PromptModel) else "a LoRA adapter has this name."

    def _model(self, version: Version) -> PromptModel:
        """Its file stays until nobody holds it any more: neither the table nor a request under way."""
        lease = ExitStack()
        lease.enter_context(self._library.lease(version))
        number = self._models.lora_id_counter.inc(1)
        path = f"sha256:{version.digest}"  # clients see it as the model's root
        model = PromptModel(lora_name=version.name, lora_int_id=number, lora_path=path, version=version)
        weakref.finalize(model, lease.close).atexit = False
        return model
