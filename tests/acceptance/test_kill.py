"""The promise as a whole, on real parts: the process is killed in the middle, and every vector is right in the end."""

from __future__ import annotations

import pydoc_data.topics
import textwrap

import numpy as np
import pytest

from tests.servers import Bench
from tests.service import Service, caught_up, status, until

TEXTS = 200


def _texts() -> list[str]:
    """Real prose of mixed length: the language reference's topics, by paragraph."""
    paragraphs = [
        textwrap.dedent(part).strip()
        for topic in sorted(pydoc_data.topics.topics)
        for part in pydoc_data.topics.topics[topic].split("\n\n")
    ]
    return [part for part in dict.fromkeys(paragraphs) if len(part) > 20][:TEXTS]


@pytest.mark.timeout(600)
def test_after_kill_9_in_the_middle_every_vector_is_what_the_model_gives_for_the_present_text(bench18: Bench) -> None:
    from cdc_embedder.embedding.model_source import locate
    from cdc_embedder.embedding.registry import builtin_spec

    bench, admin = bench18, bench18.admin
    admin.execute("CREATE TABLE documents (id bigint PRIMARY KEY, body text, embedding vector(384))")
    bench.grant("documents", ["id"], ["body"], "embedding")
    texts = _texts()
    with admin.cursor().copy("COPY documents (id, body) FROM STDIN") as copy:
        for n, text in enumerate(texts):
            copy.write_row((n, text))
    admin.execute(
        "INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model)"
        " VALUES ('documents', '{body}', 'embedding', 'all-MiniLM-L6-v2')"
    )

    def settled() -> bool:
        if status(bench)[0]["failed"]:
            admin.execute("SELECT cdc_embedder.retry_failed('documents')")
        return caught_up(bench)

    service = Service(bench, HF_HUB_OFFLINE="1").start()
    try:
        for round, share in enumerate((0.2, 0.5, 0.8)):
            until(lambda share=share: status(bench)[0]["current"] >= share * TEXTS, "too slow", lambda: service.log)
            admin.execute(
                "UPDATE documents SET body = 'round ' || %s || ': ' || body WHERE id %% 7 = %s", (round, round)
            )
            admin.execute("UPDATE documents SET body = NULL WHERE id = %s", (round,))
            service.kill()
            admin.execute("UPDATE documents SET body = 'while dead: ' || body WHERE id %% 11 = %s", (round,))
            admin.execute("DELETE FROM documents WHERE id = %s", (100 + round,))
            service.start()
        # A text that was alone with the model at two kills is set aside for a minute, by rule 7; here it need not wait.
        until(settled, "the kills left rows behind", lambda: f"{status(bench)}\n{service.log}")
        assert service.stop() == 0
    except BaseException:
        print(service.log)
        raise
    finally:
        service.end()
    spec = builtin_spec("all-MiniLM-L6-v2")
    assert spec is not None
    folder = locate(spec).folder
    assert folder is not None
    rows = admin.execute("SELECT body, embedding::real[] FROM documents ORDER BY id").fetchall()
    assert len(rows) == TEXTS - 3
    assert sum(body is None for body, _ in rows) == 3
    assert all((body is None) == (stored is None) for body, stored in rows)
    _assert_cosines([body for body, _ in rows if body is not None],
                    np.array([stored for _, stored in rows if stored is not None]), str(folder))  # fmt: skip
    assert admin.execute("SELECT count(*) FROM cdc_embedder.failed").fetchone() == (0,)


def _assert_cosines(bodies: list[str], stored: np.ndarray, folder: str) -> None:
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(folder, device="cpu").encode(bodies, normalize_embeddings=True)
    cosines = (expected * stored).sum(axis=1)
    assert cosines.min() >= 0.9999
    assert np.abs(np.linalg.norm(stored, axis=1) - 1).max() < 1e-5
