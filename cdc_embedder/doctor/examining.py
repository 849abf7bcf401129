"""The order of the checks, and what is said where some cannot be made."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import psycopg

from cdc_embedder.database_errors import from_database
from cdc_embedder.doctor import columns, models, publications, rights, server, slots, surroundings, work
from cdc_embedder.doctor.finding import Check, Finding, Verdict, error, ok, warning
from cdc_embedder.doctor.patient import Patient, admit, discharge
from cdc_embedder.doctor.surroundings import refused_settings
from cdc_embedder.errors import Problem
from cdc_embedder.preparation import SCHEMA_VERSION
from cdc_embedder.settings import Settings

CHECKS: tuple[Check, ...] = (
    *surroundings.CHECKS,
    *server.CHECKS,
    *rights.CHECKS,
    *slots.CHECKS,
    *columns.CHECKS,
    *publications.CHECKS,
    *work.CHECKS,
    *models.CHECKS,
)

ALWAYS = ("connection", "schema", "skipped")
"""What is found without a check of its own: whether the checks can be made."""


def examine(settings: Settings, *, model: bool = True) -> list[Finding]:
    """Look at everything; `model`: also load each model that a column uses, and embed a word with it.

    Nothing is raised for what is wrong: that is what the findings say.
    """
    return asyncio.run(_examine(settings, CHECKS if model else [c for c in CHECKS if c.name != models.LOADING]))


async def _examine(settings: Settings, checks: tuple[Check, ...] | list[Check]) -> list[Finding]:
    try:
        patient = await admit(settings)
    except psycopg.Error as problem:  # gone again at once
        return _unreachable(from_database(problem, "connecting"), checks)
    except Problem as problem:
        return _unreachable(problem, checks)
    try:
        return await _make_all(patient, checks)
    finally:
        await discharge(patient)


async def _make_all(patient: Patient, checks: tuple[Check, ...] | list[Check]) -> list[Finding]:
    findings = [_named("connection", ok("server", f"it answers, as the role {patient.around.role}"))]
    findings.append(_named("schema", await _read_schema(patient)))
    skipped: dict[str, list[str]] = {}
    for number, check in enumerate(checks):
        if reason := _unmet(patient, check):
            skipped.setdefault(reason, []).append(check.name)
            continue
        findings += [_named(check.name, verdict) for verdict in await _make(patient, check)]
        if patient.connection.closed:
            return findings + _unreachable(Problem("the connection was lost meanwhile"), checks[number + 1 :])
    return findings + [_skipped(reason, names) for reason, names in skipped.items()]


async def _make(patient: Patient, check: Check) -> list[Verdict]:
    """The check's verdicts; that it could not be made is one, too."""
    try:
        return await check.look(patient)
    except psycopg.Error as problem:
        told = from_database(problem, "this could not be looked at")
        return [warning("doctor", str(told), _what_then(problem))]
    except Problem as problem:
        return [error("doctor", str(problem), problem.hint)]


async def _read_schema(patient: Patient) -> Verdict:
    [installed, standby] = await patient.one(
        "SELECT EXISTS (SELECT FROM pg_class WHERE relname = 'migration'"
        " AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'cdc_embedder')), pg_is_in_recovery()"
    )
    if standby:
        return warning("schema cdc_embedder", "a standby has not all of its tables", server.TO_THE_PRIMARY)
    if not installed:
        return error("schema cdc_embedder", "it is not installed in this database", "cdc-embedder init")
    try:
        await patient.read_schema()
    except psycopg.Error as problem:
        told = from_database(problem, "it cannot be read")
        older = patient.schema is not None and patient.schema < SCHEMA_VERSION
        return error("schema cdc_embedder", str(told), "cdc-embedder init" if older else _what_then(problem))
    with suppress(psycopg.Error):  # `column-state` tells
        await patient.read_status()
    version = patient.schema or 0
    if version > SCHEMA_VERSION:
        return error(
            "schema cdc_embedder",
            f"its version is {version}, and this program knows {SCHEMA_VERSION}: an older one must not touch it",
            "pip install --upgrade cdc-embedder",
        )
    if version < SCHEMA_VERSION:
        sentence = f"its version is {version}, and this program needs {SCHEMA_VERSION}"
        if patient.settings.auto_migrate:
            return warning("schema cdc_embedder", f"{sentence}: `run` will bring it up to date", "cdc-embedder init")
        return error("schema cdc_embedder", f"{sentence}; auto_migrate is off", "cdc-embedder init")
    return ok("schema cdc_embedder", f"version {version}, which is this program's")


def _what_then(problem: psycopg.Error) -> str:
    if problem.sqlstate in ("42P01", "42703", "42883"):
        return "cdc-embedder init"
    if problem.sqlstate == "42501":
        return "cdc-embedder doctor --dsn 'user=…' # as the role that the service has, which owns the schema"
    return "cdc-embedder doctor # again, when the server is less busy"


def _unmet(patient: Patient, check: Check) -> str:
    if check.needs != "server" and patient.schema is None:
        return "the schema cdc_embedder can be read"
    if check.needs == "columns" and not patient.columns:
        return "a column is configured"
    return ""


def _unreachable(problem: Problem, checks: tuple[Check, ...] | list[Check]) -> list[Finding]:
    remedy = refused_settings(str(problem)) or problem.hint or "CDC_EMBEDDER_DSN=postgresql://role@host:port/database"
    found = _named("connection", error("server", str(problem), remedy))
    return [found, _skipped("the server can be reached", [check.name for check in checks])]


def _skipped(until: str, names: list[str]) -> Finding:
    sentence = f"not looked at until {until}: {', '.join(names)}"
    return _named("skipped", warning("doctor", sentence, "cdc-embedder doctor # again then"))


def _named(check: str, verdict: Verdict) -> Finding:
    return Finding(check, *verdict)
