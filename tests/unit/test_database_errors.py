"""The driver's errors by SQLSTATE: what is tried again, what an operator must mend, what concerns one column."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from cdc_embedder.database_errors import from_database
from cdc_embedder.errors import ColumnFault, Misconfigured, Problem, ServerGone, SlotBusy, Temporary

BY_SQLSTATE = {
    "08006": ServerGone,  # connection failure
    "57P01": ServerGone,  # admin shutdown
    "57P02": ServerGone,  # crash shutdown
    "57P03": ServerGone,  # cannot connect now
    "57P05": ServerGone,  # idle session timeout
    "53300": ServerGone,  # too many connections
    "25006": ServerGone,  # read-only: it is a standby by now
    "25P03": ServerGone,  # idle in transaction session timeout: the session is gone
    "25P04": ServerGone,  # transaction timeout: so is this one
    "55006": SlotBusy,
    "40001": Temporary,
    "40P01": Temporary,
    "55P03": Temporary,
    "57014": Temporary,
    "53100": Temporary,  # disk full
    "53200": Temporary,  # out of memory
    "28P01": Misconfigured,
    "28000": Misconfigured,
    "3D000": Misconfigured,
    "42501": ColumnFault,
    "42P01": ColumnFault,
    "23514": Problem,  # a constraint: a row's own fault, which the caller finds by halving
    "XX000": Problem,
}


@pytest.mark.parametrize(("sqlstate", "kind"), BY_SQLSTATE.items())
def test_an_sqlstate_decides(sqlstate: str, kind: type[Problem]) -> None:
    problem = from_database(psycopg.errors.lookup(sqlstate)("what the server said"), "working")
    assert type(problem) is kind
    assert problem.sqlstate == sqlstate
    assert str(problem) == "working: what the server said"


WORDS = {
    'FATAL:  password authentication failed for user "a"': Misconfigured,
    'FATAL:  no pg_hba.conf entry for host "1.2.3.4"': Misconfigured,
    'FATAL:  role "a" does not exist': Misconfigured,
    'root certificate file "/nowhere/root.crt" does not exist': Misconfigured,
    "FATAL:  the database system is starting up": ServerGone,
    "FATAL:  the database system is shutting down": ServerGone,
    'FATAL:  too many connections for role "a"': ServerGone,
    "FATAL:  remaining connection slots are reserved": ServerGone,
    "Connection refused": ServerGone,
    "server closed the connection unexpectedly": ServerGone,
    'Connection refused\nFATAL:  role "a" does not exist': ServerGone,  # of two hosts, one may get over it
}


@pytest.mark.parametrize(("words", "kind"), WORDS.items())
def test_a_connection_that_was_never_made_has_only_words(words: str, kind: type[Problem]) -> None:
    problem = from_database(psycopg.OperationalError(words), "connecting")
    assert type(problem) is kind
    assert problem.sqlstate is None


class WithContext(psycopg.errors.UndefinedTable):
    """As the server sends it with a CONTEXT: of a function, or of a parameter that cannot be read."""

    @property
    def diag(self) -> Any:
        context = "unnamed portal parameter $1 = 'nowhere'"
        names = ("message_hint", "source_function")
        return SimpleNamespace(message_primary="it does not exist", context=context, **dict.fromkeys(names))


def test_only_a_statement_on_rows_can_have_met_a_trigger_that_finds_nothing() -> None:
    assert "search_path" in from_database(WithContext(), "writing", of_rows=True).hint
    assert from_database(WithContext(), "asking").hint == ""
