"""examples/serving and the commands of docs/serving.md: their flags exist, their parts fit, what can run runs."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import httpx
import pytest
import typer
import yaml

from softprompt.cli import app
from softprompt.serve.storage import parser as mirror_parser

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "serving"
PAGES = [FOLDER / "README.md", ROOT / "docs" / "serving.md"]


def check_command(words: list[str]) -> dict[str, Any]:
    """The parameters of a command line of ours, read by our own parsers; a flag that is none fails."""
    if words[:1] == ["softprompt"]:
        command: Any = typer.main.get_command(app)
        context = command.commands[words[1]].make_context(words[1], words[2:])
        return {**context.params, "rest": context.args}
    assert words[:3] == ["python", "-m", "softprompt.serve.storage"], words
    return vars(mirror_parser().parse_args(words[3:]))


# ---- Kubernetes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects() -> dict[tuple[str, str], dict[str, Any]]:
    text = (FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def replica(objects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    return objects["StatefulSet", "softprompt"]["spec"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def test_the_commands_of_the_pods_are_ours(replica: dict[str, Any]) -> None:
    fetch, mirror, server = (check_command(each["command"]) for each in containers(replica["template"]["spec"]))
    assert fetch == {**mirror, "every": None} and mirror["every"] == 30
    assert server["engine"] == "vllm" and server["host"] == "0.0.0.0"
    assert server["rest"] and all(each.startswith("--") for each in server["rest"])
    assert str(server["prompts"]) == str(mirror["folder"])


def test_what_the_pods_mount_is_there(objects: dict[tuple[str, str], dict[str, Any]]) -> None:
    for kind in ("StatefulSet", "Deployment"):
        (spec,) = (each["spec"] for (its, _), each in objects.items() if its == kind)
        pod = spec["template"]["spec"]
        volumes = {each["name"] for each in pod["volumes"]}
        volumes |= {each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", [])}
        mounted = {mount["name"] for each in containers(pod) for mount in each["volumeMounts"]}
        assert mounted == volumes
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
        for each in pod["volumes"]:
            if "secret" in each:
                assert ("Secret", each["secret"]["secretName"]) in objects


def test_every_path_of_the_servers_flags_is_mounted(replica: dict[str, Any]) -> None:
    (server,) = replica["template"]["spec"]["containers"]
    mounts = [mount["mountPath"] for mount in server["volumeMounts"]]
    given = check_command(server["command"])
    for name in ("prompts", "objects", "keys"):
        assert any(str(given[name]).startswith(mount) for mount in mounts), name
    assert given["port"] == server["ports"][0]["containerPort"]


def test_the_file_of_keys_is_one(
    objects: dict[tuple[str, str], dict[str, Any]], replica: dict[str, Any], tmp_path: Path
) -> None:
    from softprompt.serve.access import Keys

    (server,) = replica["template"]["spec"]["containers"]
    name = Path(str(check_command(server["command"])["keys"])).name
    path = tmp_path / name
    path.write_text(objects["Secret", "softprompt"]["stringData"][name])
    keys = Keys(path)
    team, everybody = keys.grant("sk-replace-me-of-team-a"), keys.grant("sk-replace-me-of-everybody")
    assert team is not None and team.allows("team-a/x") and not team.allows("team-b/x")
    assert everybody is not None and everybody.everything
    assert keys.grant("sk-another") is None


def test_the_services_reach_the_pods(objects: dict[tuple[str, str], dict[str, Any]]) -> None:
    for name, kind, target in (
        ("softprompt", "StatefulSet", "softprompt"),
        ("softprompt-api", "Deployment", "softprompt-balancer"),
    ):
        service, pods = objects["Service", name]["spec"], objects[kind, target]["spec"]
        assert service["selector"] == pods["template"]["metadata"]["labels"]
    assert objects["StatefulSet", "softprompt"]["spec"]["serviceName"] == "softprompt"


def test_the_balancer_knows_every_replica(
    objects: dict[tuple[str, str], dict[str, Any]], replica: dict[str, Any]
) -> None:
    text = (FOLDER / "nginx.conf").read_text(encoding="utf-8")
    named = re.findall(r"^\s*server (\S+) ", text, re.MULTILINE)
    port = replica["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert named == [f"softprompt-{number}.softprompt:{port}" for number in range(replica["replicas"])]
    (nginx,) = objects["Deployment", "softprompt-balancer"]["spec"]["template"]["spec"]["containers"]
    assert re.findall(r"listen (\d+);", text) == [str(nginx["ports"][0]["containerPort"])]
    assert f"location = {nginx['readinessProbe']['httpGet']['path']} " in text


def test_the_balancers_limits_are_the_servers() -> None:
    from softprompt.serve import ServeOptions

    text = (FOLDER / "nginx.conf").read_text(encoding="utf-8")
    options = ServeOptions("base", Path("prompts"))
    assert options.max_body == 1 << 20 and "client_max_body_size 1m;" in text
    assert f"proxy_read_timeout {options.timeout:.0f}s;" in text


# ---- the commands of the pages -----------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """Our own commands in the page's shell blocks."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("softprompt ", "python -m softprompt.serve.storage ")):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_pages_are_ours(page: Path) -> None:
    for words in commands(page):
        check_command(words)


def test_there_are_commands_to_check() -> None:
    found = [words[1] for words in commands(PAGES[1])]
    assert found.count("serve") >= 3 and "convert" in found


def test_the_links_of_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


# ---- nginx -------------------------------------------------------------------------------------------------------


class _Replica(BaseHTTPRequestHandler):
    """Answers with its own port."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = str(self.server.server_address[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def replicas(count: int) -> Iterator[list[int]]:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Replica) for _ in range(count)]
    threads = [Thread(target=each.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True) for each in servers]
    for thread in threads:
        thread.start()
    try:
        yield [each.server_address[1] for each in servers]
    finally:
        for each in servers:
            each.shutdown()
            each.server_close()


@contextmanager
def nginx(config: str, folder: Path, port: int) -> Iterator[str]:
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed")
    path = folder / "nginx.conf"
    path.write_text(config)
    subprocess.run([program, "-t", "-c", path, "-p", folder], check=True, capture_output=True)
    process = subprocess.Popen([program, "-c", path, "-p", folder, "-g", "daemon off;"])
    try:
        for _ in range(100):
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/balancer").status_code == 204
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Replica) as server:
        return server.server_address[1]


def test_nginx_keeps_a_prompt_on_its_replica(tmp_path: Path) -> None:
    text = (FOLDER / "nginx.conf").read_text(encoding="utf-8")
    port = free_port()
    with replicas(2) as ports:
        for number, own in enumerate(ports):
            text = text.replace(f"softprompt-{number}.softprompt:8000", f"127.0.0.1:{own}")
        text = text.replace("listen 8080;", f"listen 127.0.0.1:{port};").replace("/tmp/", f"{tmp_path}/")
        with nginx(text, tmp_path, port) as url, httpx.Client(base_url=url) as client:

            def ask(prompt: str | None) -> str:
                headers = {} if prompt is None else {"X-Prompt": prompt}
                return client.post("/v1/completions", json={"model": prompt}, headers=headers).text

            places = {f"team/{number}": ask(f"team/{number}") for number in range(40)}
            assert set(places.values()) == set(map(str, ports))
            assert all(ask(prompt) == place for prompt, place in places.items())
            assert {ask(None) for _ in range(40)} == set(map(str, ports))
            assert client.post("/v1/prompts/load", json={}).status_code == 403
            assert client.post("/v1/completions", content=b"x" * (2 << 20)).status_code == 413


# ---- Ray Serve ---------------------------------------------------------------------------------------------------


def without_ray() -> ModuleType:
    """The example's module with Ray Serve's decorator left out: the class as it is."""
    ray, serve = ModuleType("ray"), ModuleType("ray.serve")
    vars(serve).update(deployment=lambda **_: lambda each: each, Application=object)
    vars(ray).update(serve=serve)
    spec = importlib.util.spec_from_file_location("ray_serve_example", FOLDER / "ray_serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        patch.setitem(sys.modules, "ray.serve", serve)
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_replica_hands_requests_through(tmp_path: Path) -> None:
    """The class of the Ray example with a real server behind it, called as Ray's proxy calls it."""
    from fastapi import FastAPI, Request
    from fastapi.testclient import TestClient

    from softprompt import PrefixTuningConfig, get_peft_model
    from softprompt.embedded import PATH
    from softprompt.loading import load_base, load_tokenizer

    base = load_base(str(PATH), load_tokenizer(str(PATH)))
    get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        tmp_path / "prompts" / "a"
    )
    server = without_ray().PromptServer(str(PATH), str(tmp_path / "prompts"), ["--engine=transformers", "--name=base"])
    try:
        front = FastAPI()

        @front.api_route("/{path:path}", methods=["GET", "POST"])
        async def hand(request: Request) -> Any:
            return await server(request)

        with TestClient(front) as client:
            names = [each["id"] for each in client.get("/v1/models").json()["data"]]
            assert set(names) == {"base", "a"}
            asked = {"model": "a", "prompt": "Tom is", "max_tokens": 4, "temperature": 0}
            whole = client.post("/v1/completions", json=asked)
            assert whole.status_code == 200
            streamed = client.post("/v1/completions", json={**asked, "stream": True})
            assert streamed.headers["content-type"].startswith("text/event-stream")
            pieces = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
            assert pieces[-1] == "[DONE]"
            texts = [json.loads(piece)["choices"][0]["text"] for piece in pieces[:-1] if json.loads(piece)["choices"]]
            assert "".join(texts) == whole.json()["choices"][0]["text"]
            assert client.post("/v1/completions", json={**asked, "model": "none"}).status_code == 404
            assert client.portal is not None
            client.portal.call(server.client.aclose)
    finally:
        server.process.terminate()
        server.process.wait()
