"""How a connection string becomes ours: settings pinned in the startup packet, a name, and dead peers noticed.

Works for conninfo strings, URIs, the empty string (libpq's environment) and service files. Settings given in the
startup packet outrank ALTER ROLE and ALTER DATABASE … SET (rule 12). What to pin is decided by the caller; not for
opening connections.
"""

from __future__ import annotations

from collections.abc import Mapping

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo

from cdc_embedder.errors import Misconfigured

APPLICATION_NAME = "cdc-embedder"

_DEAD_PEER = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "4",
    "tcp_user_timeout": "30000",
}
"""libpq parameters that notice a dead peer, unless the user chose others. Seconds; the last one milliseconds."""


def pinned(dsn: str, purpose: str, settings: Mapping[str, str], **params: str | int) -> str:
    """`dsn` with `settings` pinned and `application_name=cdc-embedder <purpose>`; `params` are libpq parameters.

    The user's own `options` (in the DSN, its service, or PGOPTIONS) stay, ours come last and win. Raises Misconfigured
    if the DSN cannot be read; the message never shows it, since it may hold a password.
    """
    try:
        chosen = _chosen(dsn)
    except psycopg.ProgrammingError:
        raise Misconfigured(
            "the connection string cannot be read",
            hint="write a URI (postgresql://user@host/database) or keyword=value pairs; quote values that have spaces",
        ) from None
    ours: dict[str, str | int] = {name: value for name, value in _DEAD_PEER.items() if name not in chosen}
    pins = " ".join(f"-c {name}={_escape(value)}" for name, value in settings.items())
    ours["options"] = f"{chosen.get('options', '')} {pins}".strip()
    ours["application_name"] = f"{APPLICATION_NAME} {purpose}"
    return make_conninfo(dsn, **(ours | params))


def _escape(value: str) -> str:
    """The server splits `options` at blanks, and takes what follows a backslash as it is."""
    return "".join("\\" + char if char == "\\" or char.isspace() else char for char in value)


def _chosen(dsn: str) -> dict[str, str]:
    """What libpq will use for `dsn`: the string itself, its service, the environment, in this order.

    Only libpq knows how to find and merge these, so it is asked: a connection that is started towards a socket
    directory that cannot exist has read everything, and has talked to nobody.
    """
    attempt = pq.PGconn.connect_start(make_conninfo(dsn, host="/\x01nowhere", hostaddr="").encode())
    try:
        return {option.keyword.decode(): option.val.decode() for option in attempt.info if option.val}
    finally:
        attempt.finish()
