-- The names of PostgresML over the functions of cdc_embedder, so that its users' queries run unchanged. Optional:
-- `cdc-embedder init --pgml`, or `psql -v pgml=true -f schema.sql`. A later `init` keeps the schema up to date.
-- For a role to use it: GRANT USAGE ON SCHEMA pgml, and GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgml; no more.

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'pgml') THEN
        RAISE EXCEPTION 'the extension pgml is installed in this database'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'First `cdc-embedder migrate pgml --apply`, then DROP EXTENSION pgml and DROP SCHEMA pgml, then `cdc-embedder init --pgml`.';
    ELSIF pg_catalog.to_regnamespace('pgml') IS NULL THEN
        CREATE SCHEMA pgml;
    ELSIF pg_catalog.starts_with(pg_catalog.obj_description(pg_catalog.to_regnamespace('pgml'), 'pg_namespace'), 'cdc-embedder') IS NOT TRUE THEN
        RAISE EXCEPTION 'there is a schema pgml already, and it is none of cdc-embedder''s'
            USING ERRCODE = 'duplicate_schema',
                  HINT = 'DROP EXTENSION pgml leaves it behind, empty: then DROP SCHEMA pgml; and `cdc-embedder init --pgml` again.';
    END IF;
END
$$;

COMMENT ON SCHEMA pgml IS 'cdc-embedder: the names of PostgresML';

-- What both forms of pgml.embed do. kwargs are those of encode() of sentence-transformers, of which three make sense here;
-- as there, JSON null is "not given" and a prompt wins over the name of one.
CREATE OR REPLACE FUNCTION pgml._embed(transformer text, inputs text[], kwargs jsonb) RETURNS SETOF real[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    given jsonb := jsonb_strip_nulls(kwargs);
    unknown text;
BEGIN
    IF jsonb_typeof(given) <> 'object' THEN
        RAISE EXCEPTION 'the kwargs of pgml.embed are a JSON object, not %', jsonb_typeof(given)
            USING ERRCODE = 'invalid_parameter_value', HINT = 'For example ''{"prompt": "query: "}''.';
    END IF;
    unknown := (SELECT min(k) FROM jsonb_object_keys(given) AS k
                 WHERE k NOT IN ('prompt', 'prompt_name', 'normalize_embeddings'));
    IF unknown IS NOT NULL THEN
        RAISE EXCEPTION 'pgml.embed does not take "%" in kwargs', unknown
            USING ERRCODE = 'feature_not_supported',
                  HINT = CASE unknown
                             WHEN 'device' THEN 'The service chooses the device (CDC_EMBEDDER_DEVICE): leave it out.'
                             WHEN 'batch_size' THEN 'The service makes its own batches: leave it out.'
                             WHEN 'instruction' THEN 'Give it as "prompt".'
                             ELSE 'It takes "prompt", "prompt_name" and "normalize_embeddings".'
                         END;
    ELSIF jsonb_typeof(given -> 'prompt') <> 'string' OR jsonb_typeof(given -> 'prompt_name') <> 'string'
          OR jsonb_typeof(given -> 'normalize_embeddings') <> 'boolean' THEN
        RAISE EXCEPTION 'the kwargs % of pgml.embed are not of the right types', given
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = '"prompt" and "prompt_name" are strings, "normalize_embeddings" is true or false.';
    ELSIF given ->> 'prompt_name' NOT IN ('query', 'passage', 'document') THEN
        RAISE EXCEPTION 'a model has no prompt "%"', given ->> 'prompt_name'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'The names are "query", "passage" and "document" (the same as "passage"); "prompt" takes the prompt itself.';
    END IF;
    RETURN QUERY
        SELECT e FROM cdc_embedder._embed(
            transformer, inputs,
            CASE given ->> 'prompt_name' WHEN 'query' THEN 'query' WHEN 'passage' THEN 'document'
                                         WHEN 'document' THEN 'document' ELSE 'none' END,
            given ->> 'prompt', (given -> 'normalize_embeddings')::boolean) AS e;
END
$$;

-- IMMUTABLE as PostgresML declares it: ORDER BY embedding <-> pgml.embed(...) calls it when planned, and a generated column
-- may use it. Not PARALLEL SAFE: a worker cannot send the request.
CREATE OR REPLACE FUNCTION pgml.embed(transformer text, "text" text, kwargs jsonb DEFAULT '{}') RETURNS real[]
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT e FROM pgml._embed(transformer, ARRAY["text"], kwargs) AS e);
END
$$;

CREATE OR REPLACE FUNCTION pgml.embed(transformer text, inputs text[], kwargs jsonb DEFAULT '{}') RETURNS SETOF real[]
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY SELECT e FROM pgml._embed(transformer, inputs, kwargs) AS e;
END
$$;

-- The vector functions with the same bodies, which need nothing else; the aggregates with the same steps.
DO $make$
DECLARE
    f record;
BEGIN
    FOR f IN
        SELECT pg_catalog.pg_get_functiondef(p.oid) AS definition
          FROM pg_catalog.pg_proc p
         WHERE p.pronamespace = 'cdc_embedder'::pg_catalog.regnamespace AND p.prokind = 'f'
           AND p.proname = ANY ('{norm_l0,norm_l1,norm_l2,norm_max,normalize_l1,normalize_l2,normalize_max,'
                                'distance_l1,distance_l2,dot_product,cosine_similarity,add,subtract,multiply,divide}')
    LOOP
        EXECUTE pg_catalog.replace(f.definition, 'FUNCTION cdc_embedder.', 'FUNCTION pgml.');
    END LOOP;
    FOR f IN
        SELECT p.proname, pg_catalog.pg_get_function_arguments(p.oid) AS arguments, n.proname AS next, l.proname AS final,
               pg_catalog.format_type(a.aggtranstype, NULL) AS state
          FROM pg_catalog.pg_proc p
          JOIN pg_catalog.pg_aggregate a ON a.aggfnoid = p.oid
          JOIN pg_catalog.pg_proc n ON n.oid = a.aggtransfn
          LEFT JOIN pg_catalog.pg_proc l ON l.oid = a.aggfinalfn
         WHERE p.pronamespace = 'cdc_embedder'::pg_catalog.regnamespace
           AND p.proname = ANY ('{sum,max,min,max_abs,min_abs}')
    LOOP
        EXECUTE pg_catalog.format(
            'CREATE OR REPLACE AGGREGATE pgml.%I(%s)'
            ' (SFUNC = cdc_embedder.%I, STYPE = %s, COMBINEFUNC = cdc_embedder.%3$I%5$s, PARALLEL = SAFE)',
            f.proname, f.arguments, f.next, f.state,
            CASE WHEN f.final IS NOT NULL THEN pg_catalog.format(', FINALFUNC = cdc_embedder.%I', f.final) END);
    END LOOP;
END
$make$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA pgml FROM PUBLIC;
