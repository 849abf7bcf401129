"""What Prometheus is told, and under which names. Every name has its unit; every unit is a base unit.

Counters come from `metering`, the rest is looked up at the moment of asking. Not for deciding anything: nothing here
is read by the service itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from math import isinf

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from cdc_embedder import __version__
from cdc_embedder.lane import Lane
from cdc_embedder.metering import Histogram
from cdc_embedder.pending import Work
from cdc_embedder.service import Service
from cdc_embedder.web import Health

PREFIX = "cdc_embedder_"

STATES = ("backfilling", "live", "paused", "error")
WAL_STATUSES = ("reserved", "extended", "unreserved", "lost")


def exposition(service: Service, health: Health) -> bytes:
    """Everything, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service, health))
    return generate_latest(registry)


class _Collector:
    def __init__(self, service: Service, health: Health) -> None:
        self._service = service
        self._health = health

    def collect(self) -> Iterator[Metric]:
        yield from self._process()
        yield from self._wal()
        yield from self._columns()
        yield from self._counted()
        yield from self._models()

    def _process(self) -> Iterator[Metric]:
        service, health = self._service, self._health
        working = service.working
        plugin = "" if working is None else working.plugin
        yield _gauge("build_info", "What runs.", {"version": __version__, "slot": service.slot, "plugin": plugin}, 1)
        yield _gauge("leader", "1 where this instance works, 0 where it waits or cannot.", {}, health.role == "working")
        yield _gauge("ready", "1 where it works or waits ready.", {}, health.ready)
        meters = service.meters
        yield _counter("reconnects", "Sessions that trouble ended.", {}, meters.reconnects)
        received, own = meters.received_changes, meters.own_changes
        if working is not None:
            received, own = received + working.reading.changes, own + working.reading.echoes
        yield _counter("received_changes", "Changes of configured tables that the slot delivered.", {}, received)
        yield _counter("own_changes", "Changes of our own that were passed over.", {}, own)

    def _wal(self) -> Iterator[Metric]:
        retention, working = self._service.retention, self._service.working
        lag = GaugeMetricFamily(PREFIX + "slot_lag_bytes", "WAL behind what the slot has confirmed.", labels=["slot"])
        retained = GaugeMetricFamily(
            PREFIX + "slot_retained_bytes", "WAL that the server keeps for the slot.", labels=["slot"]
        )
        safe = GaugeMetricFamily(
            PREFIX + "slot_safe_wal_bytes", "WAL that may be written before the slot is lost.", labels=["slot"]
        )
        status = GaugeMetricFamily(
            PREFIX + "slot_wal_status", "1 for the wal_status that the slot has.", labels=["slot", "status"]
        )
        for held in retention.held:
            lag.add_metric([held.slot], held.lag)
            retained.add_metric([held.slot], held.retained)
            if held.safe is not None:
                safe.add_metric([held.slot], held.safe)
            for name in WAL_STATUSES:
                status.add_metric([held.slot, name], held.wal_status == name)
        yield from (lag, retained, safe, status)
        budget = GaugeMetricFamily(
            PREFIX + "wal_budget_bytes", "What the operator set: warn, alarm, limit.", labels=["level"]
        )
        for level, size in retention.budget.items():
            budget.add_metric([level], size)
        yield budget
        yield _gauge("slot_given_up", "1 after the limit was passed, until the slot may be made again.", {},
                     retention.given_up)  # fmt: skip
        if working is not None:
            seconds = retention.lag_seconds(working.reporter.embedded_through)
            yield _gauge("lag_seconds", "For how long the oldest WAL that is not embedded has been there.", {}, seconds)

    def _columns(self) -> Iterator[Metric]:
        working = self._service.working
        lanes = [] if working is None else working.pipeline.lanes
        state = GaugeMetricFamily(PREFIX + "column_state", "1 for the state it is in.", labels=["column", "state"])
        info = GaugeMetricFamily(
            PREFIX + "column_info", "Which model, and how it runs.", labels=["column", "model", "engine"]
        )
        pending = GaugeMetricFamily(PREFIX + "pending_keys", "Keys in memory.", labels=["column", "work"])
        for lane in lanes:
            name = lane.column.label
            for each in STATES:
                state.add_metric([name, each], lane.state[0] == each)
            engine = "" if lane.embedder is None else lane.embedder.engine
            info.add_metric([name, lane.column.model.name, engine], 1)
            for work in Work:
                pending.add_metric([name, work.name.lower()], lane.pending.unfinished(work))
        yield from (state, info, pending)
        now = time.monotonic()
        yield _by_column("backlog_keys", "Keys that were spilled.", lanes, lambda lane: max(0, lane.backlog))
        yield _by_column("oldest_pending_seconds", "How long the oldest key in memory waits.", lanes,
                         lambda lane: max(0.0, now - (lane.pending.oldest or now)))  # fmt: skip
        yield _by_column("failed_rows", "Rows that could not be embedded.", lanes, lambda lane: lane.failed_rows)
        yield _by_column("circuit_breaker_open", "1 while the model is not asked.", lanes,
                         lambda lane: lane.breaker.state(now) != "closed")  # fmt: skip
        yield _by_column("scan_running", "1 while the table is scanned.", lanes, lambda lane: lane.scan.running)

    def _counted(self) -> Iterator[Metric]:
        meters = self._service.meters
        rows = CounterMetricFamily(PREFIX + "rows", "Rows by what became of them.", labels=["column", "result"])
        missed = CounterMetricFamily(PREFIX + "guard_misses", "Writes that the guard refused.", labels=["column"])
        spilled = CounterMetricFamily(PREFIX + "spilled_keys", "Keys written to the backlog.", labels=["column"])
        latency = HistogramMetricFamily(
            PREFIX + "commit_to_vector_seconds", "From a change's commit to its vector's.", labels=["column"]
        )
        for name, meter in meters.columns.items():
            for result in ("embedded", "unchanged", "cleared", "failed", "truncated", "retried"):
                rows.add_metric([name, result], getattr(meter, result))
            missed.add_metric([name], meter.guard_misses)
            spilled.add_metric([name], meter.spilled)
            _add(latency, [name], meter.commit_to_vector)
        yield from (rows, missed, spilled, latency)
        stages = CounterMetricFamily(PREFIX + "stage_seconds", "Time spent, by stage.", labels=["stage"])
        for stage in ("fetching", "tokenizing", "embedding", "writing"):
            stages.add_metric([stage], meters.stages[stage])
        yield stages
        queries = CounterMetricFamily(PREFIX + "queries", "Questions for vectors.", labels=["via", "result"])
        seconds = HistogramMetricFamily(PREFIX + "query_seconds", "How long they took.", labels=["via"])
        for via in ("sql", "http"):
            for result in ("answered", "refused", "failed"):
                queries.add_metric([via, result], meters.queries[via, result])
            _add(seconds, [via], meters.query_seconds[via])
        yield from (queries, seconds)

    def _models(self) -> Iterator[Metric]:
        models = self._service.meters.models
        for name, about, value in (
            ("model_calls", "Calls that succeeded, those of questions among them.", "calls"),
            ("model_errors", "Calls that failed.", "errors"),
            ("tokens", "Tokens that went through the model.", "tokens"),
            ("padding_tokens", "Tokens beside them that only filled up.", "padding"),
            ("device_busy_seconds", "Time in which the device worked, summed over devices.", "busy_s"),
        ):
            family = CounterMetricFamily(PREFIX + name, about, labels=["model"])
            for model, meter in models.items():
                family.add_metric([model], getattr(meter, value))
            yield family
        rows = HistogramMetricFamily(PREFIX + "batch_rows", "Texts in a call.", labels=["model"])
        tokens = HistogramMetricFamily(PREFIX + "batch_tokens", "Tokens in a call.", labels=["model"])
        for model, meter in models.items():
            _add(rows, [model], meter.rows)
            _add(tokens, [model], meter.batch_tokens)
        yield from (rows, tokens)


def _gauge(name: str, about: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, about, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, about: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(PREFIX + name, about, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _by_column(name: str, about: str, lanes: list[Lane], value: Callable[[Lane], float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, about, labels=["column"])
    for lane in lanes:
        family.add_metric([lane.column.label], value(lane))
    return family


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    buckets = [("+Inf" if isinf(bound) else f"{bound:g}", count) for bound, count in histogram.cumulative()]
    family.add_metric(labels, buckets, histogram.sum)
