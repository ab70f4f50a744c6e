"""Prometheus metrics, by the names that vLLM's dashboards have.

Where a number means what vLLM's means it has vLLM's name, `vllm:...`, and its label `model_name`.
Others begin with `wavejax:`.
"""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wavejax.engine.batching import Request, Stats, Usage

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_TIME = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_TIME = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(
    float(digit * 10**power) for power in range(7) for digit in (1, 2, 5) if power < 6 or digit == 1
)
_SECONDS = {
    "time_to_first_token": ("From submission to the first token.", _FIRST_TOKEN),
    "inter_token_latency": ("From one token to the next, as they leave the engine.", _TOKEN_TIME),
    "request_time_per_output_token": ("A request's mean after its first token.", _TOKEN_TIME),
    "e2e_request_latency": ("From submission to the end.", _REQUEST_TIME),
    "request_queue_time": ("From submission to the start of reading.", _REQUEST_TIME),
    "request_prefill_time": ("From the start of reading to its end.", _REQUEST_TIME),
    "request_decode_time": ("From the first token to the end.", _REQUEST_TIME),
}
_REASONS = {
    "stop": "stop",
    "stop_string": "stop",
    "length": "length",
    "interrupted": "abort",
    "not finite": "error",
    "error": "error",
}


class Metrics:
    """What a server counts.

    Args:
        model_name: the label of every number.
        stats: gives the engine's own counts.
    """

    def __init__(self, model_name: str, stats: Callable[[], Stats]):
        self._registry = CollectorRegistry()
        label = ["model_name"]

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            made = Histogram(name, text, label, buckets=buckets, registry=self._registry)
            return made.labels(model_name)

        self._seconds = {
            name: histogram(f"vllm:{name}_seconds", text, buckets)
            for name, (text, buckets) in _SECONDS.items()
        }
        self._prompt = histogram("vllm:request_prompt_tokens", "A prompt's tokens.", _TOKENS)
        self._answer = histogram("vllm:request_generation_tokens", "An answer's tokens.", _TOKENS)
        self._asked = histogram(
            "vllm:request_params_max_tokens", "The most tokens that a request asks for.", _TOKENS
        )
        self._http = Counter(
            "wavejax:http_responses",
            "Answers by HTTP status; 499: the client had gone.",
            [*label, "status"],
            registry=self._registry,
        )
        self._cached = Counter(
            "vllm:prefix_cache_hits",
            "Tokens of prompts that were not read anew.",
            label,
            registry=self._registry,
        ).labels(model_name)
        self._queried = Counter(
            "vllm:prefix_cache_queries",
            "Tokens of prompts whose request has ended.",
            label,
            registry=self._registry,
        ).labels(model_name)
        self._name = model_name
        self._registry.register(_EngineCollector(model_name, stats))

    def ended(self, usage: Usage, request: Request) -> None:
        """Count a request's end."""
        seen = self._seconds
        seen["request_queue_time"].observe(usage.waited_seconds)
        seen["e2e_request_latency"].observe(usage.total_seconds)
        self._prompt.observe(usage.prompt_tokens)
        self._answer.observe(usage.completion_tokens)
        self._asked.observe(request.max_new_tokens)
        self._queried.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        if usage.first_token_seconds is None:
            return
        seen["request_prefill_time"].observe(usage.read_seconds)
        seen["time_to_first_token"].observe(usage.first_token_seconds)
        decoding = usage.total_seconds - usage.first_token_seconds
        seen["request_decode_time"].observe(decoding)
        if usage.completion_tokens > 1:
            each = decoding / (usage.completion_tokens - 1)
            seen["request_time_per_output_token"].observe(each)

    def token_gap(self, seconds: float) -> None:
        """Count the time between two tokens of one answer."""
        self._seconds["inter_token_latency"].observe(seconds)

    def http(self, status: int) -> None:
        """Count an answer by its status."""
        self._http.labels(self._name, str(status)).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's numbers, of one moment."""

    def __init__(self, model_name: str, stats: Callable[[], Stats]):
        self._name, self._stats = model_name, stats

    def collect(self) -> Iterable[Metric]:
        """Read the engine's numbers."""
        now = self._stats()
        gauges = {
            "vllm:num_requests_running": ("Requests read or answered.", now.running + now.reading),
            "vllm:num_requests_waiting": ("Requests in line.", now.waiting),
            "vllm:kv_cache_usage_perc": (
                "The share of the slots' tokens in use; 1 is all of them.",
                now.usage,
            ),
            "wavejax:requests_reading": ("Requests whose prompts are read.", now.reading),
            "wavejax:slots": ("Slots of all rooms that have memory now.", now.slots),
            "wavejax:longest_stall_seconds": (
                "The longest that running answers waited for tokens.",
                now.longest_stall_seconds,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._name], value)
            yield gauge
        counters = {
            "vllm:prompt_tokens": ("Tokens of prompts, cached ones included.", now.prompt_tokens),
            "vllm:generation_tokens": ("Tokens generated.", now.generated_tokens),
            "wavejax:requests_submitted": ("Requests taken.", now.submitted),
            "wavejax:requests_refused": ("Requests that the engine refused.", now.refused),
            "wavejax:decode_calls": ("Calls of the compiled step.", now.decode_calls),
            "wavejax:read_parts": ("Parts of prompts read.", now.read_parts),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._name], value)
            yield counter
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests ended.", labels=["model_name", "finished_reason"]
        )
        totals = dict.fromkeys(_REASONS.values(), 0)
        for reason, count in now.finished.items():
            totals[_REASONS[reason]] += count
        for told, total in totals.items():
            ended.add_metric([self._name, told], total)
        yield ended
