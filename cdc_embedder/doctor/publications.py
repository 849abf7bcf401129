"""What is published: by the service's own publication, against the configuration, and by those of others."""

from __future__ import annotations

from cdc_embedder.catalog import EmbeddingColumn
from cdc_embedder.doctor.columns import there
from cdc_embedder.doctor.finding import Check, Verdict, error, ok, statement, warning
from cdc_embedder.doctor.patient import Patient


async def publication(patient: Patient) -> list[Verdict]:
    """The publication against the configuration. With wal2json none is used, and no table should stand in it."""
    name, plugin = patient.slot, patient.plugin
    subject = f"publication {name}"
    rows = await patient.rows(
        "SELECT pubinsert AND pubupdate AND NOT pubdelete AND NOT pubtruncate, pubviaroot, puballtables"
        " FROM pg_publication WHERE pubname = $1",
        name,
    )
    if not rows:
        return [error(subject, "it is missing: a slot with pgoutput fails without it", "cdc-embedder init")]
    verdicts = []
    [(kinds, via_root, everything)] = rows
    if everything or not (kinds and via_root):
        set_ = "ALTER PUBLICATION {} SET (publish = 'insert, update', publish_via_partition_root = true);"
        anew = "DROP PUBLICATION {}; -- while the service is stopped; then: cdc-embedder init"
        verdicts.append(
            error(
                subject,
                "it does not publish insert and update alone, through the root of partitioned tables, of tables that it"
                " names",
                statement(anew, name) if everything else statement(set_, name),
            )
        )
    listed = await patient.rows(
        "SELECT n.nspname, c.relname, r.prrelid::int8 FROM pg_publication p JOIN pg_publication_rel r ON"
        " r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE p.pubname = $1",
        name,
    )
    ours = {column.table_oid for column in patient.columns}
    unused = patient.around.slot is not None and plugin == "wal2json"
    for schema, table, oid in listed:
        if unused or oid not in ours:
            why = "the slot's plugin is wal2json" if unused else "no column of it is configured"
            remedy = statement("ALTER PUBLICATION {} DROP TABLE {};", name, (schema, table))
            verdicts.append(warning(subject, f"{schema}.{table} is in it for nothing: {why}", remedy))
    if plugin != "wal2json":
        verdicts += [_unpublished(column, name) for column in there(patient)
                     if not column.published and not column.unlogged]  # fmt: skip
    return verdicts or [ok(subject, "it has the tables that it must have")]


def _unpublished(column: EmbeddingColumn, name: str) -> Verdict:
    add = statement("ALTER PUBLICATION {} ADD TABLE {}", name, (column.schema, column.table))
    keys = "(" + ", ".join(statement("{}", key.name) for key in column.key) + ")" if column.keys_only else ""
    return warning(
        column.label,
        f"its table is not in the publication {name}: no change of it is heard, scans alone feed it",
        f"{add} {keys}".rstrip() + "; -- as the table's owner, with the rights of the publication's",
    )


async def all_tables_publications(patient: Patient) -> list[Verdict]:
    """Publications of everything have our tables in them, too, and a subscriber that lacks those stops."""
    rows = await patient.rows("SELECT pubname::text, 'FOR ALL TABLES' FROM pg_publication WHERE puballtables")
    if patient.version >= 150000:
        rows += await patient.rows(
            "SELECT p.pubname::text, 'FOR TABLES IN SCHEMA cdc_embedder' FROM pg_publication p"
            " JOIN pg_publication_namespace s ON s.pnpubid = p.oid JOIN pg_namespace n ON n.oid = s.pnnspid"
            " WHERE n.nspname = 'cdc_embedder'"
        )
    return [
        warning(
            f"publication {name}",
            f"it is {kind}: the tables of cdc_embedder are in it, and a subscriber that lacks them stops",
            statement("DROP PUBLICATION {};", name) + " -- and make one that names its tables",
        )
        for name, kind in rows
    ] or [ok("publications", "none publishes the tables of cdc_embedder")]


CHECKS = (
    Check("publication", publication, "schema"),
    Check("all-tables-publications", all_tables_publications),
)
