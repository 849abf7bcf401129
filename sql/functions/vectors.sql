-- Arithmetic on vectors for real[] and double precision[], with PostgresML's names, arguments and meaning; docs/sql.md
-- says where it differs. Each function is made in both types from one template, and needs no other of ours to run.
-- A call with both types takes double precision[]; sums are taken in double precision in either.

-- unnest() in the select list streams: 384 dimensions take half the time of unnest(a, b) in FROM, and two thirds of a loop's.
DO $make$
DECLARE
    -- Instead of a result: only a vector of one dimension without NULL, and two of equal length.
    check_one text := $check$
    IF array_ndims($1) > 1 THEN
        RAISE EXCEPTION 'a vector has one dimension, this array has %', array_ndims($1) USING ERRCODE = 'array_subscript_error';
    ELSIF array_position($1, NULL) IS NOT NULL THEN
        RAISE EXCEPTION 'element % of the vector is NULL', array_position($1, NULL) USING ERRCODE = 'null_value_not_allowed';
    END IF;$check$;
    check_two text := check_one || replace(check_one, '$1', '$2') || $check$
    IF cardinality($1) <> cardinality($2) THEN
        RAISE EXCEPTION 'one vector has % elements, the other %', cardinality($1), cardinality($2)
            USING ERRCODE = 'array_subscript_error', HINT = 'Both must come from one model.';
    END IF;$check$;
    element text;
    narrow text;
    f record;
BEGIN
    FOREACH element IN ARRAY '{real,double precision}'::text[] LOOP
        -- Nearer to zero than any real is zero, where the cast would say "out of range".
        narrow := CASE element WHEN 'real' THEN 'CASE WHEN abs(%1$s) < 1e-45 THEN 0 ELSE %1$s END' ELSE '%1$s' END;

        FOR f IN SELECT * FROM (VALUES
            ('norm_l0', 'count(*) FILTER (WHERE a <> 0)'),
            ('norm_l1', 'sum(abs(a))'),
            ('norm_l2', 'sqrt(sum(a * a))'),
            ('norm_max', 'max(abs(a))')) AS v(name, norm)
        LOOP
            EXECUTE format($function$
                CREATE OR REPLACE FUNCTION cdc_embedder.%I(vector %2$s[]) RETURNS %2$s
                LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
                SET search_path = pg_catalog, pg_temp
                AS %3$L
                $function$, f.name, element, format($body$
BEGIN%s
    RETURN coalesce((SELECT %s FROM (SELECT unnest($1)::double precision AS a) AS u), 0);
END
$body$, check_one, f.norm));

            -- The vector divided by its norm; NaN where that is zero.
            CONTINUE WHEN f.name = 'norm_l0';
            EXECUTE format($function$
                CREATE OR REPLACE FUNCTION cdc_embedder.%I(vector %2$s[]) RETURNS %2$s[]
                LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
                SET search_path = pg_catalog, pg_temp
                AS %3$L
                $function$, replace(f.name, 'norm_', 'normalize_'), element, format($body$
DECLARE
    norm double precision;
BEGIN%s
    norm := coalesce((SELECT %s FROM (SELECT unnest($1)::double precision AS a) AS u), 0);
    IF norm = 0 THEN
        RETURN array_fill('NaN'::%s, ARRAY[cardinality($1)]);
    END IF;
    RETURN ARRAY(SELECT %s FROM (SELECT unnest($1)::double precision / norm AS a) AS u);
END
$body$, check_one, f.norm, element, format(narrow, 'a')));
        END LOOP;

        FOR f IN SELECT * FROM (VALUES
            ('distance_l1', 'sum(abs(a - b))', '0'),
            ('distance_l2', 'sqrt(sum((a - b) * (a - b)))', '0'),
            ('dot_product', 'sum(a * b)', '0'),
            ('cosine_similarity', 'sum(a * b) / nullif(sqrt(sum(a * a)) * sqrt(sum(b * b)), 0)', 'NaN')) AS v(name, number, nothing)
        LOOP
            EXECUTE format($function$
                CREATE OR REPLACE FUNCTION cdc_embedder.%I(vector %2$s[], other %2$s[]) RETURNS %2$s
                LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
                SET search_path = pg_catalog, pg_temp
                AS %3$L
                $function$, f.name, element, format($body$
DECLARE
    number double precision;
BEGIN%s
    number := (SELECT %s FROM (SELECT unnest($1)::double precision AS a, unnest($2)::double precision AS b) AS u);
    RETURN coalesce(%s, %L);
END
$body$, check_two, f.number, format(narrow, 'number'), f.nothing));
        END LOOP;

        -- By the operators of the element's own type, with their errors.
        FOR f IN SELECT * FROM (VALUES
            ('add', '+', 'addend'), ('subtract', '-', 'subtrahend'), ('multiply', '*', 'multiplicand'),
            ('divide', '/', 'dividend')) AS v(name, operator, argument)
        LOOP
            EXECUTE format($function$
                CREATE OR REPLACE FUNCTION cdc_embedder.%I(vector %2$s[], %3$I %2$s[]) RETURNS %2$s[]
                LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
                SET search_path = pg_catalog, pg_temp
                AS %4$L
                $function$, f.name, element, f.argument, format($body$
BEGIN%s
    RETURN ARRAY(SELECT unnest($1) %s unnest($2));
END
$body$, check_two, f.operator));
            EXECUTE format($function$
                CREATE OR REPLACE FUNCTION cdc_embedder.%I(vector %2$s[], %3$I %2$s) RETURNS %2$s[]
                LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
                SET search_path = pg_catalog, pg_temp
                AS %4$L
                $function$, f.name, element, f.argument, format($body$
BEGIN%s
    RETURN ARRAY(SELECT unnest($1) %s $2);
END
$body$, check_one, f.operator));
        END LOOP;
    END LOOP;
END
$make$;

-- The state of sum(real[]) is in double precision, and this its result.
CREATE OR REPLACE FUNCTION cdc_embedder._sum_final(state double precision[]) RETURNS real[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT $1::real[]
$$;

-- Aggregates, element by element. NULL rows are left out; of none the result is NULL.
DO $make$
DECLARE
    element text;
    state text;
    f record;
BEGIN
    FOREACH element IN ARRAY '{double precision,real}'::text[] LOOP
        FOR f IN SELECT * FROM (VALUES
            ('sum', 'v', 's + v'), ('max', 'v', 'greatest(s, v)'), ('min', 'v', 'least(s, v)'),
            ('max_abs', 'abs(v)', 'greatest(s, abs(v))'), ('min_abs', 'abs(v)', 'least(s, abs(v))')) AS v(name, first, next)
        LOOP
            state := CASE f.name WHEN 'sum' THEN 'double precision' ELSE element END;
            EXECUTE format($function$
                CREATE OR REPLACE FUNCTION cdc_embedder.%I(state %s[], vector %s[]) RETURNS %2$s[]
                LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
                SET search_path = pg_catalog, pg_temp
                AS %4$L
                $function$, format('_%s_next', f.name), state, element, format($body$
BEGIN
    IF $2 IS NULL THEN
        RETURN $1;
    ELSIF array_ndims($2) > 1 THEN
        RAISE EXCEPTION 'a vector has one dimension, this array has %%', array_ndims($2) USING ERRCODE = 'array_subscript_error';
    ELSIF array_position($2, NULL) IS NOT NULL THEN
        RAISE EXCEPTION 'element %% of the vector is NULL', array_position($2, NULL) USING ERRCODE = 'null_value_not_allowed';
    ELSIF $1 IS NULL THEN
        RETURN ARRAY(SELECT %s FROM (SELECT unnest($2) AS v) AS u);
    ELSIF cardinality($1) <> cardinality($2) THEN
        RAISE EXCEPTION 'one vector has %% elements, the other %%', cardinality($1), cardinality($2)
            USING ERRCODE = 'array_subscript_error', HINT = 'All must come from one model.';
    END IF;
    RETURN ARRAY(SELECT %s FROM (SELECT unnest($1) AS s, unnest($2) AS v) AS u);
END
$body$, f.first, f.next));
            EXECUTE format($aggregate$
                CREATE OR REPLACE AGGREGATE cdc_embedder.%I(%s[])
                (SFUNC = cdc_embedder.%I, STYPE = %s[], COMBINEFUNC = cdc_embedder.%3$I%5$s, PARALLEL = SAFE)
                $aggregate$, f.name, element, format('_%s_next', f.name), state,
                CASE WHEN state <> element THEN ', FINALFUNC = cdc_embedder._sum_final' END);
        END LOOP;
    END LOOP;
END
$make$;
