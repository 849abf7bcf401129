"""The lag budget: a database is never filled by us, even where no reader of a slot could help."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from cdc_embedder.lsn import LSN
from cdc_embedder.retention import MOST_SAMPLES, Held, Retention
from cdc_embedder.settings import Settings
from tests.documents import make_documents, make_model
from tests.servers import Bench, bench_with, bindir_15, bindir_18
from tests.service import assert_every_vector_is_of_its_text, running, status, until, wait_caught_up

MEGABYTE = 1 << 20
LIMIT = {"CDC_EMBEDDER_WAL_LIMIT_BYTES": str(40 * MEGABYTE)}


@pytest.fixture(params=["15-wal2json", "18-pgoutput"])
def own(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A server of its own: what it writes to the WAL concerns nobody else."""
    version, plugin = request.param.split("-")
    with bench_with(bindir_15() if version == "15" else bindir_18(), plugin, {}) as bench:
        make_model(bench)
        make_documents(bench, 20)
        yield bench


def open_transaction(bench: Bench) -> psycopg.Connection[Any]:
    """One that has written, and holds the slot's restart_lsn where it is."""
    session = psycopg.connect(bench.dsn_admin)
    session.execute("UPDATE documents SET body = 'of the open transaction' WHERE id = 7")
    return session


def write_wal(bench: Bench, segments: int) -> None:
    """Of 16 MB each, as the positions count."""
    for _ in range(segments):
        bench.admin.execute("SELECT pg_logical_emit_message(false, 'nothing', 'to do'), pg_switch_wal()")


def slots(bench: Bench) -> list[str]:
    return [row[0] for row in bench.admin.execute("SELECT slot_name FROM pg_replication_slots ORDER BY 1").fetchall()]


def given_up(bench: Bench) -> Any:
    return bench.admin.execute("SELECT slot, retained_bytes FROM cdc_embedder.given_up").fetchone()


def ready(log: str) -> tuple[int, str]:
    [port] = re.findall(r"health is served at http://127\.0\.0\.1:(\d+)/", log)
    with closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)) as connection:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        return response.status, json.loads(response.read())["reason"]


def test_beyond_the_limit_the_slot_is_given_up_until_somebody_wants_it_again(own: Bench) -> None:
    with running(own, CDC_EMBEDDER_SQL_EMBED="on", CDC_EMBEDDER_HTTP="127.0.0.1:0", **LIMIT) as service:
        wait_caught_up(own)
        service.wait_for_log("SQL is answered")
        holder = open_transaction(own)
        own.admin.execute("UPDATE documents SET body = 'before ' || id WHERE id < 5")
        write_wal(own, 4)
        service.wait_for_log("was given up: SELECT cdc_embedder.take_slot_again() has it made anew")
        assert slots(own) == []
        slot, retained = given_up(own)
        assert slot == own.slot
        wanted = own.admin.execute("SELECT reason, requested_at > finished_at FROM cdc_embedder.scan").fetchall()
        assert wanted == [("the slot was given up", True)]
        assert retained > 40 * MEGABYTE
        [row] = status(own)
        assert row["state"] == "stopped"
        assert "take_slot_again()" in row["reason"]
        assert ready(service.log)[0] == 503
        assert "was given up" in ready(service.log)[1]
        own.admin.execute("UPDATE documents SET body = 'meanwhile ' || id WHERE id BETWEEN 10 AND 15")
        assert service.stop() == 0
    with running(own, **LIMIT) as service:
        service.wait_for_log("was given up")
        assert slots(own) == []
        holder.commit()
        assert own.admin.execute("SELECT cdc_embedder.take_slot_again()").fetchone() == (True,)
        wait_caught_up(own)
        assert slots(own) == [own.slot]
        assert assert_every_vector_is_of_its_text(own) == 20
        assert own.admin.execute("SELECT cdc_embedder.take_slot_again()").fetchone() == (False,)
        assert service.stop() == 0
    holder.close()


def test_where_the_operator_says_so_the_slot_is_made_anew_at_once(own: Bench) -> None:
    with running(own, CDC_EMBEDDER_WAL_LIMIT_THEN="renew", **LIMIT) as service:
        wait_caught_up(own)
        with open_transaction(own) as holder:
            write_wal(own, 4)
            service.wait_for_log("dropped the slot")
            until(lambda: service.log.count("making the slot ") == 2, "it was not made again", lambda: service.log)
            own.admin.execute("UPDATE documents SET body = 'meanwhile ' || id WHERE id BETWEEN 10 AND 15")
            holder.commit()
        wait_caught_up(own)
        assert given_up(own) is None
        assert assert_every_vector_is_of_its_text(own) == 20


def test_the_limit_holds_while_the_making_of_the_slot_waits_for_an_open_transaction(own: Bench) -> None:
    holder = open_transaction(own)
    with running(own, **LIMIT) as service:
        service.wait_for_log("making the slot waits")
        write_wal(own, 4)
        service.wait_for_log("was given up")
        assert slots(own) == []
        assert given_up(own)[1] > 40 * MEGABYTE
        assert service.stop() == 0
    holder.close()


def test_a_slot_that_is_given_up_although_nothing_can_be_noted_is_dropped_all_the_same(own: Bench) -> None:
    """As on a full disk."""
    own.admin.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON cdc_embedder.given_up FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    with running(own, **LIMIT) as service:
        wait_caught_up(own)
        holder = open_transaction(own)
        own.admin.execute("UPDATE documents SET body = 'before ' || id WHERE id < 5")
        write_wal(own, 4)
        service.wait_for_log("dropped the slot")
        assert "noting that the slot is given up: no space left on device" in service.log
        holder.rollback()
        holder.close()
        wait_caught_up(own)
        assert assert_every_vector_is_of_its_text(own) == 20


def test_what_is_held_back_is_told_once_with_what_to_look_for_and_when_it_is_over(own: Bench) -> None:
    budget = {"CDC_EMBEDDER_WAL_WARN_BYTES": str(20 * MEGABYTE), "CDC_EMBEDDER_WAL_ALARM_BYTES": str(60 * MEGABYTE)}
    with running(own, **budget) as service:
        wait_caught_up(own)
        with open_transaction(own) as holder:
            write_wal(own, 3)
            service.wait_for_log(f"the slot {own.slot} holds back")
            write_wal(own, 3)
            until(lambda: "error" in held_back(service.log), "it was no error", lambda: service.log)
            holder.commit()

        def over() -> bool:
            write_wal(own, 1)
            own.admin.execute("CHECKPOINT")  # whose snapshot lets the slot's restart_lsn move
            return "within the budget again" in service.log

        until(over, "it never ended", lambda: service.log)
        assert held_back(service.log)[:2] == ["warning", "error"]
        assert "pg_stat_activity has backend_xid and xact_start" in service.log


def test_while_it_stays_as_it_is_nothing_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    retention = Retention(Settings(wal_warn_bytes=10, wal_alarm_bytes=100))
    told = []
    for retained, wal_status in ((5, "reserved"), (11, "reserved"), (50, "extended"), (5, "unreserved"), (500, "lost"),
                                 (20, "reserved"), (3, "reserved"), (4, "reserved")):  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO", "cdc_embedder"):
            retention.judge([Held("s", retained, 0, None, wal_status)])
        told.append([record.levelname for record in caplog.records])
    assert told == [[], ["WARNING"], [], ["ERROR"], [], ["WARNING"], ["INFO"], []]


def test_a_slot_that_is_lost_holds_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    """It is made anew, not given up: it still shows where it began."""
    Retention(Settings(wal_alarm_bytes=10, wal_limit_bytes=1 << 24)).judge([Held("s", 1 << 30, 0, None, "lost")])
    assert caplog.records == []


def held_back(log: str) -> list[str]:
    """The levels of the lines that say that WAL is held back."""
    return re.findall(r"(\w+) +the slot \w+ holds back", log)


def test_the_lag_in_seconds_is_since_when_the_oldest_position_behind_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("cdc_embedder.retention.time.monotonic", lambda: clock[0])
    retention = Retention(Settings())
    for second, position in enumerate((100, 100, 250, 300)):
        clock[0] = 1000.0 + second
        retention.sampled(LSN(position))
    assert retention.lag_seconds(LSN(50)) == 3.0
    assert retention.lag_seconds(LSN(100)) == 1.0
    assert retention.lag_seconds(LSN(299)) == 0.0
    assert retention.lag_seconds(LSN(300)) == 0.0
    clock[0] = 2000.0
    assert retention.lag_seconds(LSN(300)) == 0.0, "idle"


def test_a_lag_of_weeks_takes_no_more_memory_and_is_told_all_the_same() -> None:
    retention = Retention(Settings())
    for position in range(1, 3 * MOST_SAMPLES):
        retention.sampled(LSN(position))
    began = retention.lag_seconds(LSN(0))
    assert retention.remembered <= MOST_SAMPLES
    assert began >= retention.lag_seconds(LSN(MOST_SAMPLES)) > 0
