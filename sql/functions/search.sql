-- Search in one statement: the question embedded by the column's model, the rows read with the caller's rights.

-- What search() has to know of a column, and no more: the statement that finds the rows nearest to $1, the type $1 is
-- taken as where that is pgvector's, the model. Runs as the schema's owner, since callers need not see the configuration.
CREATE OR REPLACE FUNCTION cdc_embedder._search_column(
    source_table regclass, target_column name, OUT statement text, OUT vector_type text, OUT model text)
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    c cdc_embedder.embedding_column := cdc_embedder._configured_column($1, $2);
    target record;
    key text;
BEGIN
    IF c.id IS NULL THEN
        RAISE EXCEPTION 'the column % of % is not configured', quote_ident($2), $1
            USING ERRCODE = 'undefined_object', HINT = 'SELECT * FROM cdc_embedder.embedding_column shows what is.';
    END IF;
    SELECT a.attname AS name, y.typname AS type, n.nspname AS schema INTO target
      FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid JOIN pg_namespace n ON n.oid = y.typnamespace
     WHERE a.attrelid = $1 AND a.attnum = c.target_attnum;
    SELECT string_agg(format('%L, t.%I', a.attname, a.attname), ', ' ORDER BY k.position) INTO key
      FROM cdc_embedder._primary_key($1) p, unnest(p.attnums) WITH ORDINALITY AS k(attnum, position)
      JOIN pg_attribute a ON a.attrelid = $1 AND a.attnum = k.attnum;
    model := c.model;
    IF target.type IN ('vector', 'halfvec') THEN
        vector_type := format('%I.%I', target.schema, target.type);
        -- An index may give the rows almost in order. A vector of zeros has no direction: its distance is NaN.
        statement := format($statement$
            SELECT f.key, 1 - f.distance
              FROM (SELECT jsonb_build_object(%1$s) AS key, t.%2$I OPERATOR(%3$I.<=>) $1::%4$s AS distance
                      FROM %5$s t
                     WHERE t.%2$I IS NOT NULL
                     ORDER BY t.%2$I OPERATOR(%3$I.<=>) $1::%4$s
                     LIMIT $2) f
             WHERE f.distance <> 'NaN'
             ORDER BY f.distance
            $statement$, key, target.name, target.schema, vector_type, $1);
    ELSE
        -- Plain arithmetic: no right is needed but to read the table, and no row can fail the statement, whatever somebody
        -- wrote into it. OFFSET 0 has the score computed once a row, and only of rows that can be compared.
        statement := format($statement$
            SELECT f.key, f.score
              FROM (SELECT jsonb_build_object(%1$s) AS key,
                           (SELECT sum(u.a * u.b)
                                   / nullif(sqrt(sum(u.a * u.a)) * (SELECT sqrt(sum(q::float8 * q::float8)) FROM unnest($1) AS q), 0)
                              FROM (SELECT %2$s AS a, v.b
                                      FROM (SELECT unnest(t.%3$I)::float8 AS a, unnest($1)::float8 AS b) v) u) AS score
                      FROM %4$s t
                     WHERE CASE WHEN array_ndims(t.%3$I) = 1 AND cardinality(t.%3$I) = cardinality($1)
                                THEN array_position(t.%3$I, NULL) IS NULL END
                    OFFSET 0) f
             WHERE f.score <> 'NaN'
             ORDER BY f.score DESC
             LIMIT $2
            $statement$, key,
            -- The square of any real is in range.
            CASE target.type WHEN '_float8' THEN 'CASE WHEN abs(v.a) < 1e-100 THEN 0 WHEN abs(v.a) < 1e100 THEN v.a ELSE ''NaN'' END'
                             ELSE 'v.a' END,
            target.name, $1);
    END IF;
END
$$;

-- The k rows whose vectors are nearest to the question's, the nearest first; `score` is the cosine similarity. A row whose
-- vector has none (zeros, an element that is NULL or no number, another length) is passed over.
CREATE OR REPLACE FUNCTION cdc_embedder.search(
    source_table regclass, target_column name, question text, k int DEFAULT 10)
RETURNS TABLE (key jsonb, score double precision)
LANGUAGE plpgsql STABLE STRICT SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    c record;
    vector real[];
    s record;
    before jsonb := '{}';
BEGIN
    IF k < 1 THEN
        RAISE EXCEPTION '% rows cannot be searched for', k
            USING ERRCODE = 'invalid_parameter_value', HINT = 'k is 1 or more.';
    END IF;
    SELECT * INTO c FROM cdc_embedder._search_column(source_table, target_column);
    vector := cdc_embedder.embed_query(c.model, question);
    IF c.vector_type IS NOT NULL THEN
        -- pgvector's settings are there once its library is loaded: which, depends on its version. hnsw gives 40 rows
        -- otherwise, and ivfflat those of one list.
        EXECUTE format('SELECT $1::%s', c.vector_type) USING vector;
        FOR s IN SELECT p.name, p.setting,
                        CASE p.name WHEN 'hnsw.ef_search' THEN greatest(p.setting::int, least(k, 1000))::text
                                    WHEN 'hnsw.iterative_scan' THEN 'strict_order' ELSE 'relaxed_order' END AS wanted
                   FROM pg_settings p
                  WHERE p.name IN ('hnsw.ef_search', 'hnsw.iterative_scan', 'ivfflat.iterative_scan') LOOP
            before := before || jsonb_build_object(s.name, s.setting);
            PERFORM set_config(s.name, s.wanted, true);
        END LOOP;
    END IF;
    RETURN QUERY EXECUTE c.statement USING vector, k;
    PERFORM set_config(b.key, b.value, true) FROM jsonb_each_text(before) b;
END
$$;
