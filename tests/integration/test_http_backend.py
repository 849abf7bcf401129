"""The service with a model behind the OpenAI embeddings API: a real server on loopback that fails now and then."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from psycopg.types.json import Jsonb

from cdc_embedder.embedding.fake import fake_vector
from tests.servers import Bench
from tests.service import assert_every_vector_is_of_its_text, running, status, until, wait_caught_up

KEY = "sk-planted-secret"


class Api(BaseHTTPRequestHandler):
    """`POST /v1/embeddings`; refuses texts with "poison", and everything while `server.down`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/embeddings"
        self.server.keys.add(self.headers["Authorization"])  # type: ignore[attr-defined]
        if self.server.down:  # type: ignore[attr-defined]
            self._answer(503, {"error": {"message": "overloaded"}})
        elif any("poison" in text for text in body["input"]):
            self._answer(400, {"error": {"message": f"cannot embed {body['input']}"}})
        else:
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
def api() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.down, server.keys = False, set()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_http_service_embeds_its_outage_blames_no_row_and_its_refusal_one(bench18: Bench) -> None:
    bench, admin = bench18, bench18.admin
    with api() as server:
        options = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "api_key_env": "OPENAI_API_KEY"}
        admin.execute(
            "INSERT INTO cdc_embedder.model (name, backend, source, dimensions, options)"
            " VALUES ('api', 'openai', 'some/model', 8, %s)",
            (Jsonb(options),),
        )
        admin.execute("CREATE TABLE documents (id int PRIMARY KEY, body text, embedding vector(8))")
        bench.grant("documents", ["id"], ["body"], "embedding")
        admin.execute("INSERT INTO documents SELECT n, 'text ' || n FROM generate_series(1, 30) n")
        admin.execute(
            "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
            " VALUES ('documents', '{body}', 'embedding', 'api')"
        )
        with running(bench, OPENAI_API_KEY=KEY) as service:
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench, model="api") == 30
            server.down = True  # type: ignore[attr-defined]
            admin.execute("UPDATE documents SET body = 'during the outage ' || id")
            until(lambda: "503" in (status(bench)[0]["reason"] or ""), "the outage is not told", lambda: status(bench))
            assert admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)
            server.down = False  # type: ignore[attr-defined]
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench, model="api") == 30
            admin.execute("UPDATE documents SET body = 'poison' WHERE id = 5")
            until(lambda: status(bench)[0]["failed"] == 1, "the refusal is not recorded", lambda: status(bench))
            assert "poison" not in service.log
            assert KEY not in service.log
            stored = admin.execute("SELECT error FROM cdc_embedder.failed").fetchone()
            assert stored is not None
            assert "poison" not in stored[0]
        assert server.keys == {f"Bearer {KEY}"}  # type: ignore[attr-defined]
