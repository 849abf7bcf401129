"""The service with a model behind the OpenAI embeddings API: a real server on loopback that fails now and then."""

from __future__ import annotations

import pytest
from psycopg.types.json import Jsonb

from tests.documents import make_documents
from tests.embedding_api import api
from tests.servers import Bench
from tests.service import assert_every_vector_is_of_its_text, running, status, until, wait_caught_up

KEY = "sk-planted-secret"


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
            server.down = True
            admin.execute("UPDATE documents SET body = 'during the outage ' || id")
            until(lambda: "503" in (status(bench)[0]["reason"] or ""), "the outage is not told", lambda: status(bench))
            assert admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)
            server.down = False
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench, model="api") == 30
            admin.execute("UPDATE documents SET body = 'poison' WHERE id = 5")
            until(lambda: status(bench)[0]["failed"] == 1, "the refusal is not recorded", lambda: status(bench))
            assert "poison" not in service.log
            assert KEY not in service.log
            stored = admin.execute("SELECT error FROM cdc_embedder.failed").fetchone()
            assert stored is not None
            assert "poison" not in stored[0]
        assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("at_once", [1, 3])
def test_as_many_requests_are_on_their_way_at_once_as_the_model_allows(bench18: Bench, at_once: int) -> None:
    bench, admin = bench18, bench18.admin
    with api() as server:
        server.pause_s = 0.1
        options = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "max_requests": at_once}
        admin.execute(
            "INSERT INTO cdc_embedder.model (name, backend, dimensions, options) VALUES ('api', 'openai', 8, %s)",
            (Jsonb(options),),
        )
        make_documents(bench, 200, model="api")
        with running(bench):
            wait_caught_up(bench)
            assert assert_every_vector_is_of_its_text(bench, model="api") == 200
        assert server.most_at_once == at_once
        assert len(server.texts) == 200, "no text twice"
