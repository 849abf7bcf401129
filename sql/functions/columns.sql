-- What follows from a row of embedding_column: its ledger, its generations, its scans, and word to the service.
-- All of it runs as the schema's owner.

-- Make the ledger and the backlog of a column, anew where the key's types or collations are others than it has.
-- True: it is new and empty; where there was another one, a scan is requested with it, since keys may have been in the
-- backlog. No key any more (the table is gone): nothing is done.
CREATE OR REPLACE FUNCTION cdc_embedder._make_ledger(column_id int, anew boolean DEFAULT false) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    ledger text := format('cdc_embedder.ledger_%s', column_id);
    backlog text := format('cdc_embedder.backlog_%s', column_id);
    key record;
    columns text;
    names text;
    found_types text[];
    found_collations oid[];
BEGIN
    SELECT k.* INTO key
      FROM cdc_embedder.embedding_column c, cdc_embedder._primary_key(c.source_table) k
     WHERE c.id = column_id;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    SELECT array_agg(format_type(atttypid, atttypmod) ORDER BY attnum), array_agg(attcollation ORDER BY attnum)
      INTO found_types, found_collations
      FROM pg_attribute
     WHERE attrelid = to_regclass(ledger) AND attnum > 0 AND NOT attisdropped AND attname ~ '^key_[0-9]+$';
    IF found_types = key.types AND found_collations = key.collations AND NOT anew THEN
        RETURN false;
    END IF;
    PERFORM cdc_embedder._drop_ledger(column_id);
    IF found_types IS NOT NULL THEN
        PERFORM cdc_embedder._request_scan(column_id, 'another key', true);
    END IF;
    SELECT string_agg(format('key_%s %s', k.position, k.type)
                      || coalesce(' COLLATE ' || quote_ident(n.nspname) || '.' || quote_ident(l.collname), ''), ', ' ORDER BY k.position)
      INTO columns
      FROM unnest(key.types, key.collations) WITH ORDINALITY AS k(type, collation_oid, position)
      LEFT JOIN pg_collation l ON l.oid = k.collation_oid
      LEFT JOIN pg_namespace n ON n.oid = l.collnamespace;
    names := (SELECT string_agg('key_' || n, ', ' ORDER BY n) FROM generate_series(1, cardinality(key.types)) AS n);
    EXECUTE format($table$
        CREATE TABLE %1$s (
            %2$s,
            fingerprint bytea NOT NULL,
            generation int NOT NULL,
            vector_digest bigint,
            state text NOT NULL CHECK (state IN ('current', 'truncated', 'failed')),
            attempts int NOT NULL DEFAULT 0,
            error text,
            retry_at timestamptz,
            embedded_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (%3$s)
        ) WITH (fillfactor = 80)
        $table$, ledger, columns, names);
    EXECUTE format('CREATE INDEX ON %s (retry_at) WHERE state = ''failed''', ledger);
    EXECUTE format($table$
        CREATE TABLE %1$s (
            %2$s,
            first_lsn pg_lsn NOT NULL,
            last_lsn pg_lsn NOT NULL,
            xid xid8,
            seq bigint NOT NULL,
            committed_at timestamptz,
            PRIMARY KEY (%3$s)
        )
        $table$, backlog, columns, names);
    EXECUTE format('CREATE INDEX ON %s (seq)', backlog);
    EXECUTE format('CREATE INDEX ON %s (first_lsn)', backlog);
    EXECUTE format('CREATE SEQUENCE %s_seq OWNED BY %s.seq', backlog, backlog);
    RETURN true;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'the ledger of column % cannot be made: %', column_id, SQLERRM
        USING ERRCODE = 'insufficient_privilege',
              HINT = format('The service''s role %I needs USAGE on the types of the key and on their schema.', current_user);
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._drop_ledger(column_id int) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    of_column regclass;
BEGIN
    FOREACH of_column IN ARRAY ARRAY[to_regclass(format('cdc_embedder.ledger_%s', column_id)),
                                     to_regclass(format('cdc_embedder.backlog_%s', column_id))] LOOP
        IF of_column IS NOT NULL THEN
            EXECUTE format('DROP TABLE %s', of_column);
        END IF;
    END LOOP;
END
$$;

-- Every setting that decides the vector. Not what decides only how the model is reached: a key that is renewed or a
-- server that has moved must not embed a million rows again.
CREATE OR REPLACE FUNCTION cdc_embedder._settings(c cdc_embedder.embedding_column) RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object(
               'model', m.name, 'source', coalesce(m.source, m.name), 'revision', m.revision, 'backend', m.backend,
               'dimensions', m.dimensions, 'max_tokens', m.max_tokens, 'document_prompt', m.document_prompt,
               'normalize', m.normalize, 'dtype', m.dtype,
               'options', m.options - '{base_url,api_key_env,max_requests,max_batch_rows,timeout_s,batch_tokens,address,actors,num_cpus,num_gpus,'
                            'delay_s,delay_per_text_s,down,exit}'::text[],
               'source_columns', c.source_columns, 'separator', c.separator,
               'template', cdc_embedder._template_parts(c.template, c.source_columns))
      FROM cdc_embedder.model m WHERE m.name = c.model
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._request_scan(column_id int, reason text, from_the_start boolean DEFAULT false)
RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    INSERT INTO cdc_embedder.scan AS s (column_id, requested_at, reason)
    VALUES ($1, clock_timestamp(), $2)
    ON CONFLICT (column_id) DO UPDATE
       SET requested_at = excluded.requested_at, reason = excluded.reason,
           counted = s.counted AND NOT $3, unfinished = NULL
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._protect() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NEW.id <> OLD.id THEN
        RAISE EXCEPTION 'the id of an embedding column cannot change'
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'DELETE the row and INSERT it anew.';
    END IF;
    NEW.source_schema := OLD.source_schema;
    NEW.source_name := OLD.source_name;
    NEW.system_identifier := OLD.system_identifier;
    NEW.database_oid := OLD.database_oid;
    NEW.key_columns := OLD.key_columns;
    NEW.key_attnums := OLD.key_attnums;
    NEW.key_types := OLD.key_types;
    NEW.source_attnums := OLD.source_attnums;
    NEW.target_attnum := OLD.target_attnum;
    NEW.generation := OLD.generation;
    NEW.publication_statement := OLD.publication_statement;
    NEW.created_at := OLD.created_at;
    RETURN NEW;
END
$$;

-- Rule 4 rests on this: the only writer of generation.superseded_at. A renamed source column is no new setting.
CREATE OR REPLACE FUNCTION cdc_embedder._renew_generation() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    settings jsonb := cdc_embedder._settings(NEW);
    was jsonb := (SELECT g.settings FROM cdc_embedder.generation g
                   WHERE g.column_id = NEW.id AND g.superseded_at IS NULL);
BEGIN
    IF settings - 'source_columns' = was - 'source_columns'
       AND (NEW.source_columns = OLD.source_columns OR NEW.source_attnums = OLD.source_attnums) THEN
        RETURN NEW;
    END IF;
    UPDATE cdc_embedder.generation g SET superseded_at = now()
     WHERE g.column_id = NEW.id AND g.superseded_at IS NULL;
    NEW.generation := OLD.generation + 1;
    INSERT INTO cdc_embedder.generation (column_id, generation, settings)
    VALUES (NEW.id, NEW.generation, settings);
    RETURN NEW;
END
$$;

-- The vectors that were there when the column was configured are the model's own, says the user: the first scan takes
-- over those of all rows that nobody has written since (scan.adoptable_before).
CREATE OR REPLACE FUNCTION cdc_embedder._adopt(column_id int) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM cdc_embedder.scan s WHERE s.column_id = $1 AND s.finished_at IS NOT NULL) THEN
        RAISE EXCEPTION 'on_existing = ''adopt'': the first scan of the column is over'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Vectors are adopted by the first scan alone: remove the column, which leaves them in place, and configure it anew.';
    END IF;
    UPDATE cdc_embedder.generation g SET adopting = true WHERE g.column_id = $1 AND g.superseded_at IS NULL;
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._after_insert() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO cdc_embedder.generation (column_id, generation, settings)
    VALUES (NEW.id, NEW.generation, cdc_embedder._settings(NEW));
    PERFORM cdc_embedder._make_ledger(NEW.id, true);
    PERFORM cdc_embedder._request_scan(NEW.id, 'first scan');
    IF NEW.on_existing = 'adopt' THEN
        PERFORM cdc_embedder._adopt(NEW.id);
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._after_update() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    same_database boolean := (NEW.database_oid, NEW.system_identifier) = (OLD.database_oid, OLD.system_identifier);
    remade boolean := cdc_embedder._make_ledger(
        NEW.id, NEW.key_columns <> OLD.key_columns AND NEW.key_attnums <> OLD.key_attnums);
BEGIN
    IF NEW.slot <> OLD.slot THEN
        PERFORM cdc_embedder._request_scan(NEW.id, 'another slot', true);
    ELSIF NEW.source_table <> OLD.source_table OR NOT same_database THEN
        PERFORM cdc_embedder._request_scan(NEW.id, 'another table', true);
    ELSIF remade THEN
        PERFORM cdc_embedder._request_scan(NEW.id, 'another key', true);
    ELSIF NEW.generation <> OLD.generation OR NEW.target_attnum <> OLD.target_attnum
          OR NEW.source_attnums <> OLD.source_attnums THEN
        PERFORM cdc_embedder._request_scan(NEW.id, 'settings changed');
    ELSIF NEW.enabled AND NOT OLD.enabled THEN
        PERFORM cdc_embedder._request_scan(NEW.id, 'resumed');
    END IF;
    IF NEW.on_existing = 'adopt' AND OLD.on_existing <> 'adopt' THEN
        PERFORM cdc_embedder._adopt(NEW.id);
    ELSIF NEW.on_existing <> 'adopt' THEN
        UPDATE cdc_embedder.generation g SET adopting = false WHERE g.column_id = NEW.id AND g.adopting;
    END IF;
    IF NEW.source_table <> OLD.source_table OR NOT same_database THEN
        UPDATE cdc_embedder.generation g SET adopting = false WHERE g.column_id = NEW.id AND g.adopting;
        UPDATE cdc_embedder.scan s SET adoptable_before = DEFAULT WHERE s.column_id = NEW.id;
    END IF;
    RETURN NULL;
END
$$;

-- Before the row goes, and so before its generation: the service locks ledger and generation in this order too.
CREATE OR REPLACE FUNCTION cdc_embedder._before_delete() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM cdc_embedder._drop_ledger(OLD.id);
    RETURN OLD;
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._refuse_truncate() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'TRUNCATE of cdc_embedder.embedding_column is refused: ledgers and publication would stay behind'
        USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'DELETE FROM cdc_embedder.embedding_column.';
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._check_model() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    bound record;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.dimensions <> OLD.dimensions THEN
        SELECT c.source_table::text AS shown, a.attname, format_type(a.atttypid, a.atttypmod) AS type INTO bound
          FROM cdc_embedder.embedding_column c
          JOIN pg_attribute a ON a.attrelid = c.source_table AND a.attnum = c.target_attnum
          CROSS JOIN LATERAL cdc_embedder._vector_type(a.atttypid, a.atttypmod) v
         WHERE c.model = OLD.name AND v.dimensions <> NEW.dimensions
         LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'the model % serves the column % of %, which is %', OLD.name, bound.attname, bound.shown, bound.type
                USING ERRCODE = 'datatype_mismatch',
                      HINT = 'Make a model row of another name, and a target column of its dimensions.';
        END IF;
    END IF;
    RETURN NEW;
END
$$;

-- A model's settings are settings of its columns: touching the rows lets _renew_generation compare.
CREATE OR REPLACE FUNCTION cdc_embedder._after_model_update() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE cdc_embedder.embedding_column c SET generation = c.generation WHERE c.model = NEW.name;
    RETURN NULL;
END
$$;

-- The service listens: its payload is the table that changed.
CREATE OR REPLACE FUNCTION cdc_embedder._notify() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_notify('cdc_embedder', TG_TABLE_NAME);
    RETURN NULL;
END
$$;
