"""The vector functions of SQL against numpy, on each server; and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.configuring import Connection, one
from tests.servers import Bench, make_bench

BINARY = ("distance_l1", "distance_l2", "dot_product", "cosine_similarity", "add", "subtract", "multiply")
UNARY = ("norm_l0", "norm_l1", "norm_l2", "norm_max", "normalize_l1", "normalize_l2", "normalize_max")
ARITHMETIC = ("add", "subtract", "multiply", "divide")
AGGREGATES = ("sum", "max", "min", "max_abs", "min_abs")

FORMS = (
    *((f"{name}(a, b)", name, 1) for name in BINARY),
    *((f"{name}(a)", name, 1) for name in UNARY),
    ("divide(a, d)", "divide", 2),
    *((f"{name}(a, s)", name, 3) for name in ARITHMETIC),
)
"""How each is called, its name, and which part of a case its second argument is."""

Vector = NDArray[np.float64]
Case = tuple[Vector, Vector, Vector, float]
"""Two vectors, one of the same length without a zero, and a number that is not zero."""


@pytest.fixture(scope="module", params=["pg15", "pg18"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """One database a server: nothing here writes."""
    yield from make_bench(request.getfixturevalue(request.param), "pgoutput")


@pytest.fixture(scope="module")
def conn(bench: Bench) -> Iterator[Connection]:
    with psycopg.connect(bench.dsn_service, autocommit=True) as connection:
        connection.execute("SET extra_float_digits = 3")
        yield connection


def divisors(bits: int) -> st.SearchStrategy[float]:
    """What is neither too large nor too small for a product or a quotient of two in so many bits."""
    positive = st.floats(2.0**-50, 2.0**50, width=bits)  # type: ignore[arg-type]
    return st.one_of(positive, positive.map(lambda value: -value))


def elements(bits: int) -> st.SearchStrategy[float]:
    return st.one_of(st.just(0.0), st.floats(-1, 1, width=16), divisors(bits))


def vectors(element: st.SearchStrategy[float], length: int) -> st.SearchStrategy[Vector]:
    return st.lists(element, min_size=length, max_size=length).map(lambda values: np.array(values, np.float64))


def cases(bits: int) -> st.SearchStrategy[list[Case]]:
    def of_length(length: int) -> st.SearchStrategy[Case]:
        vector = vectors(elements(bits), length)
        return st.tuples(vector, vector, vectors(divisors(bits), length), divisors(bits))

    return st.lists(st.integers(1, 9).flatmap(of_length), min_size=15, max_size=25)


def groups(bits: int) -> st.SearchStrategy[list[list[Vector | None]]]:
    """Rows for aggregates; those of a group have one length, or are NULL."""

    def of_length(length: int) -> st.SearchStrategy[list[Vector | None]]:
        return st.lists(st.one_of(st.none(), *[vectors(elements(bits), length)] * 5), min_size=1, max_size=8)

    return st.lists(st.integers(1, 9).flatmap(of_length), min_size=15, max_size=25)


def expected(name: str, a: Vector, b: Vector | float) -> Any:
    norms = {"l0": 0, "l1": 1, "l2": 2, "max": np.inf}
    match name.split("_"):
        case ["norm", kind]:
            return np.linalg.norm(a, norms[kind])
        case ["normalize", kind]:
            return a / np.linalg.norm(a, norms[kind])
        case ["distance", kind]:
            return np.linalg.norm(a - b, norms[kind])
        case ["dot", _]:
            return a @ b
        case ["cosine", _]:
            return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return getattr(np, name)(a, b)


def assert_near(name: str, got: Any, a: Vector, b: Any, tolerance: float) -> None:
    """Within the rounding of the result, and of sums whose terms cancel."""
    with np.errstate(invalid="ignore", divide="ignore"):
        want = expected(name, a, b)
        scale = np.abs(a) @ np.abs(b) if name == "dot_product" else float(name == "cosine_similarity")
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=1e-14 * scale, err_msg=f"{name}({a}, {b})")


@pytest.mark.parametrize(("element", "bits", "tolerance"), [("real", 32, 1e-6), ("double precision", 64, 1e-12)])
def test_every_function_is_numpys(conn: Connection, element: str, bits: int, tolerance: float) -> None:
    calls = ", ".join(f"cdc_embedder.{call}" for call, *_ in FORMS)
    statement = (
        f"SELECT {calls} FROM unnest({', '.join(['%s::text[]'] * 4)}) WITH ORDINALITY AS t(w, x, y, z, n),"
        f" LATERAL (SELECT w::{element}[], x::{element}[], y::{element}[], z::{element}) AS v(a, b, d, s) ORDER BY n"
    )

    @settings(max_examples=8)
    @given(cases(bits))
    def check(cases: list[Case]) -> None:
        literals = [[literal(value) for value in side] for side in zip(*cases, strict=True)]
        rows = conn.execute(statement, literals).fetchall()  # type: ignore[arg-type]
        for case, row in zip(cases, rows, strict=True):
            for (_, name, second), got in zip(FORMS, row, strict=True):
                assert_near(name, got, case[0], case[second], tolerance)

    check()


def literal(value: Vector | float) -> str:
    return repr(value) if isinstance(value, float) else "{" + ",".join(map(repr, value.tolist())) + "}"


@pytest.mark.parametrize(("element", "bits", "tolerance"), [("real", 32, 1e-6), ("double precision", 64, 1e-12)])
def test_every_aggregate_is_numpys(conn: Connection, element: str, bits: int, tolerance: float) -> None:
    calls = ", ".join(f"cdc_embedder.{name}(x::{element}[])" for name in AGGREGATES)
    statement = f"SELECT {calls} FROM unnest(%s::int[], %s::text[]) AS t(g, x) GROUP BY g ORDER BY g"

    @settings(max_examples=8)
    @given(groups(bits))
    def check(groups: list[list[Vector | None]]) -> None:
        rows = [(number, vector) for number, group in enumerate(groups) for vector in group]
        texts = [None if vector is None else literal(vector) for _, vector in rows]
        found = conn.execute(statement, ([number for number, _ in rows], texts)).fetchall()  # type: ignore[arg-type]
        for group, row in zip(groups, found, strict=True):
            there = np.array([vector for vector in group if vector is not None])
            if not len(there):
                assert row == (None,) * len(AGGREGATES)
                continue
            for name, got in zip(AGGREGATES, row, strict=True):
                kind, of = name.partition("_")[0], np.abs(there) if name.endswith("abs") else there
                # a sum's terms may cancel
                scale = np.abs(there).sum(0).max() if kind == "sum" else 0.0
                np.testing.assert_allclose(got, getattr(of, kind)(0), rtol=tolerance, atol=1e-14 * scale, err_msg=name)

    check()


@pytest.mark.parametrize("element", ["real", "double precision"])
def test_a_number_is_applied_to_every_element(conn: Connection, element: str) -> None:
    vector = np.array([1.5, -2.0, 0.0])
    for name, want in (
        ("add", vector + 4),
        ("subtract", vector - 4),
        ("multiply", vector * 4),
        ("divide", vector / 4),
    ):
        got, kind = one(
            conn, f"SELECT v, pg_typeof(v)::text FROM cdc_embedder.{name}('{{1.5,-2,0}}'::{element}[], 4) v"
        )
        assert (got, kind) == (want.tolist(), f"{element}[]")
    quotient = f"SELECT cdc_embedder.divide('{{1,-9}}'::{element}[], '{{2,3}}'::{element}[])"
    assert one(conn, quotient) == [0.5, -3.0]


@pytest.mark.parametrize("element", ["real", "double precision"])
def test_aggregates_go_element_by_element_and_leave_null_rows_out(conn: Connection, element: str) -> None:
    generator = np.random.default_rng(7)
    rows = generator.normal(size=(500, 6)).astype(np.float32).astype(np.float64)
    wanted = {
        "sum": rows.sum(0), "max": rows.max(0), "min": rows.min(0), "max_abs": np.abs(rows).max(0),
        "min_abs": np.abs(rows).min(0)}  # fmt: skip
    calls = ", ".join(f"cdc_embedder.{name}(v)" for name in AGGREGATES)
    statement = f"SELECT {calls} FROM unnest(%s::text[]) AS t(x), LATERAL (SELECT x::{element}[] AS v) AS u"
    literals = [None, *map(literal, rows), None]
    for name, got in zip(AGGREGATES, one(conn, statement, literals), strict=True):
        np.testing.assert_allclose(got, wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)
    assert one(conn, statement, [None]) == (None,) * 5
    assert one(conn, statement, ["{-2,3}"]) == ([-2.0, 3.0], [-2.0, 3.0], [-2.0, 3.0], [2.0, 3.0], [2.0, 3.0])


def test_aggregates_run_in_parallel(bench: Bench) -> None:
    bench.admin.execute(
        "CREATE TABLE many AS SELECT ARRAY[n % 7, -n, 1]::real[] AS v FROM generate_series(1, 20000) n;"
        "ANALYZE many; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;"
        "SET max_parallel_workers_per_gather = 2"
    )
    calls = ", ".join(f"cdc_embedder.{name}(v)" for name in AGGREGATES)
    plan = "\n".join(row[0] for row in bench.admin.execute(f"EXPLAIN SELECT {calls} FROM many"))  # type: ignore[arg-type]
    assert "Partial Aggregate" in plan
    sums = one(bench.admin, f"SELECT {calls} FROM many")
    assert sums == ([59998.0, -200010000.0, 20000.0], [6.0, -1.0, 1.0], [0.0, -20000.0, 1.0], [6.0, 20000.0, 1.0],
                    [0.0, 1.0, 1.0])  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("distance_l2('{3,4}'::real[], '{0,0}'::double precision[])", "double precision"),
        ("distance_l2('{3,4}'::double precision[], '{0,0}'::real[])", "double precision"),
        ("distance_l2('{3,4}', '{0,0}'::real[])", "real"),
        ("distance_l2('{3,4}'::double precision[], '{0,0}')", "double precision"),
        ("distance_l2(ARRAY[3, 4], '{0,0}'::real[])", "real"),
        ("distance_l2('{3,4}'::double precision[], ARRAY[0, 0.0])", "double precision"),
        ("add('{3,4}'::real[], '{1,1}')", "real[]"),
        ("add('{3,4}'::real[], '{1,1}'::double precision[])", "double precision[]"),
        ("add('{3,4}'::real[], 1.5)", "real[]"),
        ("add('{3,4}'::real[], 1::double precision)", "double precision[]"),
        ("add('{3,4}'::double precision[], 1)", "double precision[]"),
        ("normalize_l2(cdc_embedder.add('{3,4}', '{0,0}'::real[]))", "real[]"),
        ("cosine_similarity('{1}'::varchar::real[], '{2}')", "real"),
    ],
)
def test_types_mix_and_one_typed_argument_is_enough(conn: Connection, call: str, kind: str) -> None:
    value, found = one(conn, f"SELECT v::text, pg_typeof(v)::text FROM cdc_embedder.{call} AS v")
    assert found == kind
    if call.startswith("distance"):
        assert value == "5"


@pytest.mark.parametrize("call", ["norm_l2('{1,2}')", "distance_l2('{1}', '{2}')", "normalize_l2(ARRAY[1.0])"])
def test_arguments_of_which_none_has_a_type_of_vectors_are_ambiguous_as_in_postgresml(
    conn: Connection, call: str
) -> None:
    with pytest.raises(psycopg.errors.AmbiguousFunction):
        conn.execute(f"SELECT cdc_embedder.{call}")  # type: ignore[arg-type]


@pytest.mark.parametrize("element", ["real", "double precision"])
@pytest.mark.parametrize("name", ["distance_l1", *BINARY, "divide"])
def test_what_are_no_two_vectors_of_one_length_is_refused(conn: Connection, element: str, name: str) -> None:
    for a, b, state in (
        ("{1,2}", "{1}", "2202E"),
        ("{1}", "{1,2}", "2202E"),
        ("{}", "{1}", "2202E"),
        ("{1,NULL}", "{1,2}", "22004"),
        ("{1,2}", "{NULL,2}", "22004"),
        ("{{1,2}}", "{{1,2}}", "2202E"),
    ):
        with pytest.raises(psycopg.Error) as refused:
            conn.execute(f"SELECT cdc_embedder.{name}('{a}'::{element}[], '{b}'::{element}[])")  # type: ignore[arg-type]
        assert refused.value.sqlstate == state, (a, b)
    assert one(conn, f"SELECT cdc_embedder.{name}(NULL::{element}[], '{{1}}')") is None


@pytest.mark.parametrize("element", ["real", "double precision"])
def test_a_null_element_a_second_dimension_and_another_length_are_refused_everywhere(
    conn: Connection, element: str
) -> None:
    for name in (*UNARY, *AGGREGATES):
        for vector, state in (("{1,NULL}", "22004"), ("{{1},{2}}", "2202E")):
            with pytest.raises(psycopg.Error) as refused:
                conn.execute(f"SELECT cdc_embedder.{name}('{vector}'::{element}[])")  # type: ignore[arg-type]
            assert refused.value.sqlstate == state, (name, vector)
    for name in AGGREGATES:
        with pytest.raises(psycopg.errors.ArraySubscriptError, match="one vector has 1 elements, the other 2"):
            conn.execute(f"SELECT cdc_embedder.{name}(v::{element}[]) FROM (VALUES ('{{1}}'), ('{{1,2}}')) AS t(v)")  # type: ignore[arg-type]
    for name in ("add", "divide"):
        with pytest.raises(psycopg.errors.NullValueNotAllowed):
            conn.execute(f"SELECT cdc_embedder.{name}('{{1,NULL}}'::{element}[], 1)")  # type: ignore[arg-type]


@pytest.mark.parametrize("element", ["real", "double precision"])
def test_the_vector_of_zeros_has_no_direction_and_the_empty_one_is_zero(conn: Connection, element: str) -> None:
    for name in ("normalize_l1", "normalize_l2", "normalize_max"):
        got = one(conn, f"SELECT cdc_embedder.{name}('{{0,0}}'::{element}[])::text")
        assert got == "{NaN,NaN}"
        assert one(conn, f"SELECT cdc_embedder.{name}('{{}}'::{element}[])") == []
    assert np.isnan(one(conn, f"SELECT cdc_embedder.cosine_similarity('{{0,0}}'::{element}[], '{{1,2}}')"))
    assert np.isnan(one(conn, f"SELECT cdc_embedder.cosine_similarity('{{}}'::{element}[], '{{}}')"))
    for name in ("norm_l0", "norm_l1", "norm_l2", "norm_max"):
        assert one(conn, f"SELECT cdc_embedder.{name}('{{}}'::{element}[])") == 0
    for name in ("distance_l1", "distance_l2", "dot_product"):
        assert one(conn, f"SELECT cdc_embedder.{name}('{{}}'::{element}[], '{{}}')") == 0
    with pytest.raises(psycopg.errors.DivisionByZero):
        conn.execute(f"SELECT cdc_embedder.divide('{{1}}'::{element}[], 0)")  # type: ignore[arg-type]


def test_what_is_smaller_than_any_real_becomes_zero_and_what_is_larger_is_refused(conn: Connection) -> None:
    assert one(conn, "SELECT cdc_embedder.normalize_l2('{1e30,1e-30}'::real[])") == [1.0, 0.0]
    assert one(conn, "SELECT cdc_embedder.normalize_max('{1e-45,1e-45}'::real[])") == [1.0, 1.0]
    assert one(conn, "SELECT cdc_embedder.dot_product('{1e-30}'::real[], '{1e-30}')") == 0
    assert one(conn, "SELECT cdc_embedder.norm_l2('{3e37,4e37}'::real[])") == pytest.approx(5e37)
    for call in ("norm_l1('{3e38,3e38}'::real[])", "norm_l2('{1e200}'::double precision[])"):
        with pytest.raises(psycopg.errors.NumericValueOutOfRange):
            conn.execute(f"SELECT cdc_embedder.{call}")  # type: ignore[arg-type]


def test_sums_are_taken_in_double_precision(conn: Connection) -> None:
    ones = "array_fill(1::real, ARRAY[1000]) || 16777216::real"
    assert one(conn, f"SELECT cdc_embedder.norm_l1({ones})") == 16777216 + 1000
    statement = (
        "SELECT cdc_embedder.sum(v) FROM (SELECT '{16777216}'::real[]"
        " UNION ALL SELECT '{1}'::real[] FROM generate_series(1, 1000)) AS t(v)"
    )
    assert one(conn, statement) == [16777216 + 1000]


def test_the_catalog_says_what_the_planner_may_do(conn: Connection) -> None:
    names = [*BINARY, *UNARY, "divide"]
    rows = conn.execute(
        "SELECT proname::text, provolatile, proisstrict, proparallel, count(*) FROM pg_proc"
        " WHERE pronamespace = 'cdc_embedder'::regnamespace AND proname = ANY (%s) GROUP BY 1, 2, 3, 4",
        (names,),
    ).fetchall()
    assert sorted(row[0] for row in rows) == sorted(names)
    assert {row[1:4] for row in rows} == {("i", True, "s")}
    assert {row[4] for row in rows} == {2, 4}


def test_execute_on_one_function_is_enough(bench: Bench) -> None:
    role = f"reader_{bench.database}"
    bench.admin.execute(
        f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA cdc_embedder TO {role};"  # type: ignore[arg-type]
        f"GRANT EXECUTE ON FUNCTION cdc_embedder.distance_l2(real[], real[]), cdc_embedder.sum(real[]) TO {role}"
    )
    try:
        with bench.admin.transaction(force_rollback=True):
            bench.admin.execute(f"SET LOCAL ROLE {role}")  # type: ignore[arg-type]
            assert one(bench.admin, "SELECT cdc_embedder.distance_l2('{3,4}'::real[], '{0,0}')") == 5
            assert one(bench.admin, "SELECT cdc_embedder.sum('{3,4}'::real[])") == [3, 4]
            with pytest.raises(psycopg.errors.ArraySubscriptError), bench.admin.transaction():
                bench.admin.execute("SELECT cdc_embedder.distance_l2('{3,4}'::real[], '{0}')")
            with pytest.raises(psycopg.errors.InsufficientPrivilege), bench.admin.transaction():
                bench.admin.execute("SELECT cdc_embedder.norm_l2('{3,4}'::real[])")
    finally:
        bench.admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")  # type: ignore[arg-type]
