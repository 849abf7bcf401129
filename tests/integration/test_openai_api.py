"""Embeddings over HTTP from the real process, asked by the clients that applications have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from cdc_embedder.embedding.fake import fake_vector
from tests.documents import make_documents, make_model
from tests.servers import Bench
from tests.service import Service, assert_every_vector_is_of_its_text, running, status, until, wait_caught_up

TOKEN = "a-token-for-the-tests"


def url(service: Service) -> str:
    """Where the process listens, by its log."""
    service.wait_for_log("embeddings at /v1/embeddings")
    found = re.search(r"health is served at (http://\S+)/healthz", service.log)
    assert found is not None
    return found[1] + "/v1"


@pytest.fixture
def service(bench18: Bench) -> Iterator[Service]:
    """A service that works, with a model that has prompts and one that refuses a text."""
    make_model(bench18)
    make_model(bench18, "fussy", reject="poison")
    make_model(bench18, "slow", delay_per_text_s=0.01)
    bench18.admin.execute(
        "UPDATE cdc_embedder.model SET query_prompt = 'query: ', document_prompt = 'passage: ' WHERE name = 'fake'"
    )
    with running(bench18, CDC_EMBEDDER_HTTP="127.0.0.1:0", CDC_EMBEDDER_HTTP_TOKEN=TOKEN) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """OpenAI's own, once the service works: it tries again by itself while it is told to."""
    with openai.OpenAI(base_url=url(service), api_key=TOKEN, max_retries=20, timeout=120) as client:
        until(lambda: "fake" in {model.id for model in client.models.list()}, "no model known", lambda: service.log)
        yield client


def same(found: list[float], text: str, model: str = "fake") -> bool:
    return bool(np.allclose(found, fake_vector(model, text, 8), atol=1e-6))


def test_openais_client_asks_for_vectors_in_every_way_it_knows(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model="fake", input="größe ½ 東京")  # base64, as the client asks by itself
    assert same(one.data[0].embedding, "größe ½ 東京")
    assert (one.model, one.usage.prompt_tokens, one.usage.total_tokens) == ("fake", 3, 3)
    many = client.embeddings.create(model="fake", input=["a", "b"], encoding_format="float", user="somebody")
    assert [same(each.embedding, text) for each, text in zip(many.data, "ab", strict=True)] == [True, True]
    query = client.embeddings.create(model="fake", input="a", extra_body={"input_type": "query"})
    assert same(query.data[0].embedding, "query: a")
    short = client.embeddings.create(model="fake", input="a", dimensions=4).data[0].embedding
    first = fake_vector("fake", "a", 8)[:4]
    assert np.allclose(short, first / np.linalg.norm(first), atol=1e-6)


def test_what_is_wrong_is_an_exception_of_openais_client(client: openai.OpenAI, service: Service) -> None:
    once = client.with_options(max_retries=0)
    with pytest.raises(openai.NotFoundError) as unknown:
        once.embeddings.create(model="other", input="a")
    assert unknown.value.code == "model_not_found"
    for wrong in ("", [], [1, 2], ["a", ""]):
        with pytest.raises(openai.BadRequestError) as bad:
            once.embeddings.create(model="fake", input=wrong)
        assert (bad.value.param, bad.value.type) == ("input", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="text 2: "):
        once.embeddings.create(model="fussy", input=["fine", "poison that nobody may read"])
    with pytest.raises(openai.BadRequestError, match="8 dimensions"):
        once.embeddings.create(model="fake", input="a", dimensions=9)
    with pytest.raises(openai.APIStatusError) as large:
        once.embeddings.create(model="fake", input="a" * (9 << 20))
    assert large.value.status_code == 413
    with pytest.raises(openai.AuthenticationError) as stranger:
        once.with_options(api_key="another").embeddings.create(model="fake", input="a")
    assert stranger.value.code == "invalid_api_key"
    assert "nobody may read" not in service.log
    assert TOKEN not in service.log


def test_langchain_embeds_documents_and_a_query(client: openai.OpenAI) -> None:
    texts = [f"text {n}" for n in range(10)]
    with httpx.Client() as connections:  # LangChain's own are never closed
        embeddings = OpenAIEmbeddings(
            model="fake",
            base_url=str(client.base_url),
            api_key=TOKEN,  # type: ignore[arg-type]
            check_embedding_ctx_length=False,
            chunk_size=3,
            http_client=connections,
        )
        vectors = embeddings.embed_documents(texts)
        assert [same(vector, text) for vector, text in zip(vectors, texts, strict=True)] == [True] * 10
        assert same(embeddings.embed_query("what is asked"), "what is asked")
        query = embeddings.model_copy(update={"model_kwargs": {"extra_body": {"input_type": "query"}}})
        assert same(query.embed_query("what is asked"), "query: what is asked")


def test_many_at_once_get_each_its_own_vectors_while_a_table_is_filled(
    client: openai.OpenAI, service: Service, bench18: Bench
) -> None:
    make_documents(bench18, 500, model="slow")
    until(lambda: any(row["coverage"] for row in status(bench18)), "the backfill never began", lambda: service.log)

    def ask(n: int) -> bool:
        texts = [f"{n} {m}" for m in range(n % 5 + 1)]
        model = "slow" if n % 5 == 1 else "fake"
        found = client.embeddings.create(model=model, input=texts).data
        return all(same(each.embedding, text, model) for each, text in zip(found, texts, strict=True))

    with ThreadPoolExecutor(32) as pool:
        first = pool.submit(ask, 1)
        assert first.result()
        assert status(bench18)[0]["coverage"] < 100, "the backfill was to be under way still"
        assert all(pool.map(ask, range(200)))
    wait_caught_up(bench18)
    assert_every_vector_is_of_its_text(bench18, model="slow")
    assert service.stop() == 0
