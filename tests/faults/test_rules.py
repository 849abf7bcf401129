"""Each rule at the one moment where breaking it costs a row. Quick and certain: the mutants are told by these.

None of them waits for what a broken service would never do: what is wrong is there to be seen.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import pytest_asyncio

from cdc_embedder import catalog
from cdc_embedder.embedded import Server
from cdc_embedder.embedding.fake import fake_vector
from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Pending, Spill
from cdc_embedder.routing import Router
from cdc_embedder.rows import backlog, requests
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.rows.writeback import Term, Write, WriteBack
from cdc_embedder.wal.messages import Begin
from cdc_embedder.wal.pgoutput import PgOutputDecoder
from cdc_embedder.wal.wal2json import Wal2JsonDecoder
from cdc_embedder.watermark import Watermark
from tests.documents import configure_documents, make_documents, make_model
from tests.servers import Bench, bench_with
from tests.service import (
    Service,
    assert_every_vector_is_of_its_text,
    confirmed,
    running,
    standby_gone,
    status,
    until,
    wait_caught_up,
    waiting_for_standby,
)

SOON = "cdc_embedder.pipeline.TRIAL_SECONDS=0.1"


def one(bench: Bench, statement: str, *parameters: object) -> Any:
    """The only value of the only row."""
    row = bench.admin.execute(statement, parameters or None).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


def here(bench: Bench) -> str:
    return str(one(bench, "SELECT pg_current_wal_insert_lsn()::text"))


def past(bench: Bench, lsn: str) -> bool:
    """Whether the slot is confirmed beyond that position."""
    return bool(
        one(
            bench,
            "SELECT confirmed_flush_lsn > %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s",
            lsn,
            bench.slot,
        )
    )


def holds_vector_of(bench: Bench, id: int, text: str) -> bool:
    stored = one(bench, "SELECT embedding::real[] FROM documents WHERE id = %s", id)
    return stored is not None and np.allclose(stored, fake_vector("fake", text, 8), atol=2e-3)


@pytest.fixture
def down(tmp_path: Path) -> Path:
    """While this file exists, the model is down."""
    tmp_path.chmod(0o755)
    return tmp_path / "down"


@pytest_asyncio.fixture
async def session(bench18: Bench) -> AsyncIterator[Connection]:
    """A pinned session of the service's role."""
    connection = await connect(bench18.dsn_service, "test")
    yield connection
    await connection.close()


def test_rule_1_what_could_not_be_written_is_not_confirmed_not_even_by_a_stop(bench18: Bench) -> None:
    """The row is locked by somebody. What comes after it is written; the slot stays before it."""
    make_model(bench18)
    make_documents(bench18, 3)
    with running(bench18) as service:
        wait_caught_up(bench18)
        assert service.stop() == 0
        before = here(bench18)
        bench18.admin.execute("UPDATE documents SET body = 'changed and then locked' WHERE id = 1")
        with psycopg.connect(bench18.dsn_admin) as holder:
            holder.execute("SELECT FROM documents WHERE id = 1 FOR UPDATE")
            service.start()
            bench18.admin.execute("UPDATE documents SET body = 'beside it' WHERE id = 2")
            until(lambda: holds_vector_of(bench18, 2, "beside it"), "a neighbour waits", lambda: service.log)
            assert service.stop() == 0
            assert not past(bench18, before)
        service.start()
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 3


@pytest.mark.parametrize(
    ("decoder", "payload"),
    [
        (PgOutputDecoder(), bytes.fromhex("43 00 0000000001550528 0000000001550558 0000000000000000")),
        (Wal2JsonDecoder(), b'{"action":"C","lsn":"0/1550528","nextlsn":"0/1550558"}'),
    ],
    ids=["pgoutput", "wal2json"],
)
def test_rule_1_a_transaction_ends_where_the_server_says(decoder: Any, payload: bytes) -> None:
    """Not where its commit record begins, nor after as many bytes as the message has."""
    watermark = Watermark()
    router = Router(watermark)
    router.route([Begin(900, LSN(0x1550528)), *decoder.decode(payload)], 0.0)
    assert watermark.flushed == LSN(0x1550558)


def test_rule_1_a_vector_whose_change_was_confirmed_survives_a_crash(pg18: Server, down: Path) -> None:
    """Whatever `synchronous_commit` says. The server's own habit of flushing sooner or later is put to sleep."""
    hostile = {"synchronous_commit": "off", "wal_writer_delay": "10s", "bgwriter_lru_maxpages": "0"}
    with bench_with(pg18.bindir, "pgoutput", hostile) as bench:
        bench.admin.execute("SET synchronous_commit = on")
        make_model(bench, down_while_exists=str(down))
        make_documents(bench, 3)
        bench.admin.execute("CREATE TABLE other (n int)")
        with running(bench) as service:
            wait_caught_up(bench)
            walwriter = one(bench, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
            stop_between_writes(bench, walwriter)
            try:
                # A slot is saved when it is confirmed past a snapshot, and holds one at a time in mind. So none is left
                # before the one that has to count.
                before = snapshot(bench)
                until(lambda: confirmed(bench, before), "never confirmed", lambda: service.log)
                down.touch()
                bench.admin.execute("UPDATE documents SET body = 'confirmed' WHERE id = 1")
                changed = here(bench)
                snapshot(bench)
                down.unlink()
                until(lambda: confirmed(bench, changed), "never confirmed", lambda: service.log)
                until(lambda: saved(bench) >= LSN.parse(changed), "never saved", lambda: service.log)
            finally:  # stopped it would hold up DROP DATABASE for ever
                os.kill(walwriter, signal.SIGKILL)  # the server takes that for a crash
            until(lambda: ended(bench), "the server never noticed")
            until(lambda: answers(bench), "the server never came back")
            bench.admin = psycopg.connect(bench.dsn_admin, autocommit=True)
            assert confirmed(bench, changed), "the slot came back as it was before: nothing was tested"
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench) == 3


def snapshot(bench: Bench) -> str:
    """Logs the running transactions, and flushes that. Returns the position after it."""
    bench.admin.execute("SELECT pg_log_standby_snapshot()")
    bench.admin.execute("INSERT INTO other VALUES (1)")
    return here(bench)


def saved(bench: Bench) -> int:
    """What the slot's file says is confirmed (`ReplicationSlotOnDisk`, PostgreSQL 18)."""
    state: bytes = one(bench, "SELECT pg_read_binary_file(format('pg_replslot/%%s/state', %s::text))", bench.slot)
    assert state[16:].startswith(bench.slot.encode() + b"\0")
    return int.from_bytes(state[112:120], sys.byteorder)


def stop_between_writes(bench: Bench, pid: int) -> None:
    """SIGSTOP for the WAL writer. Stopped while it writes it holds locks, and nobody else would ever get on."""
    for _ in range(20):
        os.kill(pid, signal.SIGSTOP)
        with psycopg.connect(bench.dsn_admin, autocommit=True, options="-c synchronous_commit=on") as session:
            message = "SELECT pg_logical_emit_message(true, 'nobody', repeat('x', 100000))"
            writing = threading.Thread(target=session.execute, args=(message,))
            writing.start()
            writing.join(5)
            if not writing.is_alive():
                return
            os.kill(pid, signal.SIGCONT)
            writing.join()
    raise AssertionError("the WAL writer was never met between two writes")


def ended(bench: Bench) -> bool:
    try:
        bench.admin.execute("SELECT")
    except psycopg.OperationalError:
        return True
    return False


def answers(bench: Bench) -> bool:
    try:
        psycopg.connect(bench.dsn_admin).close()
    except psycopg.OperationalError:
        return False
    return True


def test_rule_2_a_change_that_is_decoded_and_not_visible_is_judged_when_it_is(bench18: Bench) -> None:
    """The standby that the commit waits for is gone. A later change is worked off meanwhile."""
    make_model(bench18)
    make_documents(bench18, 3)
    admin = bench18.admin
    with running(bench18) as service:
        wait_caught_up(bench18)
        writer = psycopg.connect(bench18.dsn_admin, autocommit=True)
        with standby_gone(bench18):
            commit = threading.Thread(
                target=writer.execute, args=("UPDATE documents SET body = 'seen late' WHERE id = 1",)
            )
            commit.start()
            until(lambda: waiting_for_standby(bench18), "no wait")
            admin.execute("SET synchronous_commit = local")
            admin.execute("UPDATE documents SET body = 'seen at once' WHERE id = 2")
            until(lambda: holds_vector_of(bench18, 2, "seen at once"), "held up", lambda: service.log)
        commit.join()
        writer.close()
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 3


@pytest.mark.asyncio
async def test_rule_4_a_write_that_fails_leaves_nothing_in_the_ledger(bench18: Bench, session: Connection) -> None:
    make_model(bench18)
    make_documents(bench18, 2)
    bench18.admin.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON documents FOR EACH ROW WHEN (NEW.id = 2) EXECUTE FUNCTION refuse()"
    )
    [column] = await catalog.load(session, bench18.slot)
    writes = [Write((n,), hashlib.sha256(f"\x01text {n}".encode()).digest(), has_vector=True) for n in "12"]
    term = Term(bench18.slot, await requests.take_term(session, bench18.slot, "a test"))
    with pytest.raises(psycopg.errors.RaiseException):
        await WriteBack(session, column, term).write(writes, np.full((2, 8), 8**-0.5, np.float32))
    assert one(bench18, "SELECT count(*) FROM cdc_embedder.ledger_1") == 0
    assert one(bench18, "SELECT count(embedding) FROM documents") == 0
    bench18.admin.execute("DROP TRIGGER refuse ON documents")
    assert await WriteBack(session, column, term).write(writes, np.full((2, 8), 8**-0.5, np.float32)) == {0, 1}


def test_rule_7_who_was_with_the_model_beside_a_killer_is_not_blamed(bench18: Bench) -> None:
    make_model(bench18, exit="deadly")
    make_documents(bench18, 3)
    bench18.admin.execute("INSERT INTO documents (id, body) VALUES (999, 'a deadly text')")
    with running(bench18, "tests.faults.failing", CDC_TEST_SET=SOON) as service:

        def set_aside() -> list[Any]:
            if service.exit_status is not None:
                assert service.exit_status == 139, service.log
                service.start()
            return bench18.admin.execute("SELECT key ->> 'id' FROM cdc_embedder.failed").fetchall()

        until(set_aside, "the killer is not found", lambda: service.log)
        until(
            lambda: [(row["state"], row["pending"]) for row in status(bench18)] == [("live", 0)],
            "never done",
            lambda: service.log,
        )
        assert set_aside() == [("999",)]
        assert one(bench18, "SELECT count(embedding) FROM documents") == 3


def test_rule_8_what_could_not_be_spilled_is_not_confirmed_not_even_by_a_stop(bench18: Bench, down: Path) -> None:
    make_model(bench18, down_while_exists=str(down))
    make_documents(bench18, 3)
    with running(bench18, CDC_EMBEDDER_SPILL_AFTER_S="0.1") as service:
        wait_caught_up(bench18)
        down.touch()
        with psycopg.connect(bench18.dsn_admin) as holder:
            holder.execute("LOCK TABLE cdc_embedder.backlog_1 IN SHARE MODE")
            before = here(bench18)
            bench18.admin.execute("UPDATE documents SET body = 'not spilled' WHERE id = 1")
            service.wait_for_log("spilling keys of public.documents.embedding: canceling statement due to lock timeout")
            assert service.stop() == 0
            assert not past(bench18, before)
        down.unlink()
        service.start()
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 3


@pytest.mark.asyncio
async def test_rule_8_a_row_of_the_backlog_goes_only_with_the_judgement_of_its_last_spill(
    bench18: Bench, session: Connection
) -> None:
    """The key was taken up, changed again and spilled again, before the first judgement came back."""
    make_model(bench18)
    make_documents(bench18, 1)
    [column] = await catalog.load(session, bench18.slot)
    pending, term = (
        Pending(watermark := Watermark()),
        Term(bench18.slot, await requests.take_term(session, bench18.slot, "test")),
    )

    def changed(xid: int, at: int) -> list[Spill]:
        pending.change(("1",), watermark.begin(LSN(at)), xid, now=0.0)
        return pending.holding(0.0, 10)

    first, fresh = await backlog.spill(session, column, term, changed(900, 10))
    assert fresh == 1
    pending.clear()
    again, fresh = await backlog.spill(session, column, term, changed(901, 20))
    assert (fresh, await backlog.remove(session, column, [(("1",), first)])) == (0, 0)
    [row] = await backlog.page(session, column, 0)
    assert row.seq == again > first
    assert await backlog.remove(session, column, [(("1",), again)]) == 1
    assert await backlog.page(session, column, 0) == []


def test_rule_8_what_was_taken_up_stays_in_the_backlog_until_it_is_written(bench18: Bench) -> None:
    make_model(bench18, delay_s=3.0)
    make_documents(bench18)
    with running(bench18, CDC_EMBEDDER_SPILL_AFTER_S="0.1") as service:
        wait_caught_up(bench18)
        before = here(bench18)
        bench18.admin.execute("INSERT INTO documents (id, body) VALUES (1, 'takes long')")
        until(lambda: past(bench18, before), "never confirmed", lambda: service.log)
        time.sleep(1.0)  # it is with the model, and looked for in the backlog several times
        assert one(bench18, "SELECT count(embedding) FROM documents") == 0
        assert one(bench18, "SELECT count(*) FROM cdc_embedder.backlog_1") == 1
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 1
        until(lambda: one(bench18, "SELECT count(*) FROM cdc_embedder.backlog_1") == 0, "it stays")


def quiet(bench: Bench, service: Service) -> None:
    """As far as the service knows nothing is left to do. Nobody counts rows here: that would find what it lost."""
    end = here(bench)
    until(lambda: confirmed(bench, end), "never confirmed", lambda: service.log)
    until(lambda: status(bench)[0]["state"] == "live", "never live", lambda: service.log)


def test_rule_10_a_scan_that_began_before_the_stream_covered_every_transaction_is_made_again(bench18: Bench) -> None:
    """The rows of a transaction that was open all the while are in neither."""
    make_model(bench18)
    make_documents(bench18, configure=False)
    with running(bench18) as service:
        service.wait_for_log("streaming from the slot")
        with psycopg.connect(bench18.dsn_admin) as early:
            early.execute("INSERT INTO documents (body) SELECT 'early ' || n FROM generate_series(1, 5) n")
            configure_documents(bench18)

            def over() -> bool:
                [row] = status(bench18)
                return row["state"] == "live" or "transactions that were open" in (row["reason"] or "")

            until(over, "no head start", lambda: service.log)
        quiet(bench18, service)
        assert assert_every_vector_is_of_its_text(bench18) == 5


def test_rule_10_a_slot_that_is_made_anew_is_a_reason_to_scan(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 3)
    with running(bench18) as service:
        wait_caught_up(bench18)
        assert service.stop() == 0
        bench18.admin.execute("SELECT pg_drop_replication_slot(%s)", (bench18.slot,))
        bench18.admin.execute("UPDATE documents SET body = 'unheard' WHERE id = 1")
        service.start()
        until(lambda: service.log.count("streaming from") == 2, "no stream", lambda: service.log)
        bench18.admin.execute("UPDATE documents SET body = 'heard' WHERE id = 2")
        until(lambda: holds_vector_of(bench18, 2, "heard"), "not heard", lambda: service.log)
        quiet(bench18, service)
        assert assert_every_vector_is_of_its_text(bench18) == 3


def test_rule_10_a_scan_that_goes_on_after_a_kill_has_passed_over_no_row(bench18: Bench) -> None:
    make_model(bench18, delay_s=0.1)
    make_documents(bench18, 60)
    steps = "cdc_embedder.rows.scan.PAGE=5 cdc_embedder.scanning.CHECKPOINT_SECONDS=0.02"
    kill = {"CDC_TEST_KILL_AT": "checkpoint", "CDC_TEST_KILL_AFTER": "2"}
    with running(bench18, "tests.faults.failing", CDC_TEST_SET=steps, **kill) as service:
        assert service.wait() == -signal.SIGKILL
    with running(bench18, "tests.faults.failing", CDC_TEST_SET=SOON) as service:
        service.wait_for_log("goes on after")
        quiet(bench18, service)
        assert assert_every_vector_is_of_its_text(bench18) == 60
