"""What the service's role may do: too little, or more than it needs.

The doctor is to be run with the service's own connection string: rights are those of the role that it connects as.
"""

from __future__ import annotations

from cdc_embedder.doctor.finding import Check, Verdict, error, ok, statement, warning
from cdc_embedder.doctor.patient import Patient

ORIGIN_FUNCTIONS = ("pg_replication_origin_create", "pg_replication_origin_oid", "pg_replication_origin_session_setup")


async def replication_right(patient: Patient) -> list[Verdict]:
    role = patient.around.role
    if not patient.around.can_replicate:
        return [
            error(
                f"role {role}",
                "it has no right to use replication slots",
                statement("ALTER ROLE {} REPLICATION;", role) + " -- on RDS: GRANT rds_replication TO the role",
            )
        ]
    return [ok(f"role {role}", "it may use replication slots")]


async def least_privilege(patient: Patient) -> list[Verdict]:
    role = patient.around.role
    if patient.superuser:
        return [
            warning(
                f"role {role}",
                "it is a superuser: the service needs no such right, and what another role may was not examined",
                "psql -v role=cdc_service -f sql/grants.sql # then run service and doctor as that role",
            )
        ]
    return [ok(f"role {role}", "it is no superuser")]


async def schema_owner(patient: Patient) -> list[Verdict]:
    role = patient.around.role
    [owner, mine] = await patient.one(
        "SELECT pg_get_userbyid(nspowner), pg_has_role(nspowner, 'USAGE') FROM pg_namespace"
        " WHERE nspname = 'cdc_embedder'"
    )
    if not mine:
        return [
            error(
                "schema cdc_embedder",
                f"it belongs to {owner}, and the role {role} has not that role's rights",
                statement("ALTER SCHEMA cdc_embedder OWNER TO {};", role) + f" -- or run the service as {owner}",
            )
        ]
    return [ok("schema cdc_embedder", f"it belongs to {owner}")]


async def column_rights(patient: Patient) -> list[Verdict]:
    """What the database's own check of a configured column finds missing; it answers with a notice."""
    verdicts = []
    for column in patient.columns:
        if column.fault is not None:
            continue
        patient.notices.clear()
        await patient.rows(_MISSING_RIGHTS, column.id)
        if not patient.notices:
            verdicts.append(ok(column.label, "the role may read and write what it must"))
            continue
        message, hint = patient.notices[0]
        [filtered] = await patient.one("SELECT row_security_active($1::oid)", column.table_oid)
        because = "; row-level security would hide rows from it, which is an error to the service" if filtered else ""
        verdicts.append(error(column.label, f"{message}{because}", hint.removesuffix(".") + ";"))
    return verdicts or [ok("columns", "there is none whose rights could be looked at")]


# xmin (-2) is read as long as vectors are adopted
_MISSING_RIGHTS = """
SELECT cdc_embedder._notice_missing_rights(c.source_table,
           k.attnums || c.source_attnums || CASE WHEN g.adopting THEN '{-2}'::int2[] ELSE '{}' END, c.target_attnum)
  FROM cdc_embedder.embedding_column c
 CROSS JOIN LATERAL cdc_embedder._primary_key(c.source_table) k
  JOIN cdc_embedder.generation g ON g.column_id = c.id AND g.superseded_at IS NULL
 WHERE c.id = $1
"""


async def origin_functions(patient: Patient) -> list[Verdict]:
    [missing] = await patient.one(
        "SELECT string_agg(p.oid::regprocedure::text, ', ' ORDER BY p.proname) FROM pg_proc p"
        " WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = ANY ($1)"
        "   AND NOT has_function_privilege(p.oid, 'EXECUTE')",
        list(ORIGIN_FUNCTIONS),
    )
    role = patient.around.role
    if missing:
        grant = statement("TO {};", role)
        return [
            warning(
                f"role {role}",
                "it may not mark what it writes: the service hears its own writes, which costs a third of the rate",
                f"GRANT EXECUTE ON FUNCTION {missing} {grant}",
            )
        ]
    return [ok(f"role {role}", "it may mark what it writes with a replication origin")]


async def publication_owner(patient: Patient) -> list[Verdict]:
    rows = await patient.rows(
        "SELECT pubname, pg_get_userbyid(pubowner), pg_has_role(pubowner, 'USAGE') FROM pg_publication"
        " WHERE pubname = $1",
        patient.slot,
    )
    for name, owner, mine in rows:
        if not mine:
            return [
                warning(
                    f"publication {name}",
                    f"it belongs to {owner}: the service cannot take a table out of it whose updates would fail",
                    statement("ALTER PUBLICATION {} OWNER TO {};", name, patient.around.role),
                )
            ]
    return [ok(f"publication {patient.slot}", "it is the service's, as far as it exists")]


CHECKS = (
    Check("replication-right", replication_right),
    Check("least-privilege", least_privilege),
    Check("schema-owner", schema_owner, "schema"),
    Check("publication-owner", publication_owner),
    Check("origin-functions", origin_functions),
    Check("column-rights", column_rights, "columns"),
)
