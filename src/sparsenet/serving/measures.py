"""The figures of ``/metrics``, in a registry of the server's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sparsenet.extras import require

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128)


class Measures:
    """Counters and histograms, and ``text`` with all of them in Prometheus' format.

    *inside* says how many pictures are being read or computed.
    """

    def __init__(self, inside: Callable[[], int]) -> None:
        library: Any = require("prometheus_client", "serve")
        registry = library.CollectorRegistry()
        library.ProcessCollector(registry=registry)
        self.text: Callable[[], bytes] = partial(library.generate_latest, registry)
        self.content_type: str = library.CONTENT_TYPE_LATEST
        text = "Requests answered"
        self.requests = library.Counter(
            "sparsenet_requests", text, ["path", "code"], registry=registry
        )
        text = "Seconds from a request's headers to the end of its answer"
        self.seconds = library.Histogram(
            "sparsenet_request_seconds", text, ["path"], buckets=SECONDS, registry=registry
        )
        text = "Pictures by what became of them"
        self.pictures = library.Counter("sparsenet_pictures", text, ["outcome"], registry=registry)
        text = "Pictures computed at a time"
        self.batches = library.Histogram(
            "sparsenet_batch_pictures", text, buckets=PICTURES, registry=registry
        )
        text = "Seconds a batch was computed for"
        self.batch_seconds = library.Histogram(
            "sparsenet_batch_seconds", text, buckets=SECONDS, registry=registry
        )
        text = "Pictures being read or computed now"
        gauge = library.Gauge("sparsenet_pictures_inside", text, registry=registry)
        gauge.set_function(inside)
