"""Rule 8: the backlog on real servers, with keys of every kind. A row of it stands for a change; none may be lost."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from cdc_embedder import catalog
from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.errors import SlotBusy
from cdc_embedder.lsn import LSN
from cdc_embedder.pending import Key, Pending, Spill
from cdc_embedder.rows import backlog, requests
from cdc_embedder.rows.backlog import Spilled
from cdc_embedder.rows.session import Connection, connect
from cdc_embedder.rows.session import one as first_row
from cdc_embedder.rows.writeback import Term
from cdc_embedder.watermark import Watermark
from tests.servers import SERVICE_ROLE, Bench, bench_with, bindir_18, make_bench

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["15", "18"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A fresh database on each server; the plugin makes no difference here."""
    yield from make_bench(request.getfixturevalue(f"pg{request.param}"), "pgoutput")


@pytest.fixture
def bench15(request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield from make_bench(request.getfixturevalue("pg15"), "pgoutput")


@pytest.fixture
def own() -> Iterator[Bench]:
    """A server of its own, which may crash."""
    with bench_with(bindir_18(), "pgoutput", {"wal_writer_delay": "10s"}) as bench:
        yield bench


@pytest_asyncio.fixture
async def session(bench: Bench) -> AsyncIterator[Connection]:
    """A pinned session of the service's role."""
    connection = await connect(bench.dsn_service, "test")
    yield connection
    await connection.close()


async def configured(
    session: Connection, bench: Bench, key: str = "id int", names: str = "id", table: str = "documents"
) -> EmbeddingColumn:
    """A table with this key, and its column as the service sees it."""
    bench.admin.execute(f"CREATE TABLE {table} ({key}, body text, embedding real[], PRIMARY KEY ({names}))")
    bench.grant(table, [name.strip('"') for name in names.split(",")], ["body"], "embedding")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.model (name, backend, dimensions) VALUES ('fake', 'fake', 4) ON CONFLICT DO NOTHING"
    )
    bench.admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES (%s, '{body}', 'embedding', 'fake')",
        (table,),
    )
    column = (await catalog.load(session, bench.slot))[-1]
    assert (column.table, column.fault) == (table, None)
    await requests.take_term(session, bench.slot, "a test")
    return column


def changed(*changes: tuple[Key, int, int]) -> list[Spill]:
    """(key, where its commit begins, its xid) as memory would give them."""
    watermark = Watermark()
    found = []
    for key, commit, xid in changes:
        pending = Pending(watermark)
        pending.change(key, watermark.begin(LSN(commit)), xid, 0.0)
        found += pending.holding(0.0, 1)
    return found


async def spill(session: Connection, column: EmbeddingColumn, spills: list[Spill]) -> tuple[int, int]:
    """As the present leader does it."""
    leader = await first_row(session, "SELECT slot, term FROM cdc_embedder.leader")
    assert leader is not None
    return await backlog.spill(session, column, Term(*leader), spills)


def rows(bench: Bench, column: int = 1) -> list[tuple[Any, ...]]:
    return bench.admin.execute(
        f"SELECT key_1::text, first_lsn - '0/0', last_lsn - '0/0', seq FROM cdc_embedder.backlog_{column} ORDER BY seq"
    ).fetchall()


async def test_a_key_that_is_spilled_again_keeps_where_it_is_held_and_renews_the_rest(
    bench: Bench, session: Connection
) -> None:
    column = await configured(session, bench)
    first, fresh = await spill(session, column, changed((("1",), 100, 5), (("2",), 110, 6)))
    assert fresh == 2
    assert rows(bench) == [("1", 100, 100, first), ("2", 110, 110, first + 1)]
    again, fresh = await spill(session, column, changed((("1",), 200, 7), (("3",), 210, 7)))
    assert fresh == 1
    assert again > first + 1
    assert rows(bench) == [("2", 110, 110, first + 1), ("1", 100, 200, again), ("3", 210, 210, again + 1)]


async def test_what_came_in_flight_is_spilled_with_what_is_in_flight_as_one_row(
    bench: Bench, session: Connection
) -> None:
    column = await configured(session, bench)
    first, fresh = await spill(session, column, changed((("1",), 100, 5), (("1",), 120, 6), (("2",), 130, 7)))
    assert fresh == 2
    assert rows(bench) == [("1", 100, 120, first + 1), ("2", 130, 130, first + 2)]


SPELLINGS = [
    ("id numeric", "1.0", "1.00"),
    ("id double precision", "0", "-0"),
    ('id "Ci Text".citext', "A", "a"),
    ("id character(4)", "a   ", "a"),
    ("id interval", "1 mon", "30 days"),
    ("id jsonb", '{"a": 1}', '{"a":1.0}'),
]


async def test_two_spellings_of_a_key_are_one_row_that_only_the_later_change_settles(
    bench: Bench, session: Connection
) -> None:
    """Else the end of the earlier one, which may be in flight, would remove what stands for the later one."""
    bench.admin.execute(
        'CREATE SCHEMA "Ci Text"; CREATE EXTENSION citext SCHEMA "Ci Text";'
        f'GRANT USAGE ON SCHEMA "Ci Text" TO {SERVICE_ROLE}'
    )
    for n, (key, one, other) in enumerate(SPELLINGS):
        column = await configured(session, bench, key, table=f"t{n}")
        first, fresh = await spill(session, column, changed(((one,), 200, 9), ((other,), 100, 8)))
        assert (fresh, [row[1:] for row in rows(bench, column.id)]) == (1, [(100, 200, first)]), key
        assert await backlog.remove(session, column, [((other,), first + 1)]) == 0
        earlier, fresh = await spill(session, column, changed(((other,), 150, 7)))
        assert (fresh, [row[1:] for row in rows(bench, column.id)]) == (0, [(100, 200, first)]), key
        assert await backlog.remove(session, column, [((other,), earlier)]) == 0
        later, fresh = await spill(session, column, changed(((other,), 300, 7)))
        assert (fresh, [row[1:] for row in rows(bench, column.id)]) == (0, [(100, 300, later)]), key
        assert await backlog.remove(session, column, [((one,), later)]) == 1, key


async def test_two_spellings_under_a_nondeterministic_collation_are_one_row(bench15: Bench) -> None:
    """Only Debian's server has ICU."""
    session = await connect(bench15.dsn_service, "test")
    bench15.admin.execute("CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    column = await configured(session, bench15, "id text COLLATE blind, n int", "id,n")
    first, fresh = await spill(session, column, changed((("A", "1"), 100, 5), (("a", "1"), 110, 6)))
    assert (fresh, rows(bench15)) == (1, [("A", 100, 110, first + 1)])
    assert await backlog.remove(session, column, [(("a", "1"), first + 1)]) == 1
    await session.close()


ODD = ["", " ", "'", '"', "\\", "%s $1 {0} :x", "{a,NULL}", "NULL", "a\tb\n\r", "é€😀", "x" * 2000]

KINDS: list[tuple[str, str, list[Key]]] = [
    ("id text", "id", [(text,) for text in ODD]),
    ('"I d" varchar(5), n numeric(6,2)', '"I d",n', [("a'b", "1.50"), ("", "-0.01")]),
    ("id code", "id", [("a",), ("B",)]),
    ('id "Mo od"', "id", [("so so",), ("it's",)]),
    ("id pair", "id", [('(1,"x ""y""")',), ("(,)",)]),
    ("id int[]", "id", [("{1,2}",), ("{}",), ("{NULL}",)]),
    ("id hstore", "id", [('"a"=>"b"',), ("",)]),
    (
        'id "O\'d d".code, day date, at timestamptz(3)',
        "id,day,at",
        [
            ("00000000-0000-0000-0000-000000000000", "infinity", "2020-01-01 00:00:00.123+00"),
            ("00000000-0000-0000-0000-000000000000", "0044-03-15 BC", "infinity"),
        ],
    ),
    (
        'id "char", b bytea, f double precision, r int4range, c name, o oid',
        "id,b,f,r,c,o",
        [("x", "\\x00ff", "0.1", "[1,3)", "N m", "4000000000"), ("", "\\x", "NaN", "empty", "", "0")],
    ),
]


async def test_keys_of_every_kind_come_back_as_they_were_spilled(bench: Bench, session: Connection) -> None:
    bench.admin.execute(
        "CREATE DOMAIN code AS text COLLATE \"C\" CHECK (VALUE <> '');"
        "CREATE TYPE \"Mo od\" AS ENUM ('so so', 'it''s');"
        'CREATE TYPE pair AS (a int, "b c" text);'
        "CREATE EXTENSION hstore;"
        'CREATE SCHEMA "O\'d d"; CREATE DOMAIN "O\'d d".code AS uuid;'
        f'GRANT USAGE ON SCHEMA "O\'d d" TO {SERVICE_ROLE}'
    )
    for n, (key, names, keys) in enumerate(KINDS):
        column = await configured(session, bench, key, names, f"t{n}")
        first, fresh = await spill(session, column, changed(*((key, 100 + n, 5) for n, key in enumerate(keys))))
        assert fresh == len(keys), key
        found = await backlog.page(session, column, 0)
        assert [row.key for row in found] == keys
        again, fresh = await spill(session, column, changed(*((key, 200, 6) for key in keys)))
        assert (again > first, fresh) == (True, 0), key
        assert await backlog.remove(session, column, [(row.key, row.seq) for row in found]) == 0, key
        assert await backlog.remove(session, column, [(key, again + n) for n, key in enumerate(keys)]) == len(keys)
        assert await backlog.count(session, column) == 0, key


async def a_transaction(bench: Bench) -> tuple[psycopg.Connection, int]:
    """An open one that has its xid; the 64 bits of it."""
    holder = psycopg.connect(bench.dsn_admin)
    [xid] = holder.execute("SELECT pg_current_xact_id()::text::int8").fetchone()  # type: ignore[misc]
    return holder, xid


async def test_a_transaction_in_progress_comes_back_with_its_32_bits_and_one_that_ended_with_none(
    bench: Bench, session: Connection
) -> None:
    column = await configured(session, bench)
    holder, xid = await a_transaction(bench)
    await spill(session, column, changed((("1",), 100, xid % 2**32), (("2",), 100, (xid - 1) % 2**32)))
    stored = bench.admin.execute("SELECT xid::text::int8 FROM cdc_embedder.backlog_1 ORDER BY key_1").fetchall()
    assert stored == [(xid,), (xid - 1,)]
    assert [row.xid for row in await backlog.page(session, column, 0)] == [xid, None]
    holder.commit()
    holder.close()
    assert [row.xid for row in await backlog.page(session, column, 0)] == [None, None]


async def test_an_xid_that_is_yet_to_be_given_is_visible_to_nobody(bench: Bench, session: Connection) -> None:
    column = await configured(session, bench)
    [xmax] = bench.admin.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8").fetchone()  # type: ignore[misc]
    await spill(session, column, changed((("1",), 100, xmax + 100)))
    assert [row.xid for row in await backlog.page(session, column, 0)] == [xmax + 100]


async def test_an_xid_of_another_epoch_is_told_by_its_low_32_bits(bench: Bench, session: Connection) -> None:
    """An xid from far below the server's is none of the future: the epoch is that of the nearest one."""
    column = await configured(session, bench)
    await spill(session, column, changed((("1",), 100, 3)))
    bench.admin.execute("UPDATE cdc_embedder.backlog_1 SET xid = (((7::int8 << 32) + 5)::text)::xid8")
    assert [row.xid for row in await backlog.page(session, column, 0)] == [5]
    bench.admin.execute("UPDATE cdc_embedder.backlog_1 SET xid = ((1::int8 << 31)::text)::xid8")
    assert [row.xid for row in await backlog.page(session, column, 0)] == [2**31]


async def test_pages_follow_one_another_by_seq_and_a_row_that_is_renewed_comes_again(
    bench: Bench, session: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "PAGE", 3)
    column = await configured(session, bench)
    first, _ = await spill(session, column, changed(*(((str(n),), 100 + n, 5) for n in range(7))))
    one = await backlog.page(session, column, 0)
    assert one == [Spilled((str(n),), first + n, None, None) for n in range(3)]
    await spill(session, column, changed((("1",), 200, 5), (("4",), 200, 5)))
    two = await backlog.page(session, column, one[-1].seq)
    assert [row.key for row in two] == [("3",), ("5",), ("6",)]
    three = await backlog.page(session, column, two[-1].seq)
    assert [row.key for row in three] == [("1",), ("4",)]
    assert await backlog.page(session, column, three[-1].seq) == []


async def test_when_the_oldest_change_of_a_key_committed_is_kept(bench: Bench, session: Connection) -> None:
    column = await configured(session, bench)

    async def told(*times: float | None) -> list[float | None]:
        """Key 1, 2, …, spilled once more with these times."""
        spills = changed(*(((str(n),), 100, 5) for n in range(1, len(times) + 1)))
        await spill(session, column, [replace(one, at=at) for one, at in zip(spills, times, strict=True)])
        return [row.committed_at for row in await backlog.page(session, column, 0)]

    assert await told(1764400000.25, 1764400001.5, None) == [1764400000.25, 1764400001.5, None]
    assert await told(1764400099.0, 1764400000.0, 1764400002.0) == [1764400000.25, 1764400000.0, 1764400002.0]
    assert await told(None, None, None) == [1764400000.25, 1764400000.0, 1764400002.0]


async def test_a_row_is_removed_only_by_who_knows_its_seq(bench: Bench, session: Connection) -> None:
    column = await configured(session, bench)
    first, _ = await spill(session, column, changed((("1",), 100, 5), (("2",), 100, 5)))
    again, _ = await spill(session, column, changed((("1",), 200, 6)))
    settled = [(("1",), first), (("1",), first + 1), (("2",), first + 1), (("2",), first + 1), (("3",), first + 2)]
    assert await backlog.remove(session, column, settled) == 1
    assert rows(bench) == [("1", 100, 200, again)]
    assert await backlog.remove(session, column, [(("2",), again)]) == 0
    assert await backlog.remove(session, column, [(("1",), again)]) == 1
    assert await backlog.count(session, column) == 0


async def test_each_spill_has_seqs_of_its_own_for_as_many_keys_as_it_may_have(
    bench: Bench, session: Connection
) -> None:
    column = await configured(session, bench)
    keys = [((str(n),), 100, 5) for n in range(backlog.SPILL + 1)]
    first, fresh = await spill(session, column, changed(*keys))
    again, none = await spill(session, column, changed(*keys))
    assert (fresh, none) == (backlog.SPILL + 1, 0)
    assert again > first + backlog.SPILL
    assert (rows(bench)[0][3], rows(bench)[-1][3]) == (again, again + backlog.SPILL)


async def test_where_the_backlog_begins_is_its_oldest_commit(bench: Bench, session: Connection) -> None:
    column = await configured(session, bench)
    assert await backlog.spilled_from(session, column) is None
    assert await backlog.spilled_from(session, replace(column, id=99)) is None
    first, _ = await spill(session, column, changed((("1",), 300, 5), (("2",), 100, 5), (("3",), 200, 5)))
    assert await backlog.spilled_from(session, column) == LSN(100)
    await backlog.remove(session, column, [(("2",), first + 1)])
    assert await backlog.spilled_from(session, column) == LSN(200)


async def test_the_status_view_is_not_ahead_of_the_backlog(bench: Bench, session: Connection) -> None:
    column = await configured(session, bench)
    bench.admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (bench.slot,))
    await spill(session, column, changed((("1",), 100, 5)))
    found = bench.admin.execute("SELECT embedded_through - '0/0' FROM cdc_embedder.status").fetchone()
    assert found == (100,)


async def test_on_another_timeline_every_row_may_be_judged_at_once_and_a_new_change_counts(
    bench: Bench, session: Connection
) -> None:
    column = await configured(session, bench)
    [xmax] = bench.admin.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8").fetchone()  # type: ignore[misc]
    first, _ = await spill(session, column, changed((("1",), 1000, xmax + 100), (("2",), 1000, 5)))
    await backlog.forget_transactions(session, "another_slot")
    assert [row.xid for row in await backlog.page(session, column, 0)] == [xmax + 100, None]
    for _ in range(2):
        await backlog.forget_transactions(session, bench.slot)
        assert await backlog.page(session, column, 0) == [
            Spilled((key,), first + n, None, None) for n, key in enumerate("12")
        ]
    assert await backlog.spilled_from(session, column) == LSN(0)
    again, _ = await spill(session, column, changed((("1",), 20, xmax + 200)))
    assert (await backlog.page(session, column, first + 1)) == [Spilled(("1",), again, xmax + 200, None)]


async def test_indexes_serve_the_oldest_commit_the_pages_and_the_removal(bench: Bench, session: Connection) -> None:
    column = await configured(session, bench, "id text, n int", "id,n")
    bench.admin.execute(
        "INSERT INTO cdc_embedder.backlog_1 SELECT 'k' || n, n, '0/1', '0/1', '3', n FROM generate_series(1, 20000) n;"
        "ANALYZE cdc_embedder.backlog_1"
    )

    async def plan(statement: str, parameters: list[Any]) -> str:
        cursor = await session.execute("EXPLAIN " + statement, parameters)
        return "\n".join(row[0] for row in await cursor.fetchall())

    found = [
        await plan("SELECT min(b.first_lsn) FROM cdc_embedder.backlog_1 b", []),
        await plan(backlog._page(column).as_string(session), [0]),
        await plan(backlog._remove(column).as_string(session), [["k1"], ["1"], [1]]),
    ]
    for text, index in zip(found, ("first_lsn_idx", "seq_idx", "(pkey|seq_idx)"), strict=True):
        assert re.search(f"using backlog_1_{index}", text), text
        assert "Seq Scan" not in text, text


async def test_a_spill_is_flushed_before_it_returns_whatever_a_role_or_database_says(bench: Bench) -> None:
    bench.admin.execute(
        f"ALTER ROLE {SERVICE_ROLE} IN DATABASE {bench.database} SET synchronous_commit = off;"
        f"ALTER DATABASE {bench.database} SET synchronous_commit = remote_apply"
    )
    session = await connect(bench.dsn_service, "spill")
    [setting] = await (await session.execute("SHOW synchronous_commit")).fetchone()  # type: ignore[misc]
    assert setting == "local"
    await session.close()


async def test_a_spill_survives_a_crash_of_the_server_right_after_it(own: Bench) -> None:
    session = await connect(own.dsn_service, "spill")
    column = await configured(session, own)
    first, _ = await spill(session, column, changed((("1",), 100, 5)))
    own.restart("immediate")
    assert rows(own) == [("1", 100, 100, first)]
    await session.close()
    session = await connect(own.dsn_service, "spill")
    await requests.take_term(session, own.slot, "the next service")
    again, _ = await spill(session, column, changed((("2",), 100, 5)))
    assert again > first, "a sequence that goes back would give a seq twice"
    await session.close()


async def test_who_was_replaced_spills_nothing_and_holds_up_nobody(bench: Bench, session: Connection) -> None:
    """Rule 9: the successor reads the same changes from the slot, and would never look at these rows."""
    column = await configured(session, bench)
    await spill(session, column, changed((("1",), 100, 5)))
    known = rows(bench)
    replaced = Term(bench.slot, 1)
    assert await requests.take_term(session, bench.slot, "another") == 2
    with pytest.raises(SlotBusy, match=f"^another instance took over the slot {bench.slot} before keys of "):
        await backlog.spill(session, column, replaced, changed((("1",), 200, 6), (("2",), 200, 6)))
    assert rows(bench) == known
    _, fresh = await spill(session, column, changed((("1",), 200, 6), (("2",), 200, 6)))
    assert fresh == 1


async def test_a_take_over_waits_for_the_spill_under_way_so_that_it_sees_its_rows(
    bench: Bench, session: Connection
) -> None:
    column = await configured(session, bench)
    other = await connect(bench.dsn_service, "test")
    async with session.transaction():
        await spill(session, column, changed((("1",), 100, 5)))
        taking = asyncio.create_task(requests.take_term(other, bench.slot, "another"))
        async with asyncio.timeout(60):
            while (  # noqa: ASYNC110
                await first_row(session, "SELECT pg_blocking_pids($1)", (other.info.backend_pid,)) == ([],)
            ):
                await asyncio.sleep(0.01)
    assert await taking == 2
    assert await backlog.count(other, column) == 1
    await other.close()


async def test_a_spill_and_a_removal_at_once_lose_no_row(bench: Bench, session: Connection) -> None:
    column = await configured(session, bench)
    other = await connect(bench.dsn_service, "test other")
    keys = [(str(n),) for n in range(200)]
    first, _ = await spill(session, column, changed(*((key, 100, 5) for key in keys)))
    settled = [(key, first + n) for n, key in enumerate(keys)][::-1]
    (again, fresh), removed = await asyncio.gather(
        spill(session, column, changed(*((key, 200, 6) for key in keys[:100]))),
        backlog.remove(other, column, settled),
    )
    assert await backlog.count(session, column) == 200 + fresh - removed == 100
    assert [row.seq for row in await backlog.page(session, column, 0)] == [again + n for n in range(100)]
    await other.close()
