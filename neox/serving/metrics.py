"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from neox.serving.replica import Decoder

CONTENT_TYPE = CONTENT_TYPE_LATEST

# From a small model's step to a large one's prompt on a CPU.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One server's counts, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "neox_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.prompt_tokens = Counter("neox_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter(
            "neox_generated_tokens", "Tokens generated.", registry=registry
        )
        self.first_token = Histogram(
            "neox_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "neox_time_per_token_seconds",
            "From a sequence's token to its next.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.cancellations = Counter(
            "neox_cancellations", "Sequences cancelled before their end.", registry=registry
        )
        self._waiting = Gauge("neox_queue_length", "Sequences that wait.", registry=registry)
        self._running = Gauge("neox_running_rows", "Sequences being decoded.", registry=registry)

    def watch(self, decoder: Decoder) -> None:
        """Show a decoder's counts."""
        self._waiting.set_function(lambda: decoder.waiting)
        self._running.set_function(lambda: decoder.running)

    def text(self) -> bytes:
        """The exposition format's text."""
        return generate_latest(self._registry)
