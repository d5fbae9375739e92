"""`/metrics`: what Prometheus reads."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from softprompt.serve.logs import Record

API = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
GAUGES = {
    "running": "Answers that are being generated.",
    "waiting": "Answers that wait for their turn.",
    "cache_tokens": "Tokens whose keys and values are held.",
    "cache_tokens_limit": "Tokens whose keys and values can be held.",
    "prompts": "Prompts that requests can name.",
}


class Metrics:
    """Counters of one server. `counts` gives the gauges when they are asked for.

    Labels take their values from what the server knows, never from what a request says: a path or a name that does not
    exist counts as "other" or as no model, so that nobody can fill the memory with labels.
    """

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_Gauges(counts))
        by = ("model",)
        self._requests = Counter(
            "softprompt_requests", "Requests by model, path, status.", ("model", "path", "status"), registry=registry
        )
        self._prompt = Counter("softprompt_prompt_tokens", "Real tokens of texts.", by, registry=registry)
        self._virtual = Counter("softprompt_virtual_tokens", "Virtual tokens in front of texts.", by, registry=registry)
        self._completion = Counter("softprompt_completion_tokens", "Tokens generated.", by, registry=registry)
        self._first = Histogram(
            "softprompt_first_token_seconds", "From request to first token.", buckets=SECONDS, registry=registry
        )
        self._whole = Histogram(
            "softprompt_request_seconds", "From request to its end.", ("path",), buckets=SECONDS, registry=registry
        )

    def count(self, record: Record, status: int, seconds: float) -> None:
        """A request has ended."""
        path = record.path if record.path in API else "other"
        self._requests.labels(record.model, path, str(status)).inc()
        self._whole.labels(path).observe(seconds)
        if record.first_token is not None:
            self._first.observe(record.first_token)
        if record.model:
            self._prompt.labels(record.model).inc(record.prompt_tokens)
            self._virtual.labels(record.model).inc(record.virtual_tokens)
            self._completion.labels(record.model).inc(record.completion_tokens)

    def response(self) -> Response:
        return Response(generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Gauges(Collector):
    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in self._counts().items():
            yield GaugeMetricFamily(f"softprompt_{name}", GAUGES.get(name, name), value=value)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()  # registering must not ask an engine that has not started
