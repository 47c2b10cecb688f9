"""The metrics of the HTTP side, and the text for Prometheus, in which each model's metrics get the label `model`.

The metrics of an engine (serve/observe/engine_metrics.py) have a registry for each model, so that neither the engine
nor its observer needs to know that there are several models.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from runtime.core import EngineStats
from runtime.grammar.schema.check import Outcome
from serve.fields.ignored import label
from serve.observe.engine_metrics import REQUEST_BUCKETS, EngineMetrics

ModelFigures = tuple[str, EngineMetrics, EngineStats | None]


class HttpMetrics:
    """Counts responses by route and status. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._responses = Counter(
            "headrace_http_responses", "HTTP responses", ["route", "status"], registry=self.registry
        )
        self._request_s = Histogram(
            "headrace_request_seconds",
            "From a request's arrival to the last byte of its reply",
            ["route"],
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._ignored = Counter(
            "headrace_ignored_fields",
            "Request fields that were ignored, `other` for names in no table",
            ["field"],
            registry=self.registry,
        )
        self._schema_checks = Counter(
            "headrace_schema_checks",
            "Complete answers checked against the parts of their JSON schema that a grammar cannot enforce",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in Outcome:
            self._schema_checks.labels(outcome.value)

    def on_schema_check(self, outcome: Outcome) -> None:
        """Count the check of one choice."""
        self._schema_checks.labels(outcome.value).inc()

    def on_response(self, *, route: str, status: int, request_s: float, ignored: Iterable[str] = ()) -> None:
        """Count a request that has ended. `route` is the route's rule; `request_s` is the time since its arrival."""
        self._responses.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(request_s)
        for name in ignored:
            self._ignored.labels(label(name)).inc()

    def render(self, models: Iterable[ModelFigures]) -> tuple[bytes, str]:
        """The text for Prometheus and its content type, with current gauges."""
        everything = CollectorRegistry()
        everything.register(_Labelled(self.registry, list(models)))
        return generate_latest(everything), CONTENT_TYPE_LATEST


class _Labelled(Collector):
    """The HTTP metrics unchanged, then the models' metrics, merged by name and with a label."""

    def __init__(self, http: CollectorRegistry, models: list[ModelFigures]) -> None:
        self._http = http
        self._models = models

    def collect(self) -> Iterator[Metric]:
        yield from self._http.collect()
        families: dict[str, Metric] = {}
        for name, metrics, stats in self._models:
            if stats is not None:
                metrics.set_gauges(stats)
            for family in metrics.registry.collect():
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [
                    sample._replace(labels={"model": name, **sample.labels}) for sample in family.samples
                ]
        yield from families.values()
