"""OpenTelemetry: a span a batch, with one for each stage in it. An extra (`otel`), off unless `traces` says so.

Where spans go, how many and under which name is OpenTelemetry's own matter: its OTEL_* variables. No span holds a key
or a text.
"""

from __future__ import annotations

import time
from typing import Protocol

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

from cdc_embedder import __version__
from cdc_embedder.batch import Batch


class Tracing(Protocol):
    """Told of a batch when it is written, or given up for now."""

    def batch(self, batch: Batch) -> None: ...
    def close(self) -> None: ...


class Spans:
    """Exports over OTLP, in a thread of OpenTelemetry's own."""

    def __init__(self, slot: str) -> None:
        resource = Resource.create({"service.version": __version__, "cdc_embedder.slot": slot})
        if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "cdc-embedder"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("cdc_embedder", __version__)
        self._epoch = time.time() - time.monotonic()

    def batch(self, batch: Batch) -> None:
        """Spans of a batch that is done with."""
        if not batch.stages:
            return
        began, ended = min(stage.began for stage in batch.stages), max(stage.ended for stage in batch.stages)
        whole = self._tracer.start_span(
            f"batch {batch.column.label}",
            kind=SpanKind.CONSUMER,
            start_time=self._nanoseconds(began),
            attributes={
                "cdc_embedder.column": batch.column.label,
                "cdc_embedder.model": batch.column.model.name,
                "cdc_embedder.work": batch.chosen.work.name.lower(),
                "cdc_embedder.rows": len(batch.rows),
                "cdc_embedder.tokens": batch.tokens,
                "cdc_embedder.failed_rows": sum(write.error is not None for write in batch.writes),
            },
        )
        inside = set_span_in_context(whole)
        for stage in batch.stages:
            span = self._tracer.start_span(
                stage.name,
                context=inside,
                start_time=self._nanoseconds(stage.began),
                attributes={"cdc_embedder.rows": stage.rows},
            )
            span.end(self._nanoseconds(stage.ended))
        if not batch.writes:
            whole.set_status(Status(StatusCode.ERROR, "the model could not be asked"))
        whole.end(self._nanoseconds(ended))

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()

    def _nanoseconds(self, moment: float) -> int:
        return int((moment + self._epoch) * 1e9)
