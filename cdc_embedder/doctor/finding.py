"""What the doctor says: a finding with its level and remedy; and what a check is. No I/O.

A remedy is what to run or to set, exactly: SQL that psql takes as it stands (what else is to be done, and what only
people can know, stands there as an SQL comment), a command of ours, or a setting of ours. Why is in the sentence.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, LiteralString, NamedTuple

from psycopg import sql

from cdc_embedder.doctor.patient import Patient

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `check`: its stable name, which `docs/doctor.md` explains."""

    check: str
    level: Level
    subject: str
    sentence: str
    remedy: str


class Verdict(NamedTuple):
    """What a check found of one subject."""

    level: Level
    subject: str
    sentence: str
    remedy: str = ""


class Check(NamedTuple):
    """A check by its name. `needs`: without our schema, or without configured columns, some cannot be made."""

    name: str
    look: Callable[[Patient], Awaitable[list[Verdict]]]
    needs: Literal["server", "schema", "columns"] = "server"


def ok(subject: str, sentence: str, remedy: str = "") -> Verdict:
    return Verdict("ok", subject, sentence, remedy)


def warning(subject: str, sentence: str, remedy: str) -> Verdict:
    return Verdict("warning", subject, sentence, remedy)


def error(subject: str, sentence: str, remedy: str) -> Verdict:
    return Verdict("error", subject, sentence, remedy)


def statement(template: LiteralString, *names: str | tuple[str, ...] | sql.Literal) -> str:
    """SQL with identifiers (a tuple is a qualified one) and literals in place of {}."""
    parts = [
        name if isinstance(name, sql.Literal) else sql.Identifier(*((name,) if isinstance(name, str) else name))
        for name in names
    ]
    return sql.SQL(template).format(*parts).as_string(None)
