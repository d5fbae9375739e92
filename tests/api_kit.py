"""The server's API on a free port, over the embedded model and prompts of it, and what the same prompts say offline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model
from softprompt.cli.prompted import example_of
from softprompt.embedded import PATH
from softprompt.evaluate import generate_texts
from softprompt.serve import ServeOptions
from softprompt.serve.answers import Service
from softprompt.serve.app import open_app
from softprompt.template import Template

BASE = "base"
LENGTHS = {"kv": 6, "words": 4, "team/guest": 3, "filled": 3}
TEMPLATE = "[P] {card} [P*2] => {text}"
CARD = "name: Tom | kind: cat"
TEXT = "It was"


@dataclass(frozen=True)
class Prompts:
    """Saved prompts in `folder`, and the model they were saved from."""

    folder: Path
    model: SoftPromptModel
    tokenizer: Any

    def ids(self, text: str = TEXT) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def offline(self, name: str, text: str = TEXT, tokens: int = 8) -> str:
        """What `generate` says greedily, with this prompt alone."""
        ids = torch.tensor([self.ids(text)])
        options = {"do_sample": False, "max_new_tokens": tokens, "attention_mask": torch.ones_like(ids)}
        if name == BASE:
            with self.model.disable_adapter():
                output = self.model.generate(input_ids=ids, **options)
        else:
            self.model.set_adapter(name.replace("/", "-"), inference_mode=True)
            output = self.model.generate(input_ids=ids, **options)
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    def offline_filled(self, card: str, tokens: int = 8) -> str:
        """The same for the prompt that stands in a template, as `softprompt generate` does it."""
        self.model.set_adapter("filled", inference_mode=True)
        example = example_of(card, Template(TEMPLATE))
        assert example.pieces
        (text,) = generate_texts(self.model, self.tokenizer, [example], tokens, 1)
        return text

    @torch.no_grad()
    def scores(self, name: str, text: str, answer: str) -> Tensor:
        """Log-probabilities `[tokens, V]` at the places of the answer's tokens."""
        self.model.set_adapter(name, inference_mode=True)
        own = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        logits = self.model(input_ids=torch.tensor([[*self.ids(text), *own]])).logits[0]
        return logits.log_softmax(-1)[-len(own) - 1 : -1]


def write_prompts(folder: Path) -> Prompts:
    """Prompts strong enough to change every answer."""
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    found = {
        "kv": PrefixTuningConfig(num_virtual_tokens=LENGTHS["kv"], **shared),
        "words": PromptTuningConfig(num_virtual_tokens=LENGTHS["words"], **shared),
        "team-guest": PromptTuningConfig(num_virtual_tokens=LENGTHS["team/guest"], **shared),
        "filled": PromptTuningConfig(num_virtual_tokens=LENGTHS["filled"], template=TEMPLATE, **shared),
    }
    torch.manual_seed(4)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(PATH), found["kv"], "kv")
    for name, config in found.items():
        if name != "kv":
            model.add_adapter(name, config)
    for parameter in model.prompt_encoder.parameters():
        parameter.data += torch.randn_like(parameter)
    model.eval().save_pretrained(folder, selected_adapters=list(found))
    (folder / "team").mkdir()
    (folder / "team-guest").rename(folder / "team" / "guest")
    return Prompts(folder, model, AutoTokenizer.from_pretrained(PATH))


@dataclass(frozen=True)
class Api:
    """A server at `address`, and a client for what OpenAI's does not send."""

    address: str
    app: FastAPI
    http: httpx.Client

    @property
    def service(self) -> Service:
        return self.app.state.service

    @contextmanager
    def client(self, key: str = "nobody", strict: bool = True) -> Iterator[OpenAI]:
        """OpenAI's own, which asks once; `strict`: it checks answers against OpenAI's types.

        In streams of completions `finish_reason` is null at first, which OpenAI sends and its types do not know.
        """
        options: dict[str, Any] = {"max_retries": 0, "timeout": 60, "_strict_response_validation": strict}
        with OpenAI(base_url=f"{self.address}/v1", api_key=key, **options) as client:
            yield client

    def post(self, path: str, body: Any = None, key: str | None = None, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        more = {"json": body, **more} if body is not None else more
        return self.http.post(path, headers={**headers, **more.pop("headers", {})}, **more)

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return self.http.get(path, headers={"Authorization": f"Bearer {key}"} if key else {})

    def idle(self) -> None:
        """Wait until nothing is under way; fails if it never is."""
        end = time.monotonic() + 30
        while self.service.gate.inside or self.service.engine.counts()["running"]:
            assert time.monotonic() < end, "an answer goes on though nobody waits for it"
            time.sleep(0.01)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address of a real server of an ASGI app, in a thread."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Api]:
    """A server of the embedded model and the prompts in `folder`."""
    settings = {"engine": "transformers", "name": BASE, "watch_seconds": 0, "timeout": 60, **options}
    with ExitStack() as stack:
        app = stack.enter_context(open_app(ServeOptions(str(PATH), folder, **settings)))
        address = stack.enter_context(listening(app))
        yield Api(address, app, stack.enter_context(httpx.Client(base_url=address, timeout=60, verify=False)))


def complete(client: OpenAI, model: str = "kv", prompt: Any = TEXT, tokens: int = 8, **more: Any) -> Any:
    """A greedy completion."""
    return client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, **more)
