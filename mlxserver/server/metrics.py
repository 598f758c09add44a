"""Metrics of all models in Prometheus' text format.

Rule: names and labels are an interface, which dashboards depend on: they stay as they are. A label may be added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from mlxserver.engine.metrics import Histogram, ModelMetrics, RankReport
from mlxserver.engine.platform import device
from mlxserver.manager.instance import ModelInstance
from model_manager import ModelManager

EXPOSITION_TYPE = CONTENT_TYPE_LATEST
PREFIX = "mlx_server_"

HISTOGRAMS: Mapping[str, tuple[str, Callable[[ModelMetrics], Histogram]]] = {
    "inter_token_seconds": ("Time between two decode steps of one request.", lambda m: m.inter_token),
    "queue_seconds": ("Time from a request's arrival at the engine to its slot.", lambda m: m.queue),
    "load_seconds": ("Duration of loads that succeeded.", lambda m: m.load),
    "batch_rows": ("Sequences decoded together, observed at every step.", lambda m: m.batch_size),
}
TOTALS: Mapping[str, tuple[str, Callable[[ModelMetrics], int]]] = {
    "prompt_tokens": ("Prompt tokens, cached ones included.", lambda m: m.prompt_tokens),
    "cached_tokens": ("Prompt tokens found in the prefix cache.", lambda m: m.cached_tokens),
    "completion_tokens": ("Tokens generated, reasoning included.", lambda m: m.completion_tokens),
    "reasoning_tokens": ("Tokens of reasoning.", lambda m: m.reasoning_tokens),
    "drafted_tokens": ("Tokens that were drafted by speculation.", lambda m: m.drafted_tokens),
    "accepted_tokens": ("Drafted tokens that were accepted.", lambda m: m.accepted_tokens),
}
KINDS: Mapping[str, tuple[str, str, Callable[[ModelMetrics], Mapping[str, int]]]] = {
    "loads": ("outcome", "Loads that have ended.", lambda m: m.loads),
    "unloads": ("reason", "Unloads, by their reason.", lambda m: m.unloads),
    "faults": ("kind", "Faults in the engine, by their kind.", lambda m: m.faults),
}
GAUGES: Mapping[str, tuple[str, Callable[[ModelInstance], int]]] = {
    "running_requests": ("Requests that have a slot.", lambda i: i.running),
    "waiting_requests": ("Requests that wait for a slot, or for the model.", lambda i: i.waiting),
    "weights_bytes": ("Memory of the weights.", lambda i: i.facts.weight_bytes if i.facts else 0),
    "reserved_bytes": ("Memory that the model holds, beside its prefixes.", lambda i: i.reserved_bytes),
    "estimated_bytes": ("Memory that the model was expected to take.", lambda i: i.estimate.total if i.estimate else 0),
    "failed": ("Whether the model's last load failed, or its engine ended.", lambda i: int(i.status == "failed")),
    "wedged": ("Whether the engine is stalled in a step.", lambda i: int(i.is_stalled)),
    "loaded": ("Whether the model is loaded.", lambda i: int(i.is_loaded)),
}


class Collector:
    """Collector of all metrics, built at each scrape."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager

    def collect(self) -> Iterator[Metric]:
        """Every metric family."""
        models = self._manager.metrics
        yield from _by_dialect(models)
        for name, (meaning, histogram) in HISTOGRAMS.items():
            yield _histograms(PREFIX + name, meaning, ["model"], {(m.key,): histogram(m) for m in models})
        for name, (meaning, total) in TOTALS.items():
            counter = CounterMetricFamily(PREFIX + name, meaning, labels=["model"])
            for model in models:
                counter.add_metric([model.key], total(model))
            yield counter
        for name, (label, meaning, counts) in KINDS.items():
            counter = CounterMetricFamily(PREFIX + name, meaning, labels=["model", label])
            for model in models:
                for kind, count in list(counts(model).items()):
                    counter.add_metric([model.key, kind], count)
            yield counter
        for name, (meaning, value) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, meaning, labels=["model"])
            for instance in self._manager.instances:
                gauge.add_metric([instance.key], value(instance))
            yield gauge
        yield from self._memory()
        yield from self._ranks()

    def _memory(self) -> Iterator[Metric]:
        memory = self._manager.memory
        use = memory.use
        yield GaugeMetricFamily(PREFIX + "memory_budget_bytes", "Memory that all models may take.", memory.budget)
        yield GaugeMetricFamily(
            PREFIX + "memory_reserved_bytes", "Memory that models hold, beside their prefixes.", use.held
        )
        yield GaugeMetricFamily(PREFIX + "memory_prefix_bytes", "Memory of all models' prefixes.", use.prefixes)
        unaccounted = "Memory of live arrays beyond what models and prefixes hold."
        yield GaugeMetricFamily(PREFIX + "memory_unaccounted_bytes", unaccounted, memory.unaccounted)
        yield GaugeMetricFamily(PREFIX + "memory_active_bytes", "Memory of live arrays.", device.active_bytes())
        yield GaugeMetricFamily(PREFIX + "process_bytes", "Resident memory of the process.", device.process_bytes())

    def _ranks(self) -> Iterator[Metric]:
        """State of the ranks that share models; none of a single process."""
        reports = self._manager.ranks()
        figures: dict[str, tuple[str, Callable[[RankReport], float]]] = {
            "rank_up": ("Whether a rank is up.", lambda rank: rank.error is None),
            "rank_silent_seconds": ("Time since a rank's last message.", lambda rank: rank.silent_seconds),
            "rank_memory_active_bytes": ("Memory of live arrays on a rank.", lambda rank: rank.memory_bytes),
        }
        for name, (meaning, value) in figures.items() if reports else ():
            gauge = GaugeMetricFamily(PREFIX + name, meaning, labels=["rank"])
            for report in reports:
                gauge.add_metric([str(report.rank)], value(report))
            yield gauge


def exposition(manager: ModelManager) -> bytes:
    """All metrics in the text format."""
    registry = CollectorRegistry()
    registry.register(Collector(manager))
    return generate_latest(registry)


def _by_dialect(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    """Figures of requests, by model and by the dialect of the client."""
    meaning = "Time from a request's arrival at the engine to its first token."
    ttft: dict[tuple[str, ...], Histogram] = {
        (m.key, dialect): histogram for m in models for dialect, histogram in list(m.ttft.items())
    }
    yield _histograms(PREFIX + "time_to_first_token_seconds", meaning, ["model", "dialect"], ttft)
    counter = CounterMetricFamily(
        PREFIX + "requests_total", "Requests that have ended.", labels=["model", "outcome", "dialect"]
    )
    for model in models:
        for labels, count in list(model.requests.items()):
            counter.add_metric([model.key, *labels], count)
    yield counter


def _histograms(
    name: str, meaning: str, labels: Sequence[str], histograms: Mapping[tuple[str, ...], Histogram]
) -> Metric:
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for values, histogram in histograms.items():
        counts = histogram.cumulative
        bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
        family.add_metric(values, list(zip(bounds, counts, strict=True)), histogram.sum)
    return family
