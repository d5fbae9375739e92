"""Requests that mean harm, or nothing: each gets an answer that is no 5xx, no file is touched, others are served."""

import copy
import json
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import requests
import schemathesis
from api_kit import BASE, TEXT, Api, Prompts, complete, serving, write_prompts
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

ADMIN, OTHER = "sk-admin", "somebody else"
NAMES = (
    "../../etc/passwd", "/etc/passwd", "..", ".", "./kv", "kv/../../../etc/passwd", "..\\..\\windows\\win.ini", "kv\0",
    "\0", "kv\n", "%2e%2e%2fetc%2fpasswd", "file:///etc/passwd", "s3://bucket/key", "~root", "kv ", "-rf",
    "team//guest", "team/guest/", "kv:0", "$(id)", "`id`", "{{7*7}}", "'; DROP TABLE prompts; --", "__proto__", "👾",
    "\u202ekv", "\ud800",
    "a" * 129, "a/" * 500, "x" * 1_000_000, "constructor", "CON", "adapter_model.safetensors", "kv/adapter_config.json",
)  # fmt: skip
JUNK = (
    None, True, False, -1, 0, 1 << 70, 10**400, -0.0, 1e308, float("nan"), float("inf"), "", "\0", "\ud800", "é" * 5000,
    "../../etc/passwd", [], {}, [[]], [None], {"$ref": "#/"}, ["a"] * 2000, [[1]] * 500, list(range(3000)),
    "x" * 20_000,
)  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "kv", "prompt": TEXT, "max_tokens": 1, "stop": ["a"], "n": 1, "stream": False,
                        "temperature": 0.5, "seed": 1, "logprobs": 1, "metadata": {"a": "b"}},
    "/v1/chat/completions": {"model": "words", "max_tokens": 1,
                             "messages": [{"role": "user", "content": [{"type": "text", "text": "A"}]}],
                             "stream": True, "stream_options": {"include_usage": True}},
    "/v1/responses": {"model": BASE, "input": [{"role": "user", "content": "A"}], "max_output_tokens": 1,
                      "text": {"format": {"type": "text"}}, "include": []},
    "/v1/prompts/load": {"name": "nobody"},
}  # fmt: skip

touched: list[str] = []
watched = threading.Event()


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if threading.current_thread().name == OTHER:
        return  # OpenAI's client, which looks at what system it is on
    if watched.is_set() and event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove"):
        touched.append(str(arguments[0]))


@contextmanager
def no_file_outside(api: Api) -> Iterator[None]:
    """Fails if a file is touched inside the block that is not the prompts', their copies' or an installed package's."""
    library = api.service.library
    own = (library.folder, library._objects.folder, Path(sys.prefix), Path(sys.base_prefix),
           Path(__file__).parent.parent)  # fmt: skip
    touched.clear()
    watched.set()
    try:
        yield
    finally:
        watched.clear()
    paths = [Path(path).absolute() for path in touched if not path.isdigit()]
    assert not [path for path in paths if ".." in path.parts or not any(path.is_relative_to(each) for each in own)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def api(prompts: Prompts) -> Iterator[Api]:
    """Answers are short, so that a request that happens to be a good one costs little."""
    sys.addaudithook(note)
    with serving(prompts.folder, max_length=40, max_batch=4, max_waiting=4, admin_key=ADMIN) as api:
        yield api


@pytest.fixture(autouse=True)
def _others_are_served(prompts: Prompts, api: Api) -> Iterator[None]:
    """Somebody else asks all the time, and gets the right answer every time."""
    expected, stop, wrong = prompts.offline("kv"), threading.Event(), []

    def ask() -> None:
        with api.client() as client:
            while not stop.wait(0.05):
                if (text := complete(client).choices[0].text) != expected:
                    wrong.append(text)

    other = threading.Thread(target=ask, name=OTHER)
    other.start()
    yield
    stop.set()
    other.join(60)
    assert not other.is_alive() and not wrong
    api.idle()
    assert api.get("/health").status_code == 200


def check(status: int, body: bytes, statuses: tuple[int, ...] = (400, 404, 405, 413, 422, 429)) -> None:
    """An answer, or an error of the right form; never a failure of the server, nor its insides."""
    assert status == 200 or status in statuses, (status, body[:500])
    assert b"Traceback" not in body and b"/site-packages/" not in body
    if status != 200:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
        assert len(body) < 5000


class Raw:
    """One connection that is used as long as the server keeps it."""

    def __init__(self, api: Api) -> None:
        self._place = urlsplit(api.address).netloc
        self._connection = HTTPConnection(self._place, timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        headers = {"Content-Type": kind, "Authorization": f"Bearer {ADMIN}"}
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
        except ConnectionError:  # closed after the last answer, as behind a GET whose body nobody reads: once more
            self.close()
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        self._connection.close()


# ---- names -------------------------------------------------------------------------------------------------------


def test_hostile_names(api: Api) -> None:
    with closing(Raw(api)) as raw, no_file_outside(api):
        for name in NAMES:
            for path, body in BODIES.items():
                field = "name" if path == "/v1/prompts/load" else "model"
                status, answer = raw.ask("POST", path, json.dumps({**body, field: name}).encode())
                check(status, answer, (400, 404, 413, 422))
                assert status != 200, (path, name)
            status, answer = raw.ask("POST", "/v1/prompts/unload", json.dumps({"name": name}).encode())
            check(status, answer, (400, 404, 413, 422))
            if len(name) < 10_000:  # longer than a line of HTTP may be
                address = quote(name.encode("utf-8", "surrogatepass"), safe="")
                for path in (f"/v1/models/{address}", f"/v1/prompts/{address}/nearest", f"/page/{address}"):
                    check(*raw.ask("GET", path))
    assert sorted(api.service.library.names()) == ["filled", "kv", "team/guest", "words"]


# ---- requests by chance ------------------------------------------------------------------------------------------


def malformed(chance: random.Random) -> tuple[str, str, bytes, str]:
    """Method, path, body and its type: a good request with something wrong in it."""
    path = chance.choice(list(BODIES))
    body = json.loads(json.dumps(BODIES[path]))
    for _ in range(chance.randint(1, 3)):
        spoil(body, chance)
    data = json.dumps(body).encode()
    if chance.random() < 0.3:  # and now the bytes
        data = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data) + 1)
            data[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        data = bytes(data[: chance.randint(0, len(data))] if chance.random() < 0.3 else data)
    kind = chance.choice(
        ["application/json"] * 9 + ["text/plain", "multipart/form-data", "application/json; charset=x"]
    )
    method = chance.choice(["POST"] * 19 + ["PUT", "GET", "DELETE", "PATCH"])
    return method, path, data, kind


def spoil(body: Any, chance: random.Random) -> None:
    """Change one value somewhere below, or leave it out, or add one."""
    keys = list(body) if isinstance(body, dict) else list(range(len(body)))
    key = chance.choice(keys) if keys else None
    if key is not None and isinstance(body[key], dict | list) and body[key] and chance.random() < 0.6:
        spoil(body[key], chance)
    elif key is None or chance.random() < 0.2:
        value = copy.deepcopy(chance.choice(JUNK))
        if isinstance(body, dict):
            body[chance.choice(["extra", "n", "tools", "stop", "best_of", "user", "\ud800", "x" * 5000])] = value
        else:
            body.append(value)
    elif chance.random() < 0.2:
        del body[key]
    else:
        body[key] = copy.deepcopy(chance.choice([*JUNK, *NAMES[:8]]))


def ask_by_chance(api: Api, count: int) -> set[int]:
    """So many malformed requests; the statuses they got."""
    chance, seen = random.Random(0), set()
    with closing(Raw(api)) as raw, no_file_outside(api):
        for _ in range(count):
            status, answer = raw.ask(*malformed(chance))
            check(status, answer)
            seen.add(status)
    return seen


@pytest.mark.slow
def test_malformed_requests(api: Api) -> None:
    assert {200, 400, 404, 405} <= ask_by_chance(api, 600)


@pytest.mark.slow
@pytest.mark.full  # the same as above and below, only more of them
def test_ten_thousand_malformed_requests(api: Api) -> None:
    assert {200, 400, 404, 405} <= ask_by_chance(api, 9_500)
    ask_by_document(api, 500, GenerationMode.NEGATIVE)


# ---- requests made from the OpenAPI document ---------------------------------------------------------------------


def ask_by_document(api: Api, count: int, mode: GenerationMode) -> None:
    """So many requests over all routes, half of those that name a model with one that is there."""
    document = schemathesis.openapi.from_dict(api.app.openapi())
    operations = [found.ok() for found in document.get_all_operations()]
    assert {operation.path for operation in operations} > set(BODIES)
    for operation in operations:
        ask_operation(api, operation, mode, -(-count // len(operations)))


def ask_operation(api: Api, operation: Any, mode: GenerationMode, count: int) -> None:
    if mode is GenerationMode.NEGATIVE and not len(operation.body):
        return  # nothing about it can be wrong: names are any text
    turns = iter(range(1 << 30))

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and next(turns) % 2:
            case.body = {**case.body, "model": "kv"}
        made = case.as_transport_kwargs(base_url=api.address)
        fields = ("method", "url", "headers", "params", "json", "data", "cookies", "files")
        ready = requests.Request(**{name: made[name] for name in fields if name in made}).prepare()
        body = ready.body.encode() if isinstance(ready.body, str) else ready.body
        check(*raw.ask(ready.method, ready.path_url, body, ready.headers.get("Content-Type", "application/json")))

    with closing(Raw(api)) as raw:
        ask()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_from_the_document(api: Api, mode: GenerationMode) -> None:
    ask_by_document(api, 60 if mode is GenerationMode.NEGATIVE else 30, mode)
