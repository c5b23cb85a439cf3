"""What Prometheus reads at `/metrics`: one registry for each server, nothing global."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters and times of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(name, about, namespace="dalle", registry=self.registry)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, labels, namespace="dalle", registry=self.registry)

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(name, about, namespace="dalle", registry=self.registry, buckets=SECONDS)

        self.waiting = gauge("queue_jobs", "Accepted jobs that wait for their first batch.")
        self.running = gauge("running_jobs", "Jobs that are being drawn.")
        self.slots = gauge("reserved_slots", "Candidates reserved by accepted requests.")
        self.batch_rows = gauge("batch_rows", "Candidates in the batch that is being drawn.")
        self.jobs = counter("jobs", "Ended jobs: settled, cancelled, failed or expired.", "outcome")
        self.rejected = counter("rejected", "Requests turned away with a 503.", "reason")
        self.pictures = counter("pictures", "Candidates drawn to the end.")
        self.tokens = counter("image_tokens", "Image tokens sampled; rate() gives tokens a second.")
        self.responses = counter("responses", "HTTP answers by status.", "status")
        self.first_row = histogram("first_row_seconds", "From acceptance to the first grid row.")
        self.latency = histogram("job_seconds", "From acceptance to settled pictures.")

    def watch(
        self, waiting: Callable[[], float], running: Callable[[], float], slots: Callable[[], float]
    ) -> None:
        """Read these three from the queue whenever somebody asks."""
        self.waiting.set_function(waiting)
        self.running.set_function(running)
        self.slots.set_function(slots)

    def text(self) -> bytes:
        """Return the Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)
