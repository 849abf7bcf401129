"""Names on the command line, quoted as in SQL: `Shop."Odd ""Name".body`. No I/O."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from cdc_embedder.errors import Problem

_PART = re.compile(r'\s*(?:"((?:[^"]|"")+)"|([^\s".,]+))\s*')
_FOLD = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def split(text: str, separator: str = ".") -> list[str]:
    """The identifiers in `text`: quoted ones as they are, others in lower case (A to Z only). Raises Problem.

    Source: https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS
    """
    parts, at = [], 0
    while True:
        match = _PART.match(text, at)
        if match is None:
            raise Problem(f"{text} is not a name", hint="quote it as in SQL")
        quoted, plain = match.groups()
        parts.append(quoted.replace('""', '"') if quoted is not None else plain.translate(_FOLD))
        at = match.end()
        if at == len(text):
            return parts
        if text[at] != separator:
            raise Problem(f"{text} is not a name", hint="quote it as in SQL")
        at += 1


def join(parts: Sequence[str]) -> str:
    """The parts as one quoted name."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


def column_of(table: str, name: str) -> str:
    """The column `name` of a table that is quoted already, as our views have it: to be pasted into a command."""
    return f"{table}.{join_plain([name])}"


def join_plain(parts: Sequence[str]) -> str:
    """A name for people: quoted only where SQL would want it."""
    return ".".join(
        part if part == part.lower() and part.replace("_", "a").isalnum() and not part[0].isdigit() else join([part])
        for part in parts
    )
