"""A database that an earlier release installed: `run` or `init` brings it forward, with everything that is in it."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from cdc_embedder.install import install, package_version, schema_version, sql_dir, upgrade
from tests.documents import embedded_at, make_documents, make_model
from tests.servers import SERVICE_ROLE, Bench, make_bench
from tests.service import assert_every_vector_is_of_its_text, running, until, wait_caught_up

RELEASES = sorted((Path(__file__).parents[1] / "data").glob("schema-*.sql.xz"))
"""The schema as each release installed it: its migrations and what `init` applied after them, one after the other."""


@pytest.fixture(params=["15", "18"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield from make_bench(request.getfixturevalue(f"pg{request.param}"), "pgoutput")


def go_back_to(bench: Bench, release: Path) -> None:
    """The schema of that release in place of the present one."""
    bench.admin.execute("DROP SCHEMA cdc_embedder CASCADE")
    bench.admin.execute(
        sql.SQL("CREATE SCHEMA cdc_embedder AUTHORIZATION {0}; SET ROLE {0}").format(sql.Identifier(SERVICE_ROLE))
    )
    bench.admin.execute(lzma.decompress(release.read_bytes()))
    bench.admin.execute(
        sql.SQL("RESET ROLE; ALTER TABLE cdc_embedder.embedding_column ALTER slot SET DEFAULT {}").format(
            sql.Literal(bench.slot)
        )
    )


def dump(bench: Bench) -> str:
    """The catalog as pg_dump writes it, without the lines that differ between two runs of it."""
    command = [bench.server.bindir / "pg_dump", "--schema-only", "-n", "cdc_embedder", bench.dsn_admin]
    schema = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return "\n".join(line for line in schema.splitlines() if not line.startswith(("--", "\\")))


def version(bench: Bench) -> int:
    with psycopg.connect(bench.dsn_admin) as connection:
        return schema_version(connection)


def test_there_is_a_schema_of_every_release_but_the_present() -> None:
    released = [path.name.removeprefix("schema-").removesuffix(".sql.xz") for path in RELEASES]
    changelog = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
    titles = [line.split()[1] for line in changelog.splitlines() if line.startswith("## ")]
    assert sorted(titles, key=numbers)[:-1] == sorted(released, key=numbers)


def numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
@pytest.mark.parametrize("way", ["init", "upgrade", "psql"])
def test_each_way_of_upgrading_gives_the_schema_of_a_new_installation(bench: Bench, release: Path, way: str) -> None:
    new = dump(bench)
    go_back_to(bench, release)
    assert version(bench) < package_version()
    assert dump(bench) != new
    if way == "init":
        assert any(line.startswith("applied migration") for line in install(bench.dsn_admin, bench.slot))
    elif way == "upgrade":
        assert any(line.startswith("applied migration") for line in upgrade(bench.dsn_service))
        assert upgrade(bench.dsn_service) == []
    else:
        psql = [bench.server.bindir / "psql", "-Xq", "-v", f"slot={bench.slot}", "-f", sql_dir() / "schema.sql"]
        subprocess.run([*psql, "-d", bench.dsn_admin], check=True, capture_output=True,
                       env=os.environ | {"PGOPTIONS": f"-c role={SERVICE_ROLE}"})  # fmt: skip
    assert version(bench) == package_version()
    assert dump(bench) == new


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_the_service_brings_an_older_schema_forward_and_goes_on_with_what_is_in_it(bench: Bench, release: Path) -> None:
    go_back_to(bench, release)
    make_model(bench)
    make_documents(bench, 30)
    with ExitStack() as stack:
        services = [stack.enter_context(running(bench)) for _ in range(2)]
        until(lambda: any("streaming from" in service.log for service in services), "none works")
        logs = [service.log for service in services]
        assert sum("applied migration" in log for log in logs) == 1
        wait_caught_up(bench)
        assert assert_every_vector_is_of_its_text(bench) == 30
        for service in services:
            assert service.stop() == 0
    assert version(bench) == package_version()


def test_what_was_embedded_is_not_embedded_again_and_what_was_spilled_is_found(bench: Bench) -> None:
    """The tables as version 1 had them, with what a service left in them."""
    make_model(bench)
    make_documents(bench, 30)
    with running(bench) as service:
        wait_caught_up(bench)
        assert service.stop() == 0
    bench.admin.execute(
        "DROP TABLE cdc_embedder.given_up, cdc_embedder.standby_slot;"
        "ALTER TABLE cdc_embedder.backlog_1 DROP COLUMN committed_at;"
        "DELETE FROM cdc_embedder.migration WHERE version > 1;"
        # as one that was spilled: nothing but the backlog asks for it
        "UPDATE cdc_embedder.ledger_1 SET fingerprint = '\\x00' WHERE key_1 = 7;"
        "INSERT INTO cdc_embedder.backlog_1 VALUES (7, '0/1', '0/1', NULL, 1)"
    )
    before = embedded_at(bench)
    with running(bench) as service:
        service.wait_for_log("applied migration 003")
        until(lambda: one(bench, "SELECT count(*) FROM cdc_embedder.backlog_1") == 0, "it stayed in the backlog")
        wait_caught_up(bench)
        assert service.stop() == 0
    after = embedded_at(bench)
    assert {key for key in before if after[key] != before[key]} == {7}
    assert assert_every_vector_is_of_its_text(bench) == 30


def one(bench: Bench, statement: LiteralString) -> int:
    row = bench.admin.execute(statement).fetchone()
    assert row is not None
    return int(row[0])


def run(bench: Bench, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"CDC_EMBEDDER_DSN": bench.dsn_service, "CDC_EMBEDDER_SLOT": bench.slot, "CDC_EMBEDDER_HTTP": "off"}
    return subprocess.run(
        [sys.executable, "-m", "cdc_embedder", "run"],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_where_it_is_not_to_migrate_it_says_who_does(bench: Bench, release: Path) -> None:
    go_back_to(bench, release)
    before = dump(bench)
    refused = run(bench, CDC_EMBEDDER_AUTO_MIGRATE="off")
    assert refused.returncode == 1
    assert (
        "the schema is older than this cdc-embedder, and auto_migrate is off. run: cdc-embedder init" in refused.stderr
    )
    assert dump(bench) == before


def test_an_old_service_refuses_a_newer_schema(bench: Bench) -> None:
    bench.admin.execute("INSERT INTO cdc_embedder.migration (version, name) VALUES (999, 'of the future')")
    refused = run(bench)
    assert refused.returncode == 1
    assert f"the schema is of version 999, newer than this cdc-embedder knows ({package_version()})" in refused.stderr
    assert "Traceback" not in refused.stderr
