-- What users call. Those that change embedding_column run as the caller, since the publication takes the caller's
-- right; the others only leave a request for the service and run as the schema's owner.

CREATE OR REPLACE FUNCTION cdc_embedder._not_configured(source_table regclass) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'no embedding column of % is configured', source_table
        USING ERRCODE = 'undefined_object', HINT = 'SELECT * FROM cdc_embedder.embedding_column shows what is.';
END
$$;

-- Configure a column, adding the target to the table where it is missing: vector(n) where the database has pgvector,
-- else real[]. Returns the id.
CREATE OR REPLACE FUNCTION cdc_embedder.add_embedding_column(
    source_table regclass, source_columns text[], target_column name, model text,
    when_stale text DEFAULT 'keep', separator text DEFAULT NULL, priority int DEFAULT 0, on_existing text DEFAULT 'ask',
    keys_only boolean DEFAULT false, template text DEFAULT NULL, protect boolean DEFAULT false)
RETURNS int
LANGUAGE plpgsql SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '1s'
AS $$
DECLARE
    of_model cdc_embedder.model := (SELECT m FROM cdc_embedder.model m WHERE m.name = $4);
    made int;
BEGIN
    IF of_model.name IS NOT NULL AND NOT EXISTS (
            SELECT FROM pg_attribute WHERE attrelid = $1 AND attname = $3 AND NOT attisdropped) THEN
        EXECUTE format('ALTER TABLE %s ADD COLUMN %I %s', $1, $3, cdc_embedder._target_type(of_model.dimensions));
    END IF;
    INSERT INTO cdc_embedder.embedding_column AS c
        (source_table, source_columns, target_column, model, when_stale, separator, priority, on_existing, keys_only, template,
         protect)
    VALUES ($1, $2, $3, $4, $5, coalesce($6, E'\n\n'), $7, $8, $9, $10, $11)
    RETURNING c.id INTO made;
    RETURN made;
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION '% is locked: the column % was not added', $1, quote_ident($3)
        USING ERRCODE = 'lock_not_available',
              HINT = 'Waiting longer would hold up every other statement on the table: try again when it is quieter.';
END
$$;

-- Stop serving a column, by the name that it has now or by the one that it was configured with. Its vectors stay.
CREATE OR REPLACE FUNCTION cdc_embedder.remove_embedding_column(source_table regclass, target_column name) RETURNS void
LANGUAGE plpgsql SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- In a restored dump the numbers may be others.
    DELETE FROM cdc_embedder.embedding_column c
     WHERE c.id = (SELECT e.id
                     FROM cdc_embedder.embedding_column e
                     LEFT JOIN pg_attribute a ON a.attrelid = e.source_table AND a.attnum = e.target_attnum AND NOT a.attisdropped
                           AND e.database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                    WHERE e.source_table = $1 AND $2 IN (a.attname, e.target_column)
                    ORDER BY (a.attname = $2) IS TRUE DESC
                    LIMIT 1);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the column % of % is not configured', quote_ident($2), $1
            USING ERRCODE = 'undefined_object', HINT = 'SELECT * FROM cdc_embedder.embedding_column shows what is.';
    END IF;
END
$$;

-- Returns the number of columns that stand still now.
CREATE OR REPLACE FUNCTION cdc_embedder.pause(source_table regclass) RETURNS int
LANGUAGE plpgsql SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    columns int;
BEGIN
    UPDATE cdc_embedder.embedding_column c SET enabled = false WHERE c.source_table = $1;
    GET DIAGNOSTICS columns = ROW_COUNT;
    IF columns = 0 THEN
        PERFORM cdc_embedder._not_configured($1);
    END IF;
    RETURN columns;
END
$$;

-- Go on, with the table as it stands: a column whose table was replaced by another of its name is bound to the new one.
CREATE OR REPLACE FUNCTION cdc_embedder.resume(source_table regclass) RETURNS int
LANGUAGE plpgsql SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    columns int;
BEGIN
    UPDATE cdc_embedder.embedding_column c SET source_table = $1, enabled = true
     WHERE c.source_table = $1
        OR (c.source_schema, c.source_name) = (
                SELECT n.nspname, t.relname FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace WHERE t.oid = $1);
    GET DIAGNOSTICS columns = ROW_COUNT;
    IF columns = 0 THEN
        PERFORM cdc_embedder._not_configured($1);
    END IF;
    RETURN columns;
END
$$;

-- Ask for a scan of one table's columns, or of all. Returns their number.
CREATE OR REPLACE FUNCTION cdc_embedder.reconcile(source_table regclass DEFAULT NULL) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    columns int;
BEGIN
    PERFORM cdc_embedder._request_scan(c.id, 'requested')
       FROM cdc_embedder.embedding_column c WHERE $1 IS NULL OR c.source_table = $1;
    GET DIAGNOSTICS columns = ROW_COUNT;
    IF columns = 0 AND $1 IS NOT NULL THEN
        PERFORM cdc_embedder._not_configured($1);
    END IF;
    RETURN columns;
END
$$;

-- A slot that was given up beyond the limit on WAL may be made again; NULL: every one. Returns whether there was one.
CREATE OR REPLACE FUNCTION cdc_embedder.take_slot_again(slot name DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    slots int;
BEGIN
    DELETE FROM cdc_embedder.given_up g WHERE $1 IS NULL OR g.slot = $1;
    GET DIAGNOSTICS slots = ROW_COUNT;
    PERFORM pg_notify('cdc_embedder', 'slot');
    RETURN slots > 0;
END
$$;

-- Let every failed row of a table be tried at once. Returns their number.
CREATE OR REPLACE FUNCTION cdc_embedder.retry_failed(source_table regclass) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    id int;
    columns int := 0;
    touched bigint;
    total bigint := 0;
BEGIN
    FOR id IN SELECT c.id FROM cdc_embedder.embedding_column c WHERE c.source_table = $1 LOOP
        EXECUTE format('UPDATE cdc_embedder.ledger_%s SET retry_at = clock_timestamp() WHERE state = ''failed''', id);
        GET DIAGNOSTICS touched = ROW_COUNT;
        total := total + touched;
        columns := columns + 1;
    END LOOP;
    IF columns = 0 THEN
        PERFORM cdc_embedder._not_configured($1);
    END IF;
    PERFORM pg_notify('cdc_embedder', 'retry');
    RETURN total;
END
$$;
