"""Rule 5: no statement of the application fails, and none waits for longer than a small write, because of us."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.documents import configure_documents, make_documents, make_model, target_type
from tests.servers import SERVICE_ROLE, Bench
from tests.service import (
    Service,
    assert_every_vector_is_of_its_text,
    confirmed,
    running,
    status,
    until,
    wait_caught_up,
)

Work = Callable[[psycopg.Connection, random.Random], None]


class Application:
    """Sessions that each do their work over and over, and give up a lock after a second; nothing may fail."""

    def __init__(self, dsn: str, *works: Work) -> None:
        self._dsn = dsn
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(work, n)) for n, work in enumerate(works)]
        self.rounds = [0] * len(works)
        self.errors: list[str] = []

    def __enter__(self) -> Application:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _run(self, work: Work, n: int) -> None:
        chance = random.Random(n)
        with psycopg.connect(self._dsn, autocommit=True, options="-c lock_timeout=1s") as connection:
            while not self._enough.is_set() and len(self.errors) < 10:
                try:
                    work(connection, chance)
                except psycopg.Error as error:
                    self.errors.append(f"{error.sqlstate}: {error}")
                self.rounds[n] += 1
                self._enough.wait(0.002)

    def has_done(self, rounds: int) -> bool:
        assert self.errors == []
        return min(self.rounds) >= rounds


SAMPLE = """
SELECT (SELECT count(*) FROM pg_stat_activity
         WHERE usename = %(role)s AND datname = current_database() AND state LIKE 'idle in transaction%%'),
       (SELECT count(*) FROM pg_stat_activity
         WHERE usename = %(role)s AND datname = current_database() AND application_name NOT LIKE 'cdc-embedder %%')
"""


def good_manners_until(bench: Bench, service: Service, enough: Callable[[], bool]) -> None:
    """No session of ours ever idles in a transaction, or goes without its name."""

    def looked() -> bool:
        seen = bench.admin.execute(SAMPLE, {"role": SERVICE_ROLE}).fetchone()
        assert seen == (0, 0)
        return enough()

    service.wait_for_log("streaming from the slot")  # the slot is made in a transaction of several statements
    until(looked, "the application never got that far", lambda: status(bench))


def insert(connection: psycopg.Connection, chance: random.Random) -> None:
    connection.execute(
        "INSERT INTO documents (body) SELECT 'new ' || %s || n FROM generate_series(1, 5) n", (chance.random(),)
    )


def update(connection: psycopg.Connection, chance: random.Random) -> None:
    connection.execute(
        "UPDATE documents SET body = 'changed ' || %s WHERE id = %s", (chance.random(), chance.randint(1, 300))
    )


def touch(connection: psycopg.Connection, chance: random.Random) -> None:
    connection.execute(
        "UPDATE documents SET views = views + 1 WHERE id <= 300 AND id %% 7 = %s", (chance.randrange(7),)
    )


def delete(connection: psycopg.Connection, chance: random.Random) -> None:
    connection.execute("DELETE FROM documents WHERE id = %s", (chance.randint(100, 2000),))


def written(bench: Bench) -> int:
    """Rows that we have written so far."""
    [(count,)] = bench.admin.execute("SELECT count(*) FROM cdc_embedder.ledger_1").fetchall()
    return int(count)


def test_no_statement_of_the_application_fails_because_of_a_write_back(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 300)
    with running(bench18) as service:
        with Application(bench18.dsn_admin, insert, update, touch, delete) as application:
            good_manners_until(bench18, service, lambda: application.has_done(300) and written(bench18) > 100)
        assert application.errors == []
        wait_caught_up(bench18)
        assert_every_vector_is_of_its_text(bench18)
        assert bench18.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)


def downwards(connection: psycopg.Connection, chance: random.Random) -> None:
    """Locks many rows one after another, the greatest key first; we take them the other way round."""
    with connection.transaction():
        for id in range(60, 0, -1):
            connection.execute("UPDATE documents SET body = %s WHERE id = %s", (f"down {chance.random()}", id))


def test_the_application_may_lock_rows_in_the_other_order(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 60)
    with running(bench18) as service:
        wait_caught_up(bench18)
        with Application(bench18.dsn_admin, downwards, downwards) as application:
            good_manners_until(bench18, service, lambda: application.has_done(40))
        assert application.errors == []
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 60
        deadlocks = bench18.admin.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        assert deadlocks.fetchone() == (0,)


def move(connection: psycopg.Connection, chance: random.Random) -> None:
    """To another partition, and with another text now and then."""
    text = f"moved {chance.random()} " + LONG if chance.random() < 0.5 else None
    connection.execute(
        "UPDATE documents SET part = 1 - part, body = coalesce(%s, body) WHERE id = %s", (text, chance.randint(1, 40))
    )


LONG = "far " * 50_000
"""Long enough for a statement to take a while between its snapshot and its locks."""


def test_rows_that_move_between_partitions_cost_the_application_no_error(bench: Bench) -> None:
    """Whoever meets a row on its way gets a serialization failure, in spite of SKIP LOCKED: it must be us."""
    make_model(bench)
    bench.admin.execute(
        f"CREATE TABLE documents (id bigint, part int, body text, embedding {target_type(bench)},"
        " PRIMARY KEY (id, part)) PARTITION BY LIST (part)"
    )
    for part in (0, 1):
        bench.admin.execute(f"CREATE TABLE documents_{part} PARTITION OF documents FOR VALUES IN ({part})")
    bench.admin.execute("INSERT INTO documents SELECT n, n %% 2, n || %s FROM generate_series(1, 40) n", (LONG,))
    bench.grant("documents", ["id", "part"], ["body"], "embedding")
    configure_documents(bench)
    with running(bench) as service:
        wait_caught_up(bench)
        with Application(bench.dsn_admin, move) as application:
            good_manners_until(bench, service, lambda: "moved to another partition" in service.log)
        assert application.errors == []
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 40
        assert bench.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)
        assert " error " not in service.log
        assert service.log.count("streaming from the slot") == 1


def test_a_row_that_is_held_for_long_holds_up_neither_its_neighbours_nor_the_slot(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 20)
    with running(bench18, CDC_EMBEDDER_SPILL_AFTER_S="1"):
        wait_caught_up(bench18)
        with psycopg.connect(bench18.dsn_admin, options="-c lock_timeout=1s") as holder:
            bench18.admin.execute("UPDATE documents SET body = 'to be held' WHERE id = 7")
            holder.execute("SELECT FROM documents WHERE id = 7 FOR UPDATE")
            bench18.admin.execute("UPDATE documents SET body = 'a neighbour' WHERE id <> 7")
            target = bench18.admin.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]  # type: ignore[index]
            until(lambda: confirmed(bench18, target), "a held row held the slot", lambda: status(bench18))
            until(lambda: status(bench18)[0]["current"] >= 19, "its neighbours waited", lambda: status(bench18))
            holder.execute("UPDATE documents SET views = 1 WHERE id = 7")  # nobody stands in the holder's way
            holder.commit()
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 20


def alter(connection: psycopg.Connection, chance: random.Random) -> None:
    name = f"extra_{chance.randrange(10**9)}"
    connection.execute(f"ALTER TABLE documents ADD {name} int")
    connection.execute(f"ALTER TABLE documents DROP {name}")


def test_the_application_may_alter_the_table_while_we_write(bench18: Bench) -> None:
    """ALTER TABLE queues behind whoever uses the table, and everybody else behind it."""
    make_model(bench18)
    make_documents(bench18, 3000)
    with running(bench18) as service:
        with Application(bench18.dsn_admin, update, alter) as application:
            good_manners_until(bench18, service, lambda: application.has_done(40) and "complete" in service.log)
        assert application.errors == []
        wait_caught_up(bench18)
        assert_every_vector_is_of_its_text(bench18)


RECORD = """
CREATE TABLE seen (name text PRIMARY KEY, value text);
CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO seen SELECT name, current_setting(name)
      FROM unnest('{application_name, lock_timeout, idle_in_transaction_session_timeout, statement_timeout,
                    transaction_isolation, synchronous_commit}'::text[]) name
        ON CONFLICT DO NOTHING;
    RETURN NEW;
END $$;
CREATE TRIGGER record AFTER UPDATE OF embedding ON documents FOR EACH ROW EXECUTE FUNCTION record();
"""


def test_our_sessions_have_a_name_and_time_limits(bench18: Bench) -> None:
    make_model(bench18)
    make_documents(bench18, 5)
    bench18.admin.execute(RECORD)
    for name, value in {"default_transaction_isolation": "serializable", "lock_timeout": "0"}.items():
        bench18.admin.execute(f"ALTER ROLE {SERVICE_ROLE} IN DATABASE {bench18.database} SET {name} = '{value}'")
    with running(bench18) as service:
        # a trigger's function that finds its tables by the application's search_path does not find them by ours
        until(lambda: status(bench18)[0]["state"] == "error", "the trigger was never met", lambda: service.log)
        assert "ALTER FUNCTION … SET search_path" in status(bench18)[0]["reason"]
        bench18.admin.execute("ALTER FUNCTION record() SET search_path = public")
        until(lambda: status(bench18)[0]["state"] == "live", "it never healed", lambda: service.log)
        wait_caught_up(bench18)
        good_manners_until(bench18, service, lambda: True)
        assert assert_every_vector_is_of_its_text(bench18) == 5
    seen: dict[str, Any] = dict(bench18.admin.execute("SELECT name, value FROM seen").fetchall())
    assert seen.pop("application_name").startswith("cdc-embedder write")
    assert seen == {
        "lock_timeout": "1s",
        "idle_in_transaction_session_timeout": "30s",
        "statement_timeout": "1min",
        "transaction_isolation": "read committed",
        "synchronous_commit": "local",
    }


AUDIT = """
CREATE TABLE fired (name text);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
BEGIN
    INSERT INTO fired VALUES (TG_NAME);
    RETURN NEW;
END $$;
CREATE TRIGGER ordinary BEFORE UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER always BEFORE UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION audit();
ALTER TABLE documents ENABLE ALWAYS TRIGGER always;
"""


@pytest.mark.parametrize("may", [True, False], ids=["may", "may_not"])
def test_a_write_back_fires_no_ordinary_trigger_where_the_role_may_suppress_them(bench18: Bench, may: bool) -> None:
    """A superuser may. A table of changes, or an updated_at, tells of the application's changes then, not of ours."""
    make_model(bench18)
    make_documents(bench18, 5)
    bench18.admin.execute(AUDIT)
    with running(bench18, CDC_EMBEDDER_DSN=bench18.dsn_admin if may else bench18.dsn_service):
        wait_caught_up(bench18)
        bench18.admin.execute("TRUNCATE fired")
        bench18.admin.execute("UPDATE documents SET body = 'changed by the application' WHERE id <= 2")
        wait_caught_up(bench18)
        assert assert_every_vector_is_of_its_text(bench18) == 5
    fired = bench18.admin.execute("SELECT name, count(*) FROM fired GROUP BY name").fetchall()
    assert dict(fired) == {"always": 4, "ordinary": 2 if may else 4}
