"""What an operator sees on standard error, and what a machine reads there."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cdc_embedder import logs
from cdc_embedder.logs import BURST, Quieter

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("cdc_embedder")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


def test_text_is_one_line_of_time_level_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("text", "info")
    logging.getLogger("cdc_embedder.service").warning("confirmed through %s", "16/B374D848")
    [line] = lines(capsys)
    assert re.fullmatch(TIME + r" warning confirmed through 16/B374D848", line)


def test_levels_stand_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("text", "info")
    logging.getLogger("cdc_embedder").info("stopped")
    logging.getLogger("cdc_embedder").error("stopped")
    assert {line.index("stopped") for line in lines(capsys)} == {len("2026-01-01T00:00:00.000Z warning ")}


def test_json_is_one_object_a_line_whatever_the_message_holds(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json", "info")
    logging.getLogger("cdc_embedder.service").error("table %s", 'a"b\nÄ')
    [line] = lines(capsys)
    found = json.loads(line)
    assert re.fullmatch(TIME, found.pop("time"))
    assert found == {"level": "error", "logger": "cdc_embedder.service", "message": 'table a"b\nÄ'}


def test_the_time_is_utc_to_the_millisecond(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json", "info")
    record = logging.LogRecord("cdc_embedder", logging.INFO, "", 0, "x", None, None)
    record.created = 1_700_000_000.0
    logging.getLogger().handle(record)
    assert json.loads(lines(capsys)[0])["time"] == "2023-11-14T22:13:20.000Z"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_defect_is_logged_by_its_frames_and_not_by_its_message(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Which may quote the text of a row."""
    logs.set_up(form, "info")
    try:
        raise LookupError("the text of " + "a row")
    except LookupError:
        logging.getLogger("cdc_embedder").exception("defect")
    printed = "\n".join(lines(capsys))
    shown = json.loads(printed)["exception"] if form == "json" else printed
    assert "LookupError at" in shown
    assert "in test_a_defect_is_logged_by_its_frames" in shown
    assert "the text of a row" not in shown


UNSEEN = """
import asyncio, gc, sys, threading, warnings
from cdc_embedder import logs

def die():
    raise ValueError("the text of" + " a row")

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(logs.unhandled)
    loop.call_soon(die)
    task = asyncio.create_task(asyncio.to_thread(die))
    await asyncio.sleep(0.2)
    del task
    gc.collect()
    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    warnings.warn("be warned")

logs.set_up(sys.argv[1], "info")
logs.catch_all()
asyncio.run(main())
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_nobody_waits_for_is_logged_in_the_same_way(form: str) -> None:
    """Of callbacks, of tasks that nobody asks, of threads; and warnings of Python."""
    done = subprocess.run([sys.executable, "-c", UNSEEN, form], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "the text of a row" not in done.stderr
    assert done.stderr.count("ValueError at") == 3
    assert "a thread died" in done.stderr
    assert "be warned" in done.stderr
    if form == "json":
        assert [json.loads(line)["level"] for line in done.stderr.splitlines()] == ["error"] * 3 + ["warning"]


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", ["debug", "info", "warning", "error"]), ("info", ["info", "warning", "error"]), ("error", ["error"])],
)
def test_our_log_begins_at_the_level_asked_for(
    level: str, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("json", level)
    for name in ("debug", "info", "warning", "error"):
        logging.getLogger("cdc_embedder.wal.stream").log(getattr(logging, name.upper()), "x")
    assert [json.loads(line)["level"] for line in lines(capsys)] == shown


def test_libraries_speak_only_from_warning_up(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json", "debug")
    logging.getLogger("httpx").info("POST with everything")
    logging.getLogger("httpx").warning("x")
    assert [json.loads(line)["logger"] for line in lines(capsys)] == ["httpx"]


def test_set_up_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("text", "info")
    logs.set_up("json", "info")
    logging.getLogger("cdc_embedder").info("x")
    assert len(lines(capsys)) == 1


def at(second: float, message: str, *args: object, level: int = logging.WARNING) -> logging.LogRecord:
    record = logging.LogRecord("cdc_embedder.x", level, __file__, 1, message, args, None)
    record.created = second
    return record


def test_a_warning_that_comes_again_and_again_is_told_a_few_times_and_then_counted() -> None:
    out = io.StringIO()
    handler = Quieter(out)
    for n in range(40):
        handler.emit(at(100.0 + n, "the model is down; trying again in %.1f s", 0.1 * n))
    handler.emit(at(120.0, "something else"))
    assert out.getvalue().splitlines() == [
        *(f"the model is down; trying again in {0.1 * n:.1f} s" for n in range(BURST)),
        "something else",
    ]
    out.truncate(0)
    handler.emit(at(161.0, "a line of information", level=logging.INFO))
    assert out.getvalue().replace("\0", "").splitlines() == [
        "the model is down; trying again in 3.9 s (one of 40 in 61 s)",
        "a line of information",
    ]
    out.truncate(0)
    handler.emit(at(170.0, "the model is down; trying again in %.1f s", 1.0))
    assert "trying again in 1.0 s\n" in out.getvalue(), "a new period"


def test_neither_information_nor_a_traceback_is_ever_passed_over() -> None:
    out = io.StringIO()
    handler = Quieter(out)
    for n in range(20):
        handler.emit(at(100.0, "batch %d", n, level=logging.INFO))
        broken = at(100.0, "a defect")
        broken.exc_info = (ValueError, ValueError("x"), None)
        handler.emit(broken)
    assert out.getvalue().count("batch ") == 20
    assert out.getvalue().count("a defect") == 20
