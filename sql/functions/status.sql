-- How far each column is: counted where the table is small, else what the service says and the planner's estimate.
-- A table that cannot be read (dropped, locked, no right, row security) gives NULLs and the reason, never an error.

-- Rows of a table: the planner's number where that is large (no lock is wanted for it), else by the density at the last
-- ANALYZE and the size now; without one by 640 bytes a row, so that of a table never analyzed at most 64 MB are counted.
CREATE OR REPLACE FUNCTION cdc_embedder._estimated_rows(source_table oid) RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    leaves oid[] := ARRAY(SELECT relid FROM pg_partition_tree(source_table) WHERE isleaf) || source_table;
    planned bigint := (SELECT sum(greatest(c.reltuples, 0)) FROM pg_class c WHERE c.oid = ANY (leaves) AND c.relkind = 'r');
BEGIN
    IF planned >= 100000 THEN
        RETURN planned;
    END IF;
    RETURN (SELECT sum(CASE WHEN c.reltuples > 0 AND c.relpages > 0
                            THEN c.reltuples / c.relpages * (pg_relation_size(c.oid) / current_setting('block_size')::int)
                            ELSE pg_relation_size(c.oid) / 640.0 END)
              FROM pg_class c WHERE c.oid = ANY (leaves) AND c.relkind = 'r');
END
$$;

-- Count one column's rows beside its ledger, in one snapshot. A ledger row without its source row counts nothing.
CREATE OR REPLACE FUNCTION cdc_embedder._count(
    c cdc_embedder.embedding_column,
    OUT rows bigint, OUT "null" bigint, OUT current bigint, OUT failed bigint, OUT truncated bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    same_key text;
    no_text text;
BEGIN
    SELECT string_agg(format('l.key_%s %s t.%I', k.position, k.operator, k.name), ' AND ' ORDER BY k.position)
      INTO same_key
      FROM cdc_embedder._primary_key(c.source_table) p,
           unnest(p.columns, p.operators) WITH ORDINALITY AS k(name, operator, position);
    SELECT string_agg(format('t.%I IS NULL', a.attname), ' AND ') INTO no_text
      FROM pg_attribute a WHERE a.attrelid = c.source_table AND a.attnum = ANY (c.source_attnums);
    EXECUTE format($count$
        SELECT count(*),
               count(*) FILTER (WHERE %1$s),
               count(*) FILTER (WHERE l.state IN ('current', 'truncated') AND l.vector_digest IS NOT NULL AND NOT (%1$s)),
               count(*) FILTER (WHERE l.state = 'failed' AND NOT (%1$s)),
               count(*) FILTER (WHERE l.state = 'truncated' AND l.vector_digest IS NOT NULL AND NOT (%1$s))
          FROM %2$s t LEFT JOIN cdc_embedder.ledger_%3$s l ON l.generation = %4$s AND %5$s
        $count$, no_text, c.source_table, c.id, c.generation, same_key)
      INTO rows, "null", current, failed, truncated;
END
$$;

-- Whether the slot is read, and through where it is confirmed. A slot on a standby cannot be seen from here: a lock of its
-- service says that it is read, and the service's notes how far.
CREATE OR REPLACE FUNCTION cdc_embedder._slot(slot name, OUT active boolean, OUT confirmed pg_lsn)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT s.active, s.confirmed_flush_lsn INTO active, confirmed
      FROM pg_replication_slots s WHERE s.slot_name = slot AND s.database = current_database();
    IF FOUND OR pg_is_in_recovery() OR NOT EXISTS (SELECT FROM cdc_embedder.standby_slot s WHERE s.slot = $1) THEN
        RETURN;
    END IF;
    active := EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
                       WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                         AND (l.classid::int8 << 32 | l.objid::int8) = hashtextextended('cdc_embedder reads ' || slot, 0));
    confirmed := (SELECT p.confirmed FROM cdc_embedder.progress p
                   WHERE p.slot = $1 AND p.system_identifier = (SELECT c.system_identifier FROM pg_control_system() c)
                     AND p.timeline = ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int
                     AND p.database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()));
END
$$;

-- State and reason, without a look at any row.
CREATE OR REPLACE FUNCTION cdc_embedder._state(
    c cdc_embedder.embedding_column, said cdc_embedder.column_state, OUT state text, OUT reason text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    stored text := format('%I.%I', c.source_schema, c.source_name);
    named oid := (SELECT t.oid FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace
                   WHERE n.nspname = c.source_schema AND t.relname = c.source_name);
    present text := (SELECT format('%I.%I', n.nspname, t.relname)
                       FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace WHERE t.oid = c.source_table);
BEGIN
    IF NOT c.enabled THEN
        state := 'paused';
        reason := CASE WHEN said.state = 'paused' THEN coalesce(said.reason, 'paused') ELSE 'paused' END;
    ELSIF present IS NULL AND named IS NULL THEN
        state := 'error';
        reason := format('the table %s is gone: remove the column, or make the table and call cdc_embedder.resume(%L)', stored, stored);
    ELSIF present IS DISTINCT FROM stored AND named IS NOT NULL THEN
        state := 'error';
        reason := format('%s is another table than the one that was configured: cdc_embedder.resume(%L) takes the one of that name', stored, stored)
                  || coalesce(format(', cdc_embedder.resume(%L) keeps the old one', present), '');
    ELSIF EXISTS (SELECT FROM cdc_embedder.given_up g WHERE g.slot = c.slot) THEN
        state := 'stopped';
        reason := (SELECT format('the slot %s was given up at %s, when it held back %s of WAL: SELECT cdc_embedder.take_slot_again() has it made anew',
                                 g.slot, g.at::timestamptz(0), pg_size_pretty(g.retained_bytes))
                     FROM cdc_embedder.given_up g WHERE g.slot = c.slot);
    ELSIF NOT coalesce((SELECT s.active FROM cdc_embedder._slot(c.slot) s), false) THEN
        state := 'stopped';
        reason := format('no service runs for slot %s', c.slot);
    ELSIF EXISTS (SELECT FROM pg_replication_slots s
                   WHERE s.slot_name = c.slot AND s.database = current_database() AND s.confirmed_flush_lsn IS NULL) THEN
        -- active as well: by the session that makes it
        state := 'stopped';
        reason := format('the slot %s is being made: that waits for the transactions that were open before it', c.slot);
    ELSE
        state := coalesce(said.state, 'backfilling');
        reason := coalesce(said.reason, CASE
            WHEN c.publication_statement IS NOT NULL AND NOT EXISTS (
                    SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                     WHERE p.pubname = c.slot AND r.prrelid = c.source_table)
                THEN format('fed by scans alone until somebody runs: %s', c.publication_statement)
            WHEN (SELECT t.relpersistence FROM pg_class t WHERE t.oid = c.source_table) = 'u'
                THEN 'fed by scans alone: the table is unlogged' END);
    END IF;
END
$$;

-- Where the oldest commit begins whose keys are in the backlog of a column; NULL where it is empty. An index's first entry.
CREATE OR REPLACE FUNCTION cdc_embedder._spilled_from(column_id int) RETURNS pg_lsn
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    backlog regclass := to_regclass(format('cdc_embedder.backlog_%s', column_id));
    first_lsn pg_lsn;
BEGIN
    IF backlog IS NOT NULL THEN
        EXECUTE format('SELECT min(b.first_lsn) FROM %s b', backlog) INTO first_lsn;
    END IF;
    RETURN first_lsn;
EXCEPTION WHEN undefined_table THEN
    RETURN NULL;  -- the column was removed while this waited for its lock
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._status()
RETURNS TABLE (
    id int, source_table text, target_column name, model text, slot name, state text, reason text,
    rows bigint, rows_estimated boolean, "null" bigint, current bigint, pending bigint, failed bigint, truncated bigint,
    coverage numeric, oldest_pending_s double precision, lag_bytes bigint, embedded_through pg_lsn,
    rows_per_s double precision, eta_s double precision, last_error text, backlog bigint, circuit_breaker text, engine text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET row_security = off
SET lock_timeout = '1s'
AS $$
DECLARE
    c cdc_embedder.embedding_column;
    said cdc_embedder.column_state;
    scanned cdc_embedder.scan;
    uncounted text;
    spilled pg_lsn;
    present pg_lsn := CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END;
BEGIN
    FOR c IN SELECT * FROM cdc_embedder.embedding_column ORDER BY embedding_column.id LOOP
        said := (SELECT s FROM cdc_embedder.column_state s WHERE s.column_id = c.id);
        scanned := (SELECT s FROM cdc_embedder.scan s WHERE s.column_id = c.id);
        SELECT s.state, s.reason INTO state, reason FROM cdc_embedder._state(c, said) s;
        rows := coalesce(said.rows, scanned.rows);
        "null" := coalesce(said."null", scanned."null");
        current := coalesce(said.current, scanned.current);
        failed := coalesce(said.failed, scanned.failed);
        truncated := coalesce(said.truncated, scanned.truncated);
        pending := said.pending;
        uncounted := NULL;
        BEGIN
            rows_estimated := cdc_embedder._estimated_rows(c.source_table) >= 100000;
            IF rows_estimated THEN
                rows := coalesce(rows, cdc_embedder._estimated_rows(c.source_table));
            ELSE
                SELECT n.rows, n."null", n.current, n.failed, n.truncated
                  INTO rows, "null", current, failed, truncated FROM cdc_embedder._count(c) n;
                pending := greatest(CASE WHEN state <> 'stopped' THEN pending END, rows - "null" - current - failed);
            END IF;
        EXCEPTION WHEN OTHERS THEN
            SELECT NULL, NULL, NULL, NULL, NULL, NULL INTO rows, "null", current, failed, truncated, rows_estimated;
            uncounted := format('the rows cannot be counted: %s', SQLERRM);
        END;
        id := c.id;
        source_table := coalesce((SELECT format('%I.%I', n.nspname, t.relname) FROM pg_class t
                                    JOIN pg_namespace n ON n.oid = t.relnamespace WHERE t.oid = c.source_table),
                                 format('%I.%I', c.source_schema, c.source_name));
        target_column := c.target_column;
        model := c.model;
        slot := c.slot;
        reason := coalesce(reason, uncounted);
        current := least(current, rows - "null");
        coverage := CASE WHEN rows = "null" THEN 100 ELSE trunc(100.0 * current / nullif(greatest(rows - "null", 0), 0), 2) END;
        SELECT NULL, NULL, NULL, NULL INTO oldest_pending_s, rows_per_s, eta_s, circuit_breaker;
        IF state <> 'stopped' THEN  -- how fast a service was that is gone tells nobody anything
            oldest_pending_s := said.oldest_pending_s;
            rows_per_s := said.rows_per_s;
            eta_s := CASE WHEN rows - "null" - current - failed <= 0 THEN 0
                          ELSE (rows - "null" - current - failed) / nullif(said.rows_per_s, 0) END;
            circuit_breaker := said.circuit_breaker;
        END IF;
        last_error := said.last_error;
        backlog := said.backlog;
        engine := said.engine;
        spilled := cdc_embedder._spilled_from(c.id);
        SELECT CASE WHEN s.confirmed IS NOT NULL THEN greatest(pg_wal_lsn_diff(present, s.confirmed), 0)::bigint END,
               CASE WHEN s.confirmed IS NOT NULL THEN least(s.confirmed, spilled) END
          INTO lag_bytes, embedded_through
          FROM cdc_embedder._slot(c.slot) s;
        RETURN NEXT;
    END LOOP;
END
$$;

-- The key by the names of its columns. Values of types that are not PostgreSQL's own are shown as text: a cast to json
-- that somebody made must not run with the rights of the schema's owner.
CREATE OR REPLACE FUNCTION cdc_embedder._failed()
RETURNS TABLE (column_id int, source_table text, target_column name, key jsonb, error text, attempts int, retry_at timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    c cdc_embedder.embedding_column;
    keys text;
BEGIN
    FOR c IN SELECT * FROM cdc_embedder.embedding_column e ORDER BY e.id LOOP
        CONTINUE WHEN to_regclass(format('cdc_embedder.ledger_%s', c.id)) IS NULL;
        SELECT string_agg(format(CASE WHEN cdc_embedder._base_type(a.atttypid) < 16384
                                      THEN '%L, l.%I' ELSE '%L, format(''%%s'', l.%I)' END,
                                 coalesce(c.key_columns[a.attnum], a.attname), a.attname), ', ' ORDER BY a.attnum)
          INTO keys
          FROM pg_attribute a
         WHERE a.attrelid = to_regclass(format('cdc_embedder.ledger_%s', c.id)) AND a.attnum > 0
           AND a.attname ~ '^key_[0-9]+$';
        RETURN QUERY EXECUTE format($rows$
            SELECT $1, $2, $3, jsonb_build_object(%s), l.error, l.attempts, l.retry_at
              FROM cdc_embedder.ledger_%s l WHERE l.state = 'failed' AND l.generation = $4
            $rows$, keys, c.id)
            USING c.id, format('%I.%I', c.source_schema, c.source_name), c.target_column, c.generation;
    END LOOP;
END
$$;
