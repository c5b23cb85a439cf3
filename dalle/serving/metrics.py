"""What Prometheus reads at `/metrics`: one registry for each server, nothing global."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters and times of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {"registry": self.registry, "namespace": "dalle"}
        self.waiting = Gauge("queue_jobs", "Jobs accepted of which nothing is drawn yet.", **made)
        self.running = Gauge("running_jobs", "Jobs of which something is drawn.", **made)
        self.slots = Gauge("reserved_slots", "Candidates reserved by accepted jobs.", **made)
        self.batch_rows = Gauge("batch_rows", "Candidates in the batch being drawn.", **made)
        self.jobs = Counter("jobs", "Ended jobs: settled, cancelled, failed or expired.", ["outcome"], **made)
        self.rejected = Counter("rejected", "Requests turned away with a 503.", ["reason"], **made)
        self.pictures = Counter("pictures", "Candidates drawn to the end.", **made)
        self.tokens = Counter("image_tokens", "Image tokens sampled; rate() gives tokens a second.", **made)
        self.responses = Counter("responses", "HTTP answers by status.", ["status"], **made)
        self.first_row = Histogram(
            "first_row_seconds", "From acceptance to the first grid row.", buckets=SECONDS, **made
        )
        self.latency = Histogram(
            "job_seconds", "From acceptance to settled pictures.", buckets=SECONDS, **made
        )

    def watch(
        self, waiting: Callable[[], float], running: Callable[[], float], slots: Callable[[], float]
    ) -> None:
        """Reads these three from the queue whenever somebody asks."""
        self.waiting.set_function(waiting)
        self.running.set_function(running)
        self.slots.set_function(slots)

    def text(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)
