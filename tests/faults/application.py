"""An application that writes all the time, and what must hold of a service that is disturbed meanwhile."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tests.servers import Bench
from tests.service import Service, assert_every_vector_is_of_its_text, running, until, wait_caught_up


@contextmanager
def served(bench: Bench, **environment: str) -> Iterator[Service]:
    """The service, which must neither end nor show a bug whatever happens."""
    with running(bench, **environment) as service:
        yield service
        assert service.exit_status is None, service.log
        assert_sane(service)


def assert_sane(service: Service) -> None:
    """No bug and no traceback; where there was trouble, the line says what happens next or what to do."""
    for line in service.log.splitlines():
        assert "Traceback" not in line, service.log
        level, _, said = line.partition(" ")[2].partition(" ")
        assert level in ("debug", "info", "warning", "error"), line
        if level == "warning":
            assert re.search(r"trying again|scanned|is given up|query|pg_drop_replication_slot", said), line


class Application(threading.Thread):
    """Inserts, updates and deletes rows of `documents` until told to stop, and survives the server's absence."""

    def __init__(self, dsn: str, seed: int) -> None:
        super().__init__()
        self._dsn = dsn
        self._random = random.Random(seed)
        self._stop_wanted = threading.Event()
        self.committed = 0
        self.unexpected: list[str] = []

    def __enter__(self) -> Application:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop_wanted.set()
        self.join()

    def run(self) -> None:
        while not self._stop_wanted.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True, connect_timeout=5) as connection:
                    while not self._stop_wanted.is_set():
                        self._work(connection)
            except psycopg.OperationalError:
                self._stop_wanted.wait(0.05)
            except psycopg.Error as error:
                self.unexpected.append(str(error))
                return

    def _work(self, connection: psycopg.Connection) -> None:
        id, text = self._random.randrange(200), f"text {self._random.random()}"
        connection.execute(
            "INSERT INTO documents (id, body) VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            (id, text),
        )
        if self._random.random() < 0.1:
            connection.execute("DELETE FROM documents WHERE id = %s", (self._random.randrange(200),))
        self.committed += 1
        self._stop_wanted.wait(0.002)


def more_commits(application: Application, count: int = 30) -> None:
    """The application goes on for a while."""
    target = application.committed + count
    until(lambda: application.committed >= target or application.unexpected, "the application never got on")


def converges(bench: Bench) -> None:
    wait_caught_up(bench)
    assert_every_vector_is_of_its_text(bench)
    assert bench.admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)
