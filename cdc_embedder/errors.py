"""Every error that leaves the package, as one shallow tree.

    Problem
    ├── Temporary            trying again makes sense, nothing is wrong with any row
    │   ├── ServerGone       the database server is away, starting, or out of connections
    │   ├── SlotBusy         another instance holds the slot or the advisory lock
    │   ├── SlotLost         the slot is gone or was invalidated: it is made anew (in `wal.diagnosis`)
    │   ├── SlotStuck        the slot cannot be read past some change: it is made anew (in `wal.diagnosis`)
    │   └── EmbedderDown     device, network or embedding service: never counted against a row
    ├── Misconfigured        an operator has to act: the process exits with status 1
    │   └── PluginRefused    the server lacks or refuses the output plugin (in `wal.diagnosis`)
    ├── ColumnFault          one configured column cannot be served; the others go on
    │   └── ModelFault       ... because its model cannot be used as its row in the table says
    ├── TextRejected         the embedder refused one text for the text's own sake
    └── ProtocolError        bytes from the server that the decoder does not understand
        └── NotCarried       ... because the output plugin cannot carry a value: another one can

Each says what happened, in a sentence, and what to do about it (`hint`). The driver's exceptions are
translated in one place, by SQLSTATE, never by message text: `database_errors.from_database`. No I/O here.
"""

from __future__ import annotations


class Problem(Exception):
    """What happened (`args[0]`), what to do (`hint`), and the server's SQLSTATE where there is one."""

    def __init__(self, message: str, *, hint: str = "", sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.sqlstate = sqlstate

    @property
    def sentence(self) -> str:
        """Message and hint on one line, as logs and the command line show them."""
        return f"{self}. {self.hint}" if self.hint else str(self)


class Temporary(Problem):
    """Trying again makes sense."""


class ServerGone(Temporary):
    """The server cannot be reached, is starting or stopping, or has no connection left."""


class SlotBusy(Temporary):
    """Another instance holds the slot, or the advisory lock beside it."""


class EmbedderDown(Temporary):
    """The device, the network or the embedding service failed. `retry_after` is in seconds, where it was told."""

    def __init__(self, message: str, *, hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class Misconfigured(Problem):
    """The service cannot work until somebody changes something; the hint says what."""


class ColumnFault(Problem):
    """One configured column cannot be served as things are; it pauses with this reason."""


class ModelFault(ColumnFault):
    """The model cannot be used as its row in the `model` table says."""


class TextRejected(Problem):
    """The embedder refused one text, and would refuse it again. The message never holds the text."""


class ProtocolError(Problem):
    """The stream holds something that the decoder does not understand; guessing would lose rows."""


class NotCarried(ProtocolError):
    """The output plugin cannot carry the value of a key. pgoutput can."""
