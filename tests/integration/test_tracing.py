"""Spans of the real service, as a collector of OpenTelemetry's own protocol receives them."""

from __future__ import annotations

import gzip
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.documents import make_documents, make_model
from tests.servers import Bench
from tests.service import running, until, wait_caught_up


class Collector:
    """Takes what is exported to `/v1/traces`."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def spans(self) -> list[Any]:
        return [
            span for request in list(self.requests) for resource in request.resource_spans
            for scope in resource.scope_spans for span in scope.spans
        ]  # fmt: skip

    def resource(self) -> dict[str, str]:
        [first, *_] = self.requests[0].resource_spans
        return attributes(first.resource)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    each = Collector()
    yield each
    each.close()


def environment(collector: Collector) -> dict[str, str]:
    return {
        "CDC_EMBEDDER_TRACES": "on",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "CDC_EMBEDDER_SPILL_AFTER_S": "60",
    }


def test_a_batch_is_a_span_with_its_stages_in_it_and_no_text(bench18: Bench, collector: Collector) -> None:
    make_model(bench18, reject="poison")
    make_documents(bench18, 12)
    bench18.admin.execute("UPDATE documents SET body = 'the secret marker poison' WHERE id = 3")
    with running(bench18, **environment(collector)) as service:
        service.wait_for_log("scan of public.documents.embedding complete")
        assert service.stop() == 0
    spans = collector.spans
    batches = [span for span in spans if span.name == "batch public.documents.embedding"]
    assert sum(attributes(span)["cdc_embedder.rows"] for span in batches) >= 12
    assert any(attributes(span)["cdc_embedder.failed_rows"] == 1 for span in batches)
    whole = max(batches, key=lambda span: attributes(span)["cdc_embedder.rows"])
    stages = sorted(
        (span for span in spans if span.parent_span_id == whole.span_id), key=lambda s: s.start_time_unix_nano
    )
    assert [span.name for span in stages][:2] == ["fetching", "embedding"]
    assert {span.name for span in stages[2:]} == {"writing"}
    assert whole.start_time_unix_nano == stages[0].start_time_unix_nano
    assert whole.end_time_unix_nano == max(span.end_time_unix_nano for span in stages)
    assert all(span.trace_id == whole.trace_id for span in stages)
    told = attributes(whole)
    assert (told["cdc_embedder.model"], told["cdc_embedder.work"]) == ("fake", "scan")
    assert told["cdc_embedder.tokens"] > 0
    resource = collector.resource()
    assert (resource["service.name"], resource["cdc_embedder.slot"]) == ("cdc-embedder", bench18.slot)
    assert not any(b"secret marker" in request.SerializeToString() for request in collector.requests)


def test_a_batch_that_the_model_did_not_take_is_an_error(bench18: Bench, collector: Collector, tmp_path: Path) -> None:
    sign = tmp_path / "down"
    make_model(bench18, down_while_exists=str(sign))
    make_documents(bench18, 3)
    with running(bench18, **environment(collector)):
        wait_caught_up(bench18)
        sign.touch()
        bench18.admin.execute("UPDATE documents SET body = 'nobody takes it'")
        until(lambda: any(span.status.code == 2 for span in collector.spans), "no span is an error")
        sign.unlink()
        wait_caught_up(bench18)


def test_a_collector_that_is_not_there_holds_nothing_up(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 3)
    nowhere = {"CDC_EMBEDDER_TRACES": "on", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    with running(bench18, **nowhere, OTEL_EXPORTER_OTLP_TIMEOUT="1") as service:
        wait_caught_up(bench18)
        assert service.stop() == 0


def test_where_opentelemetry_is_not_installed_it_says_so(bench18: Bench, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['opentelemetry'] = None")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with running(bench18, CDC_EMBEDDER_TRACES="on", PYTHONPATH=path) as service:
        assert service.wait() == 1
        assert "OpenTelemetry is not installed. pip install 'cdc-embedder[otel]'" in service.log
        assert "Traceback" not in service.log
