"""Figures of a running server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lora_rt.core.serving.ticket import Ticket

_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_BETWEEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Meter:
    """Counts. One per server, with a registry of its own: two servers in one process do not add up."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "lora_rt_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self.adapters = Counter(
            "lora_rt_adapter_requests", "Requests by adapter of their composition.", ["adapter"], registry=registry
        )
        self._tokens = Counter("lora_rt_tokens", "Tokens by kind: prompt, cached, answer.", ["kind"], registry=registry)
        self._first = Histogram(
            "lora_rt_time_to_first_token_seconds", "From arrival to the first token.", buckets=_FIRST, registry=registry
        )
        self._between = Histogram(
            "lora_rt_time_between_tokens_seconds", "Between two tokens of a row.", buckets=_BETWEEN, registry=registry
        )
        self._waiting = Gauge("lora_rt_rows_waiting", "Rows in the queue.", registry=registry)
        self._running = Gauge("lora_rt_rows_running", "Rows in the batch.", registry=registry)
        self._kv = Gauge("lora_rt_kv_bytes", "Bytes of the keys and values of running rows.", registry=registry)
        self._prefix = Counter(
            "lora_rt_prefix_lookups", "Prompts by whether their beginning was known.", ["result"], registry=registry
        )
        self._kept = Gauge("lora_rt_prefix_bytes", "Bytes of keys and values kept for prompts.", registry=registry)
        self._resident = Gauge("lora_rt_adapter_bytes", "Bytes of the resident adapters.", registry=registry)

    def load(self, waiting: int, running: int, kv_bytes: int) -> None:
        """How busy the model is."""
        self._waiting.set(waiting)
        self._running.set(running)
        self._kv.set(kv_bytes)

    def token(self, ticket: Ticket, now: float, new: int) -> None:
        """A row has got tokens."""
        self._tokens.labels("answer").inc(new)
        if ticket.said:
            self._between.observe(now - ticket.spoke)
        else:
            self._first.observe(now - ticket.arrived)

    def prompt(self, tokens: int, cached: int) -> None:
        """A row joins, of whose prompt so many tokens need not be read."""
        self._tokens.labels("prompt").inc(tokens)
        self._tokens.labels("cached").inc(cached)
        self._prefix.labels("hit" if cached else "miss").inc()

    def memory(self, *, prefixes: int | None = None, adapters: int | None = None) -> None:
        """What is kept."""
        if prefixes is not None:
            self._kept.set(prefixes)
        if adapters is not None:
            self._resident.set(adapters)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
