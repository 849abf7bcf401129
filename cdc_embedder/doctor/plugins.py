"""The output plugins of our slots: whether the server allows them, and has them.

Since the minor releases of 2026 a server refuses what `output_plugin_libraries` does not list, from a superuser too,
and shows the list to nobody without pg_read_all_settings: what an ordinary role cannot see is not said to be well.
"""

from __future__ import annotations

from collections.abc import Sequence

import psycopg

from cdc_embedder.doctor.finding import Verdict, error, ok, statement, warning
from cdc_embedder.doctor.patient import Patient
from cdc_embedder.rows.session import Connection
from cdc_embedder.wal.slot import PLUGINS


async def output_plugin(patient: Patient) -> list[Verdict]:
    """Whether the plugins of our slots are allowed, and there. A slot for requests from SQL has pgoutput."""
    wanted = {patient.slot: patient.plugin}
    if patient.sql_embed:
        wanted[patient.embed_slot] = "pgoutput"
    verdicts = [await _of(patient, slot, plugin) for slot, plugin in wanted.items()]
    return list(dict.fromkeys(verdicts))


async def _of(patient: Patient, slot: str, plugin: str) -> Verdict:
    subject = f"plugin {plugin}"
    found = await patient.find_slot(slot)
    streams = found is not None and found.active and found.plugin == plugin
    try:
        listed = await _list(patient.home(slot))
    except psycopg.errors.InsufficientPrivilege:
        return ok(subject, f"the slot {slot} streams with it") if streams else _hidden(patient, plugin)
    candidates = PLUGINS if plugin == "auto" else (plugin,)
    allowed = [name for name in candidates if listed is None or name in _names(listed)]
    if not allowed:
        lacks = "lists neither of them" if plugin == "auto" else "does not list it"
        sentence = f"output_plugin_libraries is {listed!r} and {lacks}: the server refuses the slot"
        return error(subject, sentence, _allow(listed or "", plugin))
    if streams:  # of a list that can be seen this is no proof: it may have changed since
        return ok(subject, f"the slot {slot} streams with it")
    return await _library(patient, slot, plugin, allowed, listed)


async def _list(server: Connection) -> str | None:
    """output_plugin_libraries; None where this release has none. Raises InsufficientPrivilege where it is hidden.

    pg_settings would leave it out then, as if there were none.
    """
    cursor = await server.execute("SELECT current_setting('output_plugin_libraries', true)")
    [[listed]] = await cursor.fetchall()
    return None if listed is None else str(listed)


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _allow(listed: str, plugin: str) -> str:
    """pgoutput stays allowed whatever is: the slots for requests from SQL have it, and `auto` falls back on it."""
    right = ", ".join(dict.fromkeys([*_names(listed), "pgoutput", *([] if plugin == "auto" else [plugin])]))
    return f"ALTER SYSTEM SET output_plugin_libraries = {right};\nSELECT pg_reload_conf(); -- no quotes around the list"


def _hidden(patient: Patient, plugin: str) -> Verdict:
    """The list as it is from the start has pgoutput and not wal2json, which so has to be put there by somebody."""
    grant = statement("GRANT pg_read_all_settings TO {};", patient.around.role)
    remedy = f"{grant} -- or look yourself, as a superuser: SHOW output_plugin_libraries"
    unseen = "cannot be seen by this role"
    match plugin:
        case "auto":
            sentence = f"which of {' and '.join(PLUGINS)} output_plugin_libraries allows {unseen}"
        case "pgoutput":
            sentence = f"it is part of every server; whether output_plugin_libraries allows it {unseen}"
        case _:
            sentence = f"output_plugin_libraries does not list it unless somebody put it there, and that {unseen}"
            return warning(f"plugin {plugin}", sentence, remedy)
    return ok(f"plugin {plugin}", sentence, remedy)


async def _library(patient: Patient, slot: str, plugin: str, allowed: Sequence[str], listed: str | None) -> Verdict:
    """Of what is allowed, in the order in which the service takes it, what the server has."""
    subject, first, auto = f"plugin {plugin}", allowed[0], plugin == "auto"
    falls_back = "pgoutput" in allowed[1:]
    match await _has_library(patient.home(slot), first):
        case True:
            return ok(subject, f"the service takes {first}" if auto else "it is allowed, and the server has it")
        case None:
            what = f"the service takes {first} where the server has it" if auto else "it is allowed"
            sentence = f"{what}{', else pgoutput' if falls_back else ''}; its library cannot be seen by this role"
            return ok(subject, sentence, "cdc-embedder doctor --dsn 'user=…' # as a superuser: optional")
        case False if falls_back:
            return ok(subject, f"the service takes pgoutput: the server has no library {first}")
    install = f"install it on the server (Debian: postgresql-{patient.version // 10000}-{first})"
    if auto:  # naming wal2json alone locks pgoutput out
        sentence = f"output_plugin_libraries is {listed!r}, and the server has no library {first}"
        return error(subject, sentence, f"{_allow(listed or '', plugin)}; or {install}")
    remedy = f"CDC_EMBEDDER_OUTPUT_PLUGIN=pgoutput # or {install}"
    return error(subject, "the server has no library of that name", remedy)


async def _has_library(server: Connection, plugin: str) -> bool | None:
    """None where this role may not look. pgoutput is part of every server."""
    if plugin == "pgoutput":
        return True
    try:
        cursor = await server.execute(
            "SELECT (pg_stat_file(setting || '/' || $1 || '.so', true)).size IS NOT NULL"
            "    OR (pg_stat_file(setting || '/' || $1 || '.dylib', true)).size IS NOT NULL"
            "  FROM pg_config WHERE name = 'PKGLIBDIR'",
            (plugin,),
        )
        [[there]] = await cursor.fetchall()
    except psycopg.errors.InsufficientPrivilege:
        return None
    return bool(there)
