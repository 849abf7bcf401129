"""Log lines for the operator: on standard error, as text or as JSON, never with the text of a row.

One line an event, lower case. `sentence` of a Problem carries its hint, so a line says what to do. A warning that comes
again and again, but for its numbers, is told BURST times in PERIOD_SECONDS; the rest is counted, and the count told.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

BURST = 5
PERIOD_SECONDS = 60.0


@dataclass(slots=True)
class _Repeated:
    """One kind of line: since when it is counted, how often it came, and the record that came last."""

    since: float
    count: int
    last: logging.LogRecord


class Quieter(logging.StreamHandler[TextIO]):
    """Passes over what has been said often enough. A line of another number is the same line."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._known: dict[tuple[str, int, str], _Repeated] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._sum_up(record.created)
        if record.levelno < logging.WARNING or record.exc_info:
            super().emit(record)
            return
        key = (record.name, record.levelno, re.sub(r"[0-9]+(\.[0-9]+)?", "0", record.getMessage()))
        known = self._known.setdefault(key, _Repeated(record.created, 0, record))
        known.count, known.last = known.count + 1, record
        if known.count <= BURST:
            super().emit(record)

    def _sum_up(self, now: float) -> None:
        """Tell what was passed over in the periods that have ended."""
        for key, known in [*self._known.items()]:
            if now - known.since < PERIOD_SECONDS:
                continue
            del self._known[key]
            if known.count > BURST:
                told = logging.makeLogRecord(known.last.__dict__)
                told.msg = f"{known.last.getMessage()} (one of {known.count} in {now - known.since:.0f} s)"
                told.args, told.created = (), now
                super().emit(told)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower():<7} {_one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(form: str, level: str) -> None:
    """Send our own log to standard error in `form` (text, json); libraries only from warning up."""
    handler = Quieter(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("cdc_embedder").setLevel(level.upper())


def harmless(text: str) -> str:
    """Without what would steer a terminal: a name may hold it."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def _one_line(message: str) -> str:
    return harmless(" ".join(message.splitlines()))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
