"""What the network does to a running service, by way of a proxy that misbehaves: cuts, holes, delays."""

from __future__ import annotations

import re

import psycopg
import pytest

from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import ServerGone
from cdc_embedder.rows import session
from tests.documents import make_documents, make_model
from tests.faults.application import Application, converges, more_commits, served
from tests.faults.proxy import BOTH, Direction, proxied
from tests.servers import Bench
from tests.service import Service, until, wait_caught_up


def test_a_stream_may_be_cut_in_the_middle_of_a_message(bench: Bench) -> None:
    make_model(bench)
    make_documents(bench, 5)
    bench.admin.execute("ALTER TABLE documents ALTER body SET STORAGE EXTERNAL")
    with (
        proxied(bench.server.port) as proxy,
        served(bench, CDC_EMBEDDER_REPLICATION_DSN=proxy.dsn(bench.dsn_service)) as service,
    ):
        wait_caught_up(bench)
        for n, allowance in enumerate((1, 1000, 50_000)):
            proxy.cut_after(allowance)
            bench.admin.execute(
                "INSERT INTO documents (body) SELECT repeat(n::text, 100000) FROM generate_series(1, 3) n"
            )
            converges(bench)
            assert proxy.cuts == n + 1
            assert len(rests(service)) == n + 1


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_every_connection_may_be_cut_at_once(bench18: Bench, reset: bool) -> None:
    make_model(bench18)
    make_documents(bench18, 20)
    with (
        proxied(bench18.server.port) as proxy,
        served(bench18, CDC_EMBEDDER_DSN=proxy.dsn(bench18.dsn_service)),
        Application(bench18.dsn_admin, 3) as application,
    ):
        for _ in range(3):
            more_commits(application)
            proxy.cut(reset=reset)
        application.stop()
        converges(bench18)


def test_a_slow_network_is_only_slow(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 20)
    with (
        proxied(bench18.server.port) as proxy,
        served(bench18, CDC_EMBEDDER_DSN=proxy.dsn(bench18.dsn_service)) as service,
    ):
        wait_caught_up(bench18)
        proxy.delay(0.1)
        bench18.admin.execute("UPDATE documents SET body = 'by a long way ' || id")
        converges(bench18)
        assert service.log.count("streaming from the slot") == 1


@pytest.mark.parametrize("directions", [("to client",), ("to server",), BOTH], ids=["to_client", "to_server", "both"])
def test_a_stream_that_is_half_open_is_given_up(bench18: Bench, directions: tuple[Direction, ...]) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    with (
        proxied(bench18.server.port) as proxy,
        served(
            bench18,
            CDC_EMBEDDER_REPLICATION_DSN=proxy.dsn(bench18.dsn_service),
            CDC_EMBEDDER_WAL_SENDER_TIMEOUT_S="2",
        ) as service,
    ):
        wait_caught_up(bench18)
        proxy.swallow(*directions)
        bench18.admin.execute("INSERT INTO documents (body) VALUES ('into the hole')")
        service.wait_for_log("trying again in")
        proxy.heal()
        converges(bench18)


def test_a_service_behind_a_hole_comes_back(bench18: Bench) -> None:
    """Neither end hears a goodbye: the server must let go of the advisory lock and the slot by itself."""
    make_model(bench18)
    make_documents(bench18, 50)
    with (
        proxied(bench18.server.port) as proxy,
        served(
            bench18, CDC_EMBEDDER_DSN=proxy.dsn(bench18.dsn_service), CDC_EMBEDDER_WAL_SENDER_TIMEOUT_S="2"
        ) as service,
    ):
        wait_caught_up(bench18)
        proxy.swallow(*BOTH)
        bench18.admin.execute("UPDATE documents SET body = 'from the other side ' || id")
        service.wait_for_log("trying again in")
        proxy.heal()
        converges(bench18)


@pytest.mark.asyncio
async def test_an_answer_that_never_comes_ends_the_session(bench18: Bench) -> None:
    """A proxy whose kernel still acknowledges is noticed by no keepalive."""
    with proxied(bench18.server.port) as proxy:
        connection = await session.connect(proxy.dsn(bench18.dsn_service), "test", statement_timeout="500")
        assert isinstance(connection, session.Session)
        assert connection.answer_within_s == 0.5 + session.GRACE_SECONDS
        with pytest.raises(psycopg.errors.QueryCanceled):  # the server's own limit comes first where it answers
            await connection.execute("SELECT pg_sleep(9)")
        connection.answer_within_s = 0.2
        await connection.execute("LISTEN nothing")
        async for _ in connection.notifies(timeout=0.6):
            raise AssertionError("nobody notified")
        # the server notices for itself that we are gone, and lets go of the advisory lock
        assert await session.one(connection, "SHOW tcp_keepalives_idle") == ("10",)
        assert await session.one(connection, "SHOW tcp_user_timeout") == ("30000",)
        async with connection.transaction():
            await connection.execute("SELECT pg_sleep(0.4)")
        proxy.swallow("to client")
        with pytest.raises(psycopg.OperationalError) as raised:
            await connection.execute("SELECT 1")
        assert isinstance(from_database(raised.value, "waiting"), ServerGone)
        await connection.close()


def test_a_stream_that_is_never_started_is_given_up(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    with proxied(bench18.server.port) as proxy:
        proxy.swallow_from(b"START_REPLICATION")
        with served(
            bench18,
            CDC_EMBEDDER_REPLICATION_DSN=proxy.dsn(bench18.dsn_service),
            CDC_EMBEDDER_WAL_SENDER_TIMEOUT_S="1",
        ) as service:
            service.wait_for_log("did not start the replication stream within 1 seconds")
            proxy.heal()
            converges(bench18)


def test_the_server_is_asked_ever_less_often_and_never_in_a_loop(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    with (
        proxied(bench18.server.port) as proxy,
        served(bench18, CDC_EMBEDDER_DSN=proxy.dsn(bench18.dsn_service)) as service,
    ):
        wait_caught_up(bench18)
        before = proxy.accepted
        proxy.refuse()
        until(lambda: len(rests(service)) >= 4, "it gave up", lambda: service.log)
        asked, told = proxy.accepted - before, rests(service)
        assert asked <= len(told)  # the first line is about the cut, each other one about one attempt
        for n, rest in enumerate(told):
            longest = min(30.0, 0.25 * 2 ** (n + 1))
            assert longest / 2 - 0.06 <= rest <= longest + 0.06
        proxy.heal()
        bench18.admin.execute("INSERT INTO documents (body) VALUES ('at last')")
        converges(bench18)


def rests(service: Service) -> list[float]:
    return [float(found) for found in re.findall(r"trying again in ([0-9.]+) s", service.log)]
