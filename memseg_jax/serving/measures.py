"""What `GET /metrics` tells Prometheus."""

import prometheus_client as prometheus

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Measures:
    """The figures of one server, in a registry of its own.

    Attributes:
        requests: by route and status. Whatever else is asked for counts as "other": what clients
            make up adds no time series.
        seconds: from a request to the end of its answer, by route.
        pass_pictures: pictures of each forward pass.
        pass_seconds: time of each forward pass, with what is done before and after it.
        in_flight: requests that hold one of the queue's places.
    """

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "memseg_requests", "Requests answered", ("route", "status"), registry=registry
        )
        self.seconds = prometheus.Histogram(
            "memseg_request_seconds",
            "Seconds from a request to the end of its answer",
            ("route",),
            registry=registry,
            buckets=_SECONDS,
        )
        self.pass_pictures = prometheus.Histogram(
            "memseg_pass_pictures",
            "Pictures per forward pass",
            registry=registry,
            buckets=[2**n for n in range(7)],
        )
        self.pass_seconds = prometheus.Histogram(
            "memseg_pass_seconds", "Seconds per forward pass", registry=registry, buckets=_SECONDS
        )
        self.in_flight = prometheus.Gauge(
            "memseg_requests_in_flight", "Requests being read or answered", registry=registry
        )

    def add_pass(self, pictures: int, seconds: float) -> None:
        """Counts a forward pass."""
        self.pass_pictures.observe(pictures)
        self.pass_seconds.observe(seconds)

    def text(self) -> bytes:
        """All figures in the format of Prometheus."""
        return prometheus.generate_latest(self._registry)
