"""Expressions of generated columns as pg_get_expr prints them: understood as a whole, or refused with a reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_embedder.generated import NotUnderstood, Recipe, read

E5 = "intfloat/e5-small-v2"

UNDERSTOOD = {
    "pgml.embed('intfloat/e5-small-v2'::text, body)": Recipe(E5, "body"),
    "pgml.normalize_l2(pgml.embed('intfloat/e5-small-v2'::text, body))": Recipe(E5, "body", normalize=True),
    "(pgml.normalize_l2(pgml.embed('intfloat/e5-small-v2'::text, body)))::public.vector(384)": Recipe(
        E5, "body", normalize=True
    ),
    "pgml.normalize_l2((pgml.embed('m'::text, body))::double precision[])": Recipe("m", "body", normalize=True),
    "((pgml.embed('m'::text, body))::real[])::\"x y\".halfvec(3)": Recipe("m", "body"),
    '''pgml.embed('it''s'::text, "The ""Body""", '{"prompt": "passage: "}'::jsonb)''': Recipe(
        "it's", 'The "Body"', "passage: "
    ),
    """pgml.embed('m'::text, body, '{"device": "cuda", "normalize_embeddings": true}'::jsonb)""": Recipe(
        "m", "body", normalize=True
    ),
    """pgml.embed('m'::text, body, '{"normalize_embeddings": false}'::jsonb)""": Recipe("m", "body", normalize=False),
    """pgml.embed(transformer => 'm'::text, text => body, kwargs => '{"trust_remote_code": true}'::jsonb)""": Recipe(
        "m", "body", trust_remote_code=True
    ),
    "pgml.embed('m'::text, ('passage: '::text || body))": Recipe("m", "body", "passage: "),
    "pgml.embed('m'::text, ('passage: '::text || (body)::text))": Recipe("m", "body", "passage: "),
    r"""pgml.embed('m'::text, (E'a\\b'::text || body), E'{"prompt": "c\\n"}'::jsonb)""": Recipe("m", "body", "c\na\\b"),
}

REFUSED = {
    "pgml.embed('m'::text, ((title || ' '::text) || body))": "more than a literal and one column",
    "pgml.embed('m'::text, (body || '.'::text))": "not of a column",
    "pgml.embed('m'::text, COALESCE(body, ''::text))": "the text goes through COALESCE",
    "pgml.embed('m'::text, (body)::character varying(10))": "the text is cast to character varying(…)",
    "pgml.embed('m'::text, documents.body)": "the text is documents.body",
    "pgml.embed('m'::text, 'constant'::text)": "the text is not of a column",
    "pgml.embed(name, body)": "the model is not a literal",
    "pgml.embed('m'::text, body, options)": "kwargs is not a literal",
    "pgml.embed('m'::text, body, '[]'::jsonb)": "kwargs are not a JSON object",
    """pgml.embed('m'::text, body, '{"prompt_name": "query"}'::jsonb)""": 'kwargs hold "prompt_name": "query"',
    """pgml.embed('m'::text, body, '{"prompt": 1}'::jsonb)""": 'kwargs hold "prompt": 1',
    """pgml.embed('m'::text, body, '{"normalize_embeddings": 1}'::jsonb)""": 'kwargs hold "normalize_embeddings": 1',
    "pgml.embed('m'::text)": "called without text",
    "pgml.embed('m'::text, body, '{}'::jsonb, 1)": "is not understood",
    "pgml.embed('m'::text, body, '{}'::jsonb, body)": "called with one argument too many",
    "pgml.embed(task => 'm'::text, text => body)": "called with task",
    "pgml.normalize_l1(pgml.embed('m'::text, body))": "the vector goes through pgml.normalize_l1",
    "(pgml.embed('m'::text, body))[1:4]": "is not understood",
    "(pgml.embed('m'::text, body))::text": "the vector is cast to text",
    "(pgml.embed('m'::text, body))::real": "the vector is cast to real",
    "(pgml.embed('m'::text, body))::bit(3)": "the vector is cast to bit(…)",
    "CASE WHEN (body IS NULL) THEN NULL::real[] ELSE pgml.embed('m'::text, body) END": "is not understood",
    "body": "not simply what pgml.embed gives",
    "other.embed('m'::text, body)": "the vector goes through other.embed",
    "(pgml.embed('m'::text, body) + 1)": "is not understood",
    "": "is not understood",
}


@pytest.mark.parametrize(("expression", "recipe"), UNDERSTOOD.items())
def test_what_pgml_embed_does_with_one_column_is_understood(expression: str, recipe: Recipe) -> None:
    assert read(expression) == recipe


def test_an_expression_that_says_nothing_of_lengths_is_not_taken_to_say_that_they_stay() -> None:
    assert read("pgml.embed('m'::text, body)").normalize is None
    assert read("""pgml.embed('m'::text, body, '{"normalize_embeddings": false}'::jsonb)""").normalize is False


@pytest.mark.parametrize(("expression", "reason"), REFUSED.items())
def test_anything_else_is_refused_with_the_reason(expression: str, reason: str) -> None:
    with pytest.raises(NotUnderstood) as refused:
        read(expression)
    assert reason in str(refused.value)


@given(st.sampled_from(sorted(UNDERSTOOD)), st.data())
def test_an_expression_that_is_cut_is_refused_and_nothing_else_is_raised(expression: str, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(expression) - 1))
    try:
        read(expression[:end])
    except NotUnderstood:
        return
    assert expression[end:].startswith(("::", ".", "(")), "only a cast may be missing"


@given(st.text("(){}[]'\"\\,.:|=>pgml.embed text", max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        read(text)
    except NotUnderstood:
        pass
