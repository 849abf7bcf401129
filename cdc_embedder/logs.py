"""Log lines for the operator: on standard error, as text or as JSON, never with the text of a row.

One line an event, lower case. `sentence` of a Problem carries its hint, so a line says what to do. A warning that comes
again and again, but for its numbers, is told BURST times in PERIOD_SECONDS; the rest is counted, and the count told.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import asyncio

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


_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class _Formatter(logging.Formatter):
    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        return "" if ei[1] is None else frames_of(ei[1])


class _Text(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower():<7} {_one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(_Formatter):
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


def catch_all() -> None:
    """Have what a thread dies of, and Python's warnings, go the same way as the rest."""
    threading.excepthook = _thread_died
    logging.captureWarnings(True)


def unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's handler of exceptions; the loop's own would print them, and a row's text that they quote."""
    error = context.get("exception")
    told = frames_of(error) if isinstance(error, BaseException) else ""
    logging.getLogger("cdc_embedder").error("a bug, please report it: %s: %s", context.get("message", ""), told)


def _thread_died(died: threading.ExceptHookArgs) -> None:
    told = died.exc_type.__name__ if died.exc_value is None else frames_of(died.exc_value)
    logging.getLogger("cdc_embedder").error("a bug, please report it: a thread died: %s", told)


def frames_of(error: BaseException) -> str:
    """Where a bug of ours showed, frame by frame, without any message: it may quote the text of a row."""
    lines, seen = [], [error]
    while seen:
        error = seen.pop()
        if isinstance(error, BaseExceptionGroup):
            seen += error.exceptions
        lines.append(f"{type(error).__name__} at\n" + "".join(traceback.format_tb(error.__traceback__)))
    return "\n".join(lines)


def harmless(text: str) -> str:
    """Without what would steer a terminal: a name may hold it."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def _one_line(message: str) -> str:
    return harmless(" ".join(message.splitlines()))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
