"""`/metrics` of the real service: each number against what was done, counted by the test."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.documents import make_documents, make_model
from tests.servers import Bench, bench_with, bindir_18
from tests.service import Service, running, until, wait_caught_up

COLUMN = {"column": "public.documents.embedding"}
TOKEN = "a-token-of-sixteen-or-more"


@contextmanager
def served(bench: Any, **environment: str) -> Iterator[Service]:
    with running(bench, **({"CDC_EMBEDDER_HTTP": "127.0.0.1:0"} | environment)) as service:
        service.wait_for_log("health is served at")
        yield service


def base(service: Service) -> str:
    found = re.search(r"health is served at (http://\S+)/healthz", service.log)
    assert found is not None
    return found[1].replace("0.0.0.0", "127.0.0.1")


class Metrics:
    """What the service says now."""

    def __init__(self, service: Service) -> None:
        text = urllib.request.urlopen(base(service) + "/metrics", timeout=60).read().decode()
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples["cdc_embedder_" + name, frozenset(labels.items())]

    def has(self, name: str) -> bool:
        return any(each == "cdc_embedder_" + name for each, _ in self.samples)

    def rows(self, result: str) -> float:
        return self("rows_total", **COLUMN, result=result)


def test_rows_are_counted_by_what_became_of_them(bench: Any) -> None:
    make_model(bench, reject="poison")
    bench.admin.execute("UPDATE cdc_embedder.model SET max_tokens = 3 WHERE name = 'fake'")
    make_documents(bench, 10)
    with served(bench, CDC_EMBEDDER_SQL_EMBED="on") as service:
        wait_caught_up(bench)
        first = Metrics(service)
        assert (first.rows("embedded"), first.rows("failed"), first.rows("cleared")) == (10, 0, 0)
        assert first("commit_to_vector_seconds_count", **COLUMN) == 0, "a backfill is not late"
        bench.admin.execute("UPDATE documents SET body = 'changed ' || id WHERE id <= 4")
        bench.admin.execute("UPDATE documents SET body = NULL WHERE id = 5")
        bench.admin.execute("UPDATE documents SET body = 'poison' WHERE id = 6")
        bench.admin.execute("UPDATE documents SET body = 'of more than three words' WHERE id = 7")
        bench.admin.execute("UPDATE documents SET views = 1 WHERE id = 8")
        settled = lambda: (m := Metrics(service)).rows("embedded") == 15 and m("failed_rows", **COLUMN) == 1  # noqa: E731
        until(settled, "it was counted otherwise", lambda: Metrics(service).samples)
        now = Metrics(service)
        assert (now.rows("cleared"), now.rows("failed"), now.rows("truncated")) == (1, 1, 1)
        assert now.rows("unchanged") > first.rows("unchanged")
        assert now("commit_to_vector_seconds_count", **COLUMN) == 5
        assert 0 < now("commit_to_vector_seconds_sum", **COLUMN) < 3600
        assert now("commit_to_vector_seconds_bucket", **COLUMN, le="+Inf") == 5
        assert now("received_changes_total") >= 8
        assert now("model_errors_total", model="fake") == 0, "a text that is refused is no error of the model"
        assert now("batch_rows_sum", model="fake") >= 15
        assert now("tokens_total", model="fake") == now("batch_tokens_sum", model="fake")
        for stage in ("fetching", "embedding", "writing"):
            assert now("stage_seconds_total", stage=stage) > 0
        assert now("column_state", **COLUMN, state="live") == 1
        assert now("column_info", **COLUMN, model="fake", engine="fake") == 1
        service.wait_for_log("SQL is answered")
        bench.admin.execute("SELECT cdc_embedder.embed('fake', 'a question')")
        with pytest.raises(psycopg.Error, match="there is no model"):
            bench.admin.execute("SELECT cdc_embedder.embed('nothing', 'a question')")
        asked = Metrics(service)
        assert asked("queries_total", via="sql", result="answered") == 1
        assert asked("query_seconds_count", via="sql") == asked("queries_total", via="sql", result="refused") + 1
        assert asked("queries_total", via="http", result="answered") == 0


def test_what_is_held_up_shows_until_it_is_not(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    with served(bench18, CDC_EMBEDDER_SPILL_AFTER_S="2") as service, psycopg.connect(bench18.dsn_admin) as holder:
        wait_caught_up(bench18)
        holder.execute("SELECT FROM documents WHERE id = 1 FOR UPDATE")
        other = psycopg.connect(bench18.dsn_admin, autocommit=True)
        other.execute("INSERT INTO documents (id, body) VALUES (100, 'beside it')")
        other.execute("UPDATE cdc_embedder.ledger_1 SET fingerprint = '\\x00' WHERE key_1 = 1")
        other.execute("SELECT cdc_embedder.reconcile('documents')")
        missed = lambda: Metrics(service)("guard_misses_total", **COLUMN) > 0  # noqa: E731
        until(missed, "the lock met nobody", lambda: Metrics(service).samples)
        retried = lambda: (m := Metrics(service)).rows("retried") >= m("guard_misses_total", **COLUMN)  # noqa: E731
        until(retried, "a miss is no retry", lambda: Metrics(service).samples)
        holder.rollback()
        until(lambda: Metrics(service)("scan_running", **COLUMN) == 0, "the scan did not end")
        other.close()


def test_what_is_behind_shows_in_keys_bytes_and_seconds(bench18: Bench, tmp_path: Any) -> None:
    sign = tmp_path / "down"
    make_model(bench18, down_while_exists=str(sign))
    make_documents(bench18, 5)
    with served(bench18, CDC_EMBEDDER_SPILL_AFTER_S="3") as service:
        wait_caught_up(bench18)
        idle = Metrics(service)
        assert (idle("pending_keys", **COLUMN, work="live"), idle("oldest_pending_seconds", **COLUMN)) == (0, 0)
        sign.touch()
        bench18.admin.execute("UPDATE documents SET body = 'behind ' || id")
        until(lambda: Metrics(service)("backlog_keys", **COLUMN) == 5, "nothing was spilled")
        until(lambda: Metrics(service)("lag_seconds") > 1, "no lag was told")
        behind = Metrics(service)
        assert behind("spilled_keys_total", **COLUMN) >= 5
        assert behind("model_errors_total", model="fake") > 0
        assert behind("circuit_breaker_open", **COLUMN) == 1
        assert behind("slot_wal_status", slot=bench18.slot, status="reserved") == 1
        assert behind("slot_retained_bytes", slot=bench18.slot) > 0
        assert behind("wal_budget_bytes", level="warn") == 1 << 30
        assert not behind.has("slot_safe_wal_bytes")
        sign.unlink()
        wait_caught_up(bench18)
        done = lambda: (m := Metrics(service))("lag_seconds") == 0 and m("backlog_keys", **COLUMN) == 0  # noqa: E731
        until(done, "it stayed behind", lambda: Metrics(service).samples)
        late = Metrics(service)
        assert late("commit_to_vector_seconds_count", **COLUMN) == 5, "those that were late count above all"
        assert late("commit_to_vector_seconds_bucket", **COLUMN, le="2.5") == 0


def test_what_waits_shows_by_class_and_age_and_what_the_slot_holds_is_what_the_server_says(tmp_path: Any) -> None:
    sign = tmp_path / "down"
    with bench_with(bindir_18(), "pgoutput", {"max_slot_wal_keep_size": "1GB"}) as bench:
        make_model(bench, down_while_exists=str(sign), delay_per_text_s=0.05)
        make_documents(bench, 100)
        with served(bench, CDC_EMBEDDER_SPILL_AFTER_S="3600") as service:
            until(lambda: scanning(Metrics(service)), "no scan was seen", lambda: Metrics(service).samples)
            wait_caught_up(bench)
            assert Metrics(service)("device_busy_seconds_total", model="fake") > 0
            sign.touch()
            bench.admin.execute("UPDATE documents SET body = 'behind ' || id WHERE id <= 5")
            until(lambda: Metrics(service)("pending_keys", **COLUMN, work="live") == 5, "they do not wait")
            until(lambda: Metrics(service)("oldest_pending_seconds", **COLUMN) > 1, "they do not get older")
            bench.admin.execute("SELECT pg_logical_emit_message(false, 'noise', repeat('x', 100000))")
            until(
                lambda: held(Metrics(service), bench) == said(bench),
                "the server says otherwise",
                lambda: (held(Metrics(service), bench), said(bench)),
            )
            lag, retained, safe = said(bench)
            assert 100_000 < lag < retained < safe, "three numbers that cannot be taken for each other"
            sign.unlink()
            wait_caught_up(bench)
            assert Metrics(service)("oldest_pending_seconds", **COLUMN) == 0


def scanning(metrics: Metrics) -> bool:
    if not metrics.has("scan_running"):
        return False
    return metrics("scan_running", **COLUMN) == 1 and metrics("pending_keys", **COLUMN, work="scan") > 0


def held(metrics: Metrics, bench: Bench) -> tuple[int, ...]:
    names = ("slot_lag_bytes", "slot_retained_bytes", "slot_safe_wal_bytes")
    return tuple(int(metrics(name, slot=bench.slot)) for name in names)


def said(bench: Bench) -> tuple[int, ...]:
    row = bench.admin.execute(
        "SELECT (pg_current_wal_lsn() - confirmed_flush_lsn)::int8, (pg_current_wal_lsn() - restart_lsn)::int8,"
        " safe_wal_size FROM pg_replication_slots WHERE slot_name = %s",
        (bench.slot,),
    ).fetchone()
    assert row is not None
    return row


def test_counters_outlive_a_connection_and_one_that_waits_says_so(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    with served(bench18) as service, served(bench18) as other:
        until(lambda: {Metrics(service)("leader"), Metrics(other)("leader")} == {0, 1}, "not one of them leads")
        works, waits = (service, other) if Metrics(service)("leader") else (other, service)
        wait_caught_up(bench18)
        assert Metrics(waits)("ready") == 1
        assert not Metrics(waits).has("lag_seconds")
        before = Metrics(works)
        assert before("build_info", version=version(), slot=bench18.slot, plugin="pgoutput") == 1
        bench18.admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cdc-embedder control'"
        )
        until(lambda: Metrics(works)("reconnects_total") == 1, "nothing was lost")
        until(lambda: 1 in {Metrics(works)("leader"), Metrics(waits)("leader")}, "nobody goes on")
        assert Metrics(works).rows("embedded") == before.rows("embedded") == 5


def version() -> str:
    from cdc_embedder import __version__

    return __version__


def test_where_other_machines_reach_it_only_the_probes_need_no_token(bench18: Bench) -> None:
    with served(bench18, CDC_EMBEDDER_HTTP="0.0.0.0:0", CDC_EMBEDDER_HTTP_TOKEN=TOKEN) as service:
        for path in ("/healthz", "/readyz"):
            assert status_of(service, path) in (200, 503)
        assert status_of(service, "/metrics") == 401
        assert status_of(service, "/metrics", Authorization="Bearer not-the-one") == 401
        assert status_of(service, "/metrics", Authorization=f"Bearer {TOKEN}") == 200
    with served(bench18, CDC_EMBEDDER_HTTP="0.0.0.0:0") as service:
        assert status_of(service, "/metrics") == 403


def status_of(service: Service, path: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(base(service) + path, headers=headers), timeout=60) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
