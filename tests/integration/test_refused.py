"""What the service cannot work with: one sentence with the remedy, exit status 1, no traceback."""

from __future__ import annotations

import psycopg

from cdc_embedder.embedded import Server
from tests.servers import SERVICE_ROLE, Bench, bench_with
from tests.service import Service


def refused(bench: Bench, remedy: str, **environment: str) -> None:
    service = Service(bench, **environment).start()
    try:
        assert service.wait() == 1, service.log
        lines = [line for line in service.log.splitlines() if " error " in line]
        assert len(lines) == 1, service.log
        assert remedy in lines[0]
        assert "Traceback" not in service.log
    finally:
        service.end()


def test_a_plugin_that_the_server_lacks(bench18: Bench) -> None:
    refused(bench18, "pgoutput", CDC_EMBEDDER_OUTPUT_PLUGIN="wal2json")


def test_a_role_without_the_replication_right(bench18: Bench) -> None:
    bench18.admin.execute(f"ALTER ROLE {SERVICE_ROLE} NOREPLICATION")
    try:
        refused(bench18, f'ALTER ROLE "{SERVICE_ROLE}" REPLICATION')
    finally:
        bench18.admin.execute(f"ALTER ROLE {SERVICE_ROLE} REPLICATION")


def test_no_slot_left(bench18: Bench) -> None:
    made = []
    try:
        while True:
            name = f"{bench18.slot}_{len(made)}"
            bench18.admin.execute("SELECT pg_create_physical_replication_slot(%s)", (name,))
            made.append(name)
    except psycopg.errors.ConfigurationLimitExceeded:
        pass
    try:
        refused(bench18, "max_replication_slots")
    finally:
        for name in made:
            bench18.admin.execute("SELECT pg_drop_replication_slot(%s)", (name,))


def test_wal_level_below_logical(pg18: Server) -> None:
    with bench_with(pg18.bindir, "pgoutput", {"wal_level": "replica"}) as bench:
        refused(bench, "ALTER SYSTEM SET wal_level = logical")


def test_a_plugin_that_the_server_does_not_allow(listing15: Server) -> None:
    with bench_with(listing15.bindir, "wal2json", {"output_plugin_libraries": "pgoutput, test_decoding"}) as bench:
        refused(bench, "ALTER SYSTEM SET output_plugin_libraries = pgoutput, test_decoding, wal2json")
        with Service(bench, CDC_EMBEDDER_OUTPUT_PLUGIN="auto").start() as service:
            service.wait_for_log("with the plugin pgoutput")


def test_a_plugin_that_is_refused_after_an_upgrade_gives_way_to_pgoutput_and_a_scan(listing15: Server) -> None:
    with bench_with(listing15.bindir, "wal2json", {}) as bench:
        with Service(bench).start() as service:
            service.wait_for_log("streaming from the slot")
        bench.admin.execute("ALTER SYSTEM SET output_plugin_libraries = pgoutput, test_decoding")
        bench.admin.execute("SELECT pg_reload_conf()")
        with Service(bench, CDC_EMBEDDER_OUTPUT_PLUGIN="auto").start() as service:
            service.wait_for_log("with the plugin pgoutput")
            service.wait_for_log("streaming from the slot")


def test_a_slot_that_cannot_be_replaced_is_not_dropped(listing15: Server) -> None:
    with bench_with(listing15.bindir, "wal2json", {}) as bench:
        with Service(bench).start() as service:
            service.wait_for_log("streaming from the slot")
        bench.admin.execute("ALTER SYSTEM SET output_plugin_libraries = test_decoding")
        bench.admin.execute("SELECT pg_reload_conf()")
        found = "SELECT slot_name, plugin FROM pg_replication_slots"
        with Service(bench, CDC_EMBEDDER_OUTPUT_PLUGIN="auto").start() as service:
            assert service.wait() == 1
            assert "the server does not allow the output plugin pgoutput" in service.log
            assert "set output_plugin to pgoutput" not in service.log.splitlines()[-1]
            assert "it is made anew" not in service.log
        assert bench.admin.execute(found).fetchall() == [(bench.slot, "wal2json")]
        bench.admin.execute("ALTER SYSTEM SET output_plugin_libraries = test_decoding, pgoutput")
        bench.admin.execute("SELECT pg_reload_conf()")
        with psycopg.connect(bench.dsn_admin) as holder:
            holder.execute("SELECT pg_current_xact_id()")  # what the new slot waits for, and the probe does not
            with Service(bench, CDC_EMBEDDER_OUTPUT_PLUGIN="auto").start() as service:
                service.wait_for_log("making the slot waits")
                holder.rollback()
                service.wait_for_log("with the plugin pgoutput")
                service.wait_for_log("streaming from the slot")
        assert bench.admin.execute(found).fetchall() == [(bench.slot, "pgoutput")]


def test_another_database_s_slot(bench18: Bench) -> None:
    with psycopg.connect(bench18.server.dsn("postgres"), autocommit=True) as other:
        other.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (bench18.slot,))
        try:
            refused(bench18, "--slot")
        finally:
            other.execute("SELECT pg_drop_replication_slot(%s)", (bench18.slot,))


def test_a_schema_that_is_not_installed(bench18: Bench) -> None:
    refused(bench18, "run: cdc-embedder init", CDC_EMBEDDER_DSN=bench18.server.dsn("postgres"))


def test_a_role_that_does_not_exist(bench18: Bench) -> None:
    refused(bench18, "check the DSN", CDC_EMBEDDER_DSN=bench18.server.dsn(bench18.database, "nobody_at_all"))


def test_a_setting_that_makes_no_sense(bench18: Bench) -> None:
    service = Service(bench18, CDC_EMBEDDER_OUTPUT_PLUGIN="decoderbufs").start()
    try:
        assert service.wait() == 1
        assert "output_plugin" in service.log
        assert "Traceback" not in service.log
    finally:
        service.end()
