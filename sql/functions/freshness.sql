-- What a user can rely on about the age of vectors: triggers on the source table where they were asked for, waiting for
-- what was committed, and telling rows whose vector is their text's.

-- The target's name as it stands, for the functions that triggers call: followed by number, but by name in a restored
-- dump, where the numbers may be others.
CREATE OR REPLACE FUNCTION cdc_embedder._target_name(column_id int) RETURNS name
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT a.attname
      FROM cdc_embedder.embedding_column c
      JOIN pg_attribute a ON a.attrelid = c.source_table AND NOT a.attisdropped
                         AND CASE WHEN c.database_oid = (SELECT oid FROM pg_database WHERE datname = current_database())
                                  THEN a.attnum = c.target_attnum ELSE a.attname = c.target_column END
     WHERE c.id = $1
$$;

-- The configured column that a user names: by the name that it has now, or by the one that it was configured with, which
-- embedding_column shows until its row is changed. Nothing but NULLs where there is none.
CREATE OR REPLACE FUNCTION cdc_embedder._configured_column(source_table oid, target_column name)
RETURNS cdc_embedder.embedding_column
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT c
      FROM cdc_embedder.embedding_column c, LATERAL (SELECT cdc_embedder._target_name(c.id) AS name) present
     WHERE c.source_table = $1 AND $2 IN (present.name, c.target_column)
     ORDER BY (present.name = $2) IS TRUE DESC
     LIMIT 1
$$;

-- The sign by which the second half of an UPDATE that moves a row between partitions, an INSERT as far as triggers can
-- see, is known from an application's INSERT: the same vector, in the same statement of the same session. Nobody else can
-- make one, since the secret is in it; it passes once. Such an UPDATE moves a vector and writes none.
CREATE OR REPLACE FUNCTION cdc_embedder._moving(column_id int, moved anyelement) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    secret bytea := (SELECT e.secret FROM cdc_embedder.sql_embed e);
    target name := cdc_embedder._target_name(column_id);
    vector text;
BEGIN
    IF target IS NULL THEN
        RETURN NULL;
    END IF;
    EXECUTE format('SELECT ($1).%I::text', target) INTO vector USING moved;
    RETURN encode(sha256(secret || sha256(secret || convert_to(concat_ws(' ',
        column_id, pg_backend_pid(), extract(epoch FROM statement_timestamp()), pg_trigger_depth(), vector), 'UTF8'))), 'hex');
END
$$;

-- The functions behind the triggers of one column, made anew; without them, since they go with the function, the
-- triggers. Only the table's owner may make the triggers, and is let use the functions.
CREATE OR REPLACE FUNCTION cdc_embedder._make_guards() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '1s'
AS $$
DECLARE
    id int := CASE WHEN TG_OP = 'DELETE' THEN OLD.id ELSE NEW.id END;
    owner name;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        -- Twice: a wait of deadlock_timeout is what makes an autovacuum of the table give way.
        FOR attempt IN 1..2 LOOP
            BEGIN
                EXECUTE format('DROP FUNCTION IF EXISTS cdc_embedder._clear_%1$s(), cdc_embedder._refuse_%1$s() CASCADE', id);
                EXIT;
            EXCEPTION WHEN lock_not_available THEN
                CONTINUE WHEN attempt = 1;
                RAISE EXCEPTION '% is locked: its triggers were not changed', OLD.source_table
                    USING ERRCODE = 'lock_not_available',
                          HINT = 'Waiting longer would hold up every other statement on the table: try again when it is quieter.';
            END;
        END LOOP;
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN NULL;
    END IF;
    owner := (SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = NEW.source_table);
    IF NEW.when_stale = 'clear' THEN
        EXECUTE format($make$
            CREATE FUNCTION cdc_embedder._clear_%1$s() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = pg_catalog, pg_temp
            AS $body$
            DECLARE
                target name := cdc_embedder._target_name(%1$s);
            BEGIN
                IF target IS NOT NULL THEN
                    NEW := jsonb_populate_record(NEW, jsonb_build_object(target, NULL));
                END IF;
                RETURN NEW;
            END
            $body$
            $make$, id);
        EXECUTE format('REVOKE EXECUTE ON FUNCTION cdc_embedder._clear_%1$s() FROM PUBLIC; GRANT EXECUTE ON FUNCTION cdc_embedder._clear_%1$s() TO %2$I', id, owner);
    END IF;
    IF NEW.protect THEN
        EXECUTE format($make$
            CREATE FUNCTION cdc_embedder._refuse_%1$s() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = pg_catalog, pg_temp
            AS $body$
            BEGIN
                IF TG_NARGS > 0 THEN
                    PERFORM set_config('cdc_embedder.moving_%1$s', cdc_embedder._moving(%1$s, NEW), true);
                    RETURN NEW;
                END IF;
                IF TG_OP = 'INSERT' AND current_setting('cdc_embedder.moving_%1$s', true) = cdc_embedder._moving(%1$s, NEW) THEN
                    PERFORM set_config('cdc_embedder.moving_%1$s', '', true);
                    RETURN NEW;
                END IF;
                IF current_setting('cdc_embedder.writer', true) = 'on' AND pg_has_role(session_user, current_user, 'MEMBER') THEN
                    RETURN NEW;
                END IF;
                RAISE EXCEPTION 'the column %% of %% is filled by cdc-embedder and cannot be written', quote_ident(cdc_embedder._target_name(%1$s)), TG_RELID::regclass
                    USING ERRCODE = 'generated_always',
                          HINT = 'Write the text. UPDATE cdc_embedder.embedding_column SET protect = false lifts this.';
            END
            $body$
            $make$, id);
        EXECUTE format('REVOKE EXECUTE ON FUNCTION cdc_embedder._refuse_%1$s() FROM PUBLIC; GRANT EXECUTE ON FUNCTION cdc_embedder._refuse_%1$s() TO %2$I', id, owner);
    END IF;
    RETURN NULL;
END
$$;

-- The triggers, with the caller's rights. Their names come after nearly every other, so that they see the row as the
-- user's own triggers leave it. Conditions are kept by column number, and so follow renames; and they spare an UPDATE of
-- anything else the call.
CREATE OR REPLACE FUNCTION cdc_embedder._set_guards() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '1s'
AS $$
DECLARE
    trigger name;
    changed text;
    moved text;
    written text;
    statements text := '';
BEGIN
    IF NEW.protect THEN
        trigger := format('~~cdc_embedder_%s_a_protect', NEW.id);
        SELECT format('(OLD.%1$I IS NULL) <> (NEW.%1$I IS NULL) OR OLD.%1$I OPERATOR(%2$I.<>) NEW.%1$I', a.attname,
                      CASE WHEN t.typelem <> 0 AND t.typlen = -1 AND t.typname ~ '^_' THEN 'pg_catalog' ELSE n.nspname END)
          INTO changed
          FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace n ON n.oid = t.typnamespace
         WHERE a.attrelid = NEW.source_table AND a.attnum = NEW.target_attnum;
        statements := format('CREATE TRIGGER %1$I BEFORE UPDATE ON %2$s FOR EACH ROW WHEN (%3$s) EXECUTE FUNCTION cdc_embedder._refuse_%4$s();'
                             'CREATE TRIGGER %5$I BEFORE INSERT ON %2$s FOR EACH ROW WHEN (NEW.%6$I IS NOT NULL) EXECUTE FUNCTION cdc_embedder._refuse_%4$s();',
                             trigger, NEW.source_table, changed, NEW.id, trigger || '_insert', NEW.target_column);
    END IF;
    IF NEW.protect AND EXISTS (SELECT FROM pg_class t WHERE t.oid = NEW.source_table AND t.relkind = 'p') THEN
        -- Only a change of the key can move a row: a primary key has every column that any level is partitioned by. After
        -- the trigger that clears: what it leaves NULL needs no leave.
        SELECT string_agg(format('OLD.%1$I::text COLLATE pg_catalog."C" IS DISTINCT FROM NEW.%1$I::text COLLATE pg_catalog."C"', k.name), ' OR ')
          INTO moved FROM cdc_embedder._primary_key(NEW.source_table) p, unnest(p.columns) AS k(name);
        statements := statements || format(
            'CREATE TRIGGER %1$I BEFORE UPDATE ON %2$s FOR EACH ROW WHEN (NEW.%3$I IS NOT NULL AND (%4$s)) EXECUTE FUNCTION cdc_embedder._refuse_%5$s(''move'');',
            format('~~cdc_embedder_%s_c_move', NEW.id), NEW.source_table, NEW.target_column, moved, NEW.id);
    END IF;
    IF NEW.when_stale = 'clear' THEN
        trigger := format('~~cdc_embedder_%s_b_clear', NEW.id);
        -- Byte by byte, as the fingerprint is: a nondeterministic collation calls 'HELLO' and 'hello' equal.
        SELECT string_agg(format('OLD.%1$I::text COLLATE pg_catalog."C" IS DISTINCT FROM NEW.%1$I::text COLLATE pg_catalog."C"', s.name), ' OR ')
          INTO written FROM unnest(NEW.source_columns) AS s(name);
        statements := statements || format(
            'CREATE TRIGGER %1$I BEFORE UPDATE ON %2$s FOR EACH ROW WHEN (%3$s) EXECUTE FUNCTION cdc_embedder._clear_%4$s();'
            'ALTER TABLE %2$s ENABLE ALWAYS TRIGGER %1$I', trigger, NEW.source_table, written, NEW.id);
    END IF;
    IF statements = '' THEN
        RETURN NULL;
    END IF;
    FOR attempt IN 1..2 LOOP
        BEGIN
            EXECUTE statements;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            CONTINUE WHEN attempt = 1;
            RAISE EXCEPTION '% is locked: its triggers were not made', NEW.source_table
                USING ERRCODE = 'lock_not_available',
                      HINT = 'Waiting longer would hold up every other statement on the table: try again when it is quieter.';
        END;
    END LOOP;
    RETURN NULL;
EXCEPTION
    WHEN insufficient_privilege THEN
        RAISE EXCEPTION 'when_stale = ''clear'' and protect put triggers on %: %', NEW.source_table, SQLERRM
            USING ERRCODE = 'insufficient_privilege',
                  HINT = format('Only the table''s owner, %I, or a superuser can ask for them; the owner needs USAGE on the schema cdc_embedder.',
                                (SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = NEW.source_table));
END
$$;

-- How far one column is: where the slot was confirmed, or where the oldest spilled commit begins. In this order: what is
-- spilled is in the backlog before the slot is confirmed.
CREATE OR REPLACE FUNCTION cdc_embedder._embedded_through(column_id int, slot name) RETURNS pg_lsn
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    confirmed pg_lsn := (SELECT s.confirmed FROM cdc_embedder._slot(slot) s);
BEGIN
    RETURN CASE WHEN confirmed IS NOT NULL THEN least(confirmed, cdc_embedder._spilled_from(column_id)) END;
END
$$;

-- Every change of the table that was committed before this position is embedded, failed, or of a row without text; NULL
-- while no slot is there.
CREATE OR REPLACE FUNCTION cdc_embedder.embedded_through(source_table regclass) RETURNS pg_lsn
LANGUAGE plpgsql VOLATILE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    through pg_lsn[];
BEGIN
    SELECT array_agg(cdc_embedder._embedded_through(c.id, c.slot)) INTO through
      FROM cdc_embedder.embedding_column c WHERE c.source_table = $1;
    IF through IS NULL THEN
        PERFORM cdc_embedder._not_configured($1);
    END IF;
    RETURN (SELECT min(t) FROM unnest(through) AS t HAVING bool_and(t IS NOT NULL));
END
$$;

-- Refuse to wait for what would not come, or for what its coming would not prove.
CREATE OR REPLACE FUNCTION cdc_embedder._check_wait(source_table regclass, ignore_failed boolean) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    c cdc_embedder.embedding_column;
    s cdc_embedder.scan;
    begun timestamptz;
    said record;
    failures boolean;
BEGIN
    FOR c IN SELECT * FROM cdc_embedder.embedding_column e WHERE e.source_table = $1 ORDER BY e.id LOOP
        s := (SELECT x FROM cdc_embedder.scan x WHERE x.column_id = c.id);
        SELECT * INTO said FROM cdc_embedder._state(c, (SELECT x FROM cdc_embedder.column_state x WHERE x.column_id = c.id));
        begun := (SELECT g.created_at FROM cdc_embedder.generation g WHERE g.column_id = c.id AND g.superseded_at IS NULL);
        IF said.state = 'stopped' THEN
            RAISE EXCEPTION '%.% will not be embedded: %', c.source_table, quote_ident(c.target_column), said.reason
                USING ERRCODE = 'cannot_connect_now', HINT = 'Start it: cdc-embedder run.';
        ELSIF said.state IN ('paused', 'error') THEN
            RAISE EXCEPTION '%.% is not served: %', c.source_table, quote_ident(c.target_column), coalesce(said.reason, said.state)
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'SELECT state, reason FROM cdc_embedder.status tells when it is live again.';
        ELSIF (SELECT t.relpersistence FROM pg_class t WHERE t.oid = c.source_table) = 'u' THEN
            RAISE EXCEPTION '%.% is fed by scans alone: the table is unlogged', c.source_table, quote_ident(c.target_column)
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = format('No position tells what is embedded: ask for a scan with cdc_embedder.reconcile(), or ALTER TABLE %s SET LOGGED.',
                                    c.source_table);
        -- Facts that are durable before a key is forgotten, whatever the service said last.
        ELSIF NOT coalesce(s.counted, false) OR coalesce(s.finished_at < begun, true) THEN
            RAISE EXCEPTION '%.% is being backfilled: what is embedded cannot be told from its position yet', c.source_table, quote_ident(c.target_column)
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'SELECT state, coverage, eta_s FROM cdc_embedder.status tells how far it is.';
        END IF;
        IF NOT ignore_failed THEN
            EXECUTE format('SELECT EXISTS (SELECT FROM cdc_embedder.ledger_%s WHERE state = ''failed'' AND generation = $1)', c.id)
               INTO failures USING c.generation;
            IF failures THEN
                RAISE EXCEPTION 'rows of %.% cannot be embedded', c.source_table, quote_ident(c.target_column)
                    USING ERRCODE = 'object_not_in_prerequisite_state',
                          HINT = 'SELECT key, error FROM cdc_embedder.failed; or pass ignore_failed => true.';
            END IF;
        END IF;
    END LOOP;
    IF NOT FOUND THEN
        PERFORM cdc_embedder._not_configured($1);
    END IF;
END
$$;

-- Returns when every change of the table that was committed before the call is embedded. Not STRICT: NULL would come
-- back at once, as if it were.
CREATE OR REPLACE FUNCTION cdc_embedder.wait_until_embedded(
    source_table regclass, timeout interval DEFAULT '30 s', ignore_failed boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    began timestamptz := clock_timestamp();
    flushed boolean := false;  -- whether we hold the locks by which the service knows of us
    noted boolean := false;
    here pg_lsn;
    through pg_lsn;
BEGIN
    IF source_table IS NULL OR timeout IS NULL OR ignore_failed IS NULL THEN
        RAISE EXCEPTION '% of wait_until_embedded is NULL',
                CASE WHEN source_table IS NULL THEN 'source_table' WHEN timeout IS NULL THEN 'timeout' ELSE 'ignore_failed' END
            USING ERRCODE = 'null_value_not_allowed',
                  HINT = CASE WHEN source_table IS NULL THEN 'to_regclass() gives NULL where there is no such table.'
                              WHEN timeout IS NULL THEN 'Leave it out for 30 seconds.'
                              ELSE 'Leave it out, or pass true or false.' END;
    END IF;
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'a standby cannot wait for vectors: nobody writes here'
            USING ERRCODE = 'read_only_sql_transaction', HINT = 'Ask the primary.';
    END IF;
    PERFORM cdc_embedder._check_isolation('the end of the wait');
    PERFORM cdc_embedder._check_wait($1, ignore_failed);
    BEGIN
        flushed := cdc_embedder._tell_of_waiting(1);
        noted := cdc_embedder._tell_of_waiting(2);
        -- It lies behind every commit that anybody could see, and flushing it flushes those.
        here := cdc_embedder._emit('cdc_embedder.wait', '');
        LOOP
            through := cdc_embedder.embedded_through($1);
            EXIT WHEN through >= here;
            IF clock_timestamp() >= began + timeout THEN
                RAISE EXCEPTION '% was not embedded within %', $1, timeout
                    USING ERRCODE = 'cannot_connect_now', DETAIL = format('Embedded through %s of %s.', through, here),
                          HINT = 'The service goes on all the same: wait again, or for longer.';
            END IF;
            PERFORM pg_sleep(0.01);
            flushed := flushed OR cdc_embedder._tell_of_waiting(1);
            noted := noted OR cdc_embedder._tell_of_waiting(2);
        END LOOP;
    EXCEPTION WHEN OTHERS OR query_canceled THEN
        PERFORM cdc_embedder._stop_telling(1, flushed), cdc_embedder._stop_telling(2, noted);
        RAISE;
    END;
    PERFORM cdc_embedder._stop_telling(1, flushed), cdc_embedder._stop_telling(2, noted);
    -- What came to be in doubt meanwhile is not proved by the position.
    PERFORM cdc_embedder._check_wait($1, ignore_failed);
END
$$;

-- The expression whose value is the row's fingerprint: the same as rows/expressions.py has it.
CREATE OR REPLACE FUNCTION cdc_embedder._fingerprint_expression(source_columns text[]) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format('sha256(%s)', string_agg(
               format('CASE WHEN ($1).%1$I IS NULL THEN ''\x00''::bytea ELSE ''\x01''::bytea || %2$s convert_to(($1).%1$I::text, getdatabaseencoding()) END',
                      s.name, CASE WHEN cardinality($1) > 1 THEN format('int4send(octet_length(($1).%I::text)) ||', s.name) ELSE '' END),
               ' || ' ORDER BY s.position))
      FROM unnest($1) WITH ORDINALITY AS s(name, position)
$$;

-- Whether the row holds its present text's vector, or NULL for no text. The caller gives the row, so nothing is read but
-- the ledger; it tells nobody anything about rows that he cannot see.
CREATE OR REPLACE FUNCTION cdc_embedder.is_current(source_row anyelement, target_column name) RETURNS boolean
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    relation oid := (SELECT t.typrelid FROM pg_type t WHERE t.oid = pg_typeof(source_row));
    c cdc_embedder.embedding_column := cdc_embedder._configured_column(relation, $2);
    names text[];
    same_key text;
    no_text text;
    result boolean;
BEGIN
    IF c.id IS NULL THEN
        RAISE EXCEPTION 'the column % of % is not configured', quote_ident(target_column), pg_typeof(source_row)
            USING ERRCODE = 'undefined_object', HINT = 'SELECT * FROM cdc_embedder.embedding_column shows what is.';
    END IF;
    -- A cast that somebody made for a type of his own must not run with the rights of the schema's owner.
    IF EXISTS (SELECT FROM pg_attribute a
                WHERE a.attrelid = c.source_table
                  AND (a.attnum = ANY (c.source_attnums) AND a.atttypid <> 'text'::regtype AND NOT cdc_embedder._is_text_like(a.atttypid)
                       OR a.attnum = c.target_attnum AND a.atttypid NOT IN ('float4[]'::regtype, 'float8[]'::regtype)
                          AND NOT EXISTS (SELECT FROM cdc_embedder._vector_type(a.atttypid, a.atttypmod)))) THEN
        RAISE EXCEPTION 'a column of % has another type than when it was configured', pg_typeof(source_row)
            USING ERRCODE = 'datatype_mismatch', HINT = 'SELECT state, reason FROM cdc_embedder.status says which.';
    END IF;
    SELECT array_agg(a.attname::text ORDER BY s.position), string_agg(format('($1).%I IS NULL', a.attname), ' AND ')
      INTO names, no_text
      FROM unnest(c.source_attnums) WITH ORDINALITY AS s(attnum, position)
      JOIN pg_attribute a ON a.attrelid = c.source_table AND a.attnum = s.attnum;
    SELECT string_agg(format('l.key_%s %s ($1).%I', k.position, k.operator, k.name), ' AND ' ORDER BY k.position)
      INTO same_key
      FROM cdc_embedder._primary_key(c.source_table) p,
           unnest(p.columns, p.operators) WITH ORDINALITY AS k(name, operator, position);
    EXECUTE format($check$
        SELECT CASE WHEN %1$s THEN ($1).%2$I IS NULL
                    ELSE EXISTS (SELECT FROM cdc_embedder.ledger_%3$s l
                                  WHERE %4$s AND l.state <> 'failed' AND l.generation = $2 AND l.fingerprint = %5$s
                                    AND l.vector_digest = hash_array_extended(($1).%2$I%6$s, 0)) END
        $check$, no_text, (SELECT attname FROM pg_attribute WHERE attrelid = c.source_table AND attnum = c.target_attnum),
        c.id, same_key, cdc_embedder._fingerprint_expression(names),
        (SELECT CASE WHEN t.typname IN ('vector', 'halfvec') THEN '::real[]' ELSE '' END
           FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
          WHERE a.attrelid = c.source_table AND a.attnum = c.target_attnum))
      INTO result USING source_row, c.generation;
    RETURN result;
END
$$;

-- The rows of a table whose vector is current: SELECT * FROM cdc_embedder.fresh(NULL::documents, 'embedding').
CREATE OR REPLACE FUNCTION cdc_embedder.fresh(source_row anyelement, target_column name) RETURNS SETOF anyelement
LANGUAGE plpgsql STABLE SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY EXECUTE format('SELECT t.* FROM %s t WHERE cdc_embedder.is_current(t, $1)', pg_typeof(source_row)::text)
        USING target_column;
END
$$;
