"""An embedding service that speaks OpenAI's protocol on loopback, fails when it is told to, and counts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cdc_embedder.embedding.fake import fake_vector


class Server(ThreadingHTTPServer):
    """`texts` are those that were embedded, `keys` the Authorization headers that came; `most_at_once` requests were
    answered at one time, each of which takes `pause_s`."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.down = False
        self.texts: list[str] = []
        self.keys: set[str | None] = set()
        self.pause_s = 0.0
        self.at_once = self.most_at_once = 0
        self.counting = threading.Lock()


class Api(BaseHTTPRequestHandler):
    """`POST /v1/embeddings`; refuses texts with "poison", everything while `server.down`, and notes what it embeds."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/embeddings"
        self.server.keys.add(self.headers["Authorization"])
        with self.server.counting:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        time.sleep(self.server.pause_s)
        with self.server.counting:
            self.server.at_once -= 1
        if self.server.down:
            self._answer(503, {"error": {"message": "overloaded"}})
        elif any("poison" in text for text in body["input"]):
            self._answer(400, {"error": {"message": f"cannot embed {body['input']}"}})
        else:
            self.server.texts += body["input"]
            vectors = [fake_vector("api", text, 8).tolist() for text in body["input"]]
            data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(vectors)]
            self._answer(200, {"object": "list", "data": data, "model": body["model"], "usage": {"total_tokens": 1}})

    def _answer(self, status: int, body: object) -> None:
        sent = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def api() -> Iterator[Server]:
    """The server, running."""
    server = Server(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
