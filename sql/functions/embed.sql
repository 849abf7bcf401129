-- Embedding from SQL: the request travels as a logical message, which no transaction holds back, to the service's own
-- slot; the answer comes back through an unlogged table. See docs/sql.md.

-- Whoever waits for the service has to see what it commits meanwhile.
CREATE OR REPLACE FUNCTION cdc_embedder._check_isolation(what text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'under % % could never be seen', upper(current_setting('transaction_isolation')), what
            USING ERRCODE = 'invalid_transaction_state',
                  HINT = 'Call it in READ COMMITTED, or before the transaction.';
    END IF;
END
$$;

-- Emit a message and have it flushed, with everything before it: from PostgreSQL 17 on at once, before by the service,
-- which looks for the lock of those who wait. The lock is the session's: it is given back in any case.
CREATE OR REPLACE FUNCTION cdc_embedder._emit(prefix text, content bytea) RETURNS pg_lsn
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('server_version_num')::int >= 170000 THEN
        RETURN pg_logical_emit_message(false, prefix, content, true);
    END IF;
    RETURN pg_logical_emit_message(false, prefix, content);
END
$$;

-- Replaced by the two below.
DROP FUNCTION IF EXISTS cdc_embedder._begin_to_wait(), cdc_embedder._end_to_wait();

-- Let the service know that somebody waits: 1, for what he emitted to be flushed, needed before PostgreSQL 17; 2, for how far
-- a slot on a standby is to be noted. It looks for a lock, whoever holds it. Any role may take that lock for itself
-- alone: the service then looks after us as well, and nobody waits for it here. Returns whether it is held, or not needed.
CREATE OR REPLACE FUNCTION cdc_embedder._tell_of_waiting(what int) RETURNS boolean
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF what = 1 AND current_setting('server_version_num')::int >= 170000 THEN
        RETURN true;
    END IF;
    RETURN pg_try_advisory_lock_shared(1667523429, what);
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._stop_telling(what int, told boolean) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF told AND NOT (what = 1 AND current_setting('server_version_num')::int >= 170000) THEN
        PERFORM pg_advisory_unlock_shared(1667523429, what);
    END IF;
END
$$;

-- Where the service that answers is to be found, and the slot it reads; waits for one until the deadline.
CREATE OR REPLACE FUNCTION cdc_embedder._embed_slot(until timestamptz) RETURNS name
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    slot name;
    active boolean;
BEGIN
    LOOP
        SELECT s.slot_name, s.active INTO slot, active
          FROM pg_replication_slots s JOIN pg_publication p ON p.pubname = s.slot_name
         WHERE s.database = current_database() AND s.plugin = 'pgoutput' AND s.slot_name ~ '_embed$'
         ORDER BY s.active DESC, s.slot_name
         LIMIT 1;
        IF active THEN
            RETURN slot;
        ELSIF slot IS NULL AND NOT (SELECT e.enabled FROM cdc_embedder.sql_embed e) THEN
            RAISE EXCEPTION 'embedding from SQL is turned off'
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'UPDATE cdc_embedder.sql_embed SET enabled = true, or run the service with CDC_EMBEDDER_SQL_EMBED=on. The texts then enter the WAL.';
        ELSIF clock_timestamp() >= until THEN
            RAISE EXCEPTION 'no service answers: none reads a slot for embedding from SQL in this database'
                USING ERRCODE = 'cannot_connect_now', HINT = 'Start it: cdc-embedder run.';
        END IF;
        PERFORM pg_sleep(0.05);
    END LOOP;
END
$$;

-- The setting cdc_embedder.embed_timeout as an interval; a bare number is milliseconds, as of other timeouts. Bounded:
-- the moment until which an answer is wanted has to be one that the service can read.
CREATE OR REPLACE FUNCTION cdc_embedder._embed_timeout() RETURNS interval
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    setting text := coalesce(nullif(current_setting('cdc_embedder.embed_timeout', true), ''), '10s');
    timeout interval;
BEGIN
    BEGIN
        timeout := CASE WHEN setting ~ '^\s*\d+\s*$' THEN setting || ' ms' ELSE setting END::interval;
    EXCEPTION WHEN data_exception THEN
        RAISE EXCEPTION 'cdc_embedder.embed_timeout is no duration: %', setting
            USING ERRCODE = 'invalid_parameter_value', HINT = 'SET cdc_embedder.embed_timeout = ''5s''.';
    END;
    IF timeout <= interval '0' OR timeout > interval '1 day' THEN
        RAISE EXCEPTION 'cdc_embedder.embed_timeout is out of range: %', setting
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'More than nothing, and a day at most: SET cdc_embedder.embed_timeout = ''5s''.';
    END IF;
    RETURN timeout;
END
$$;

-- Refuse at once what could not be answered.
CREATE OR REPLACE FUNCTION cdc_embedder._check_embed(model text, texts text[]) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    limits cdc_embedder.sql_embed := (SELECT e FROM cdc_embedder.sql_embed e);
    bytes bigint;
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'a standby cannot ask for embeddings: the request would have to be written to the WAL'
            USING ERRCODE = 'read_only_sql_transaction', HINT = 'Ask the primary, or POST /v1/embeddings to the service.';
    END IF;
    PERFORM cdc_embedder._check_isolation('the answer');
    IF NOT EXISTS (SELECT FROM cdc_embedder.model m WHERE m.name = $1) THEN
        RAISE EXCEPTION 'there is no model "%"', $1
            USING ERRCODE = 'undefined_object',
                  HINT = format('Known: %s. Another is a row in cdc_embedder.model (name and dimensions are enough).',
                                (SELECT string_agg(m.name, ', ' ORDER BY m.name) FROM cdc_embedder.model m));
    END IF;
    IF array_ndims($2) > 1 THEN
        RAISE EXCEPTION 'the array of texts has % dimensions', array_ndims($2)
            USING ERRCODE = 'array_subscript_error',
                  HINT = 'One is meant: ARRAY(SELECT unnest(texts)) makes it of any other.';
    END IF;
    IF array_position($2, NULL) IS NOT NULL THEN
        RAISE EXCEPTION 'a text of the array is NULL'
            USING ERRCODE = 'null_value_not_allowed', HINT = 'array_remove(texts, NULL) leaves NULLs out.';
    END IF;
    SELECT sum(octet_length(t)) INTO bytes FROM unnest($2) AS t;
    IF bytes > limits.max_bytes OR cardinality($2) > limits.max_texts THEN
        RAISE EXCEPTION 'a request of % texts and % bytes is too large', cardinality($2), bytes
            USING ERRCODE = 'program_limit_exceeded',
                  HINT = format('At most %s texts and %s bytes: cdc_embedder.sql_embed has the limits.', limits.max_texts, limits.max_bytes);
    END IF;
END
$$;

-- The request as a message, signed: any role may emit one.
CREATE OR REPLACE FUNCTION cdc_embedder._emit_embed(request jsonb) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    payload bytea := convert_to(request::text, 'UTF8');
    secret bytea := (SELECT e.secret FROM cdc_embedder.sql_embed e);
BEGIN
    PERFORM cdc_embedder._emit('cdc_embedder.embed', sha256(secret || sha256(secret || payload)) || payload);
END
$$;

-- The vectors of `texts`, in order. `prompt` is put before each in place of the model's; `prompt_name` chooses one of
-- the model's; `normalized` NULL: as the model's row says. VOLATILE: each statement sees what was committed before it.
CREATE OR REPLACE FUNCTION cdc_embedder._embed(
    model text, texts text[], input_type text, prompt text DEFAULT NULL, normalized boolean DEFAULT NULL)
RETURNS SETOF real[]
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    began timestamptz := clock_timestamp();
    until timestamptz := began + cdc_embedder._embed_timeout();
    request uuid := gen_random_uuid();
    told boolean := false;  -- whether we hold the lock by which the service knows of us
    slot name;
    found_answer cdc_embedder.answer;
BEGIN
    IF cardinality(texts) = 0 THEN
        RETURN;
    END IF;
    PERFORM cdc_embedder._check_embed(model, texts);
    slot := cdc_embedder._embed_slot(until);
    BEGIN
        told := cdc_embedder._tell_of_waiting(1);
        -- With the model's row as it is seen here: word of its change may reach the service after this.
        PERFORM cdc_embedder._emit_embed(jsonb_build_object(
            'id', request, 'slot', slot, 'until', extract(epoch FROM until), 'model', model, 'texts', to_jsonb(texts),
            'input_type', input_type, 'prompt', prompt, 'normalize', normalized,
            'row', (SELECT to_jsonb(m) FROM cdc_embedder.model m WHERE m.name = $1)));
        LOOP
            SELECT * INTO found_answer FROM cdc_embedder.answer a WHERE a.id = request;
            EXIT WHEN FOUND;
            IF clock_timestamp() >= until THEN
                RAISE EXCEPTION 'no service answered within %', until - began
                    USING ERRCODE = 'cannot_connect_now',
                          HINT = 'The service may be loading the model, or be busy: SET cdc_embedder.embed_timeout = ''60s'' waits longer.';
            END IF;
            PERFORM pg_sleep(least(0.02, greatest(0.0005, extract(epoch FROM clock_timestamp() - began) / 20)));
            told := told OR cdc_embedder._tell_of_waiting(1);
        END LOOP;
    EXCEPTION WHEN OTHERS OR query_canceled THEN
        PERFORM cdc_embedder._stop_telling(1, told);
        RAISE;
    END;
    PERFORM cdc_embedder._stop_telling(1, told);
    IF found_answer.sqlstate IS NOT NULL THEN
        RAISE EXCEPTION '%', found_answer.message USING ERRCODE = found_answer.sqlstate, HINT = found_answer.hint;
    END IF;
    RETURN QUERY
        SELECT found_answer.vectors[n * found_answer.dimensions + 1 : (n + 1) * found_answer.dimensions]
          FROM generate_series(0, cardinality(texts) - 1) AS n;
END
$$;

-- The vector of a text without any prompt. STABLE, so that ORDER BY embedding <=> cdc_embedder.embed(...)::vector calls it
-- once and an index serves.
CREATE OR REPLACE FUNCTION cdc_embedder.embed(model text, "text" text) RETURNS real[]
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT e FROM cdc_embedder._embed(model, ARRAY["text"], 'none') AS e);
END
$$;

-- The vectors of many texts, in their order: one request.
CREATE OR REPLACE FUNCTION cdc_embedder.embed(model text, texts text[]) RETURNS SETOF real[]
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY SELECT e FROM cdc_embedder._embed(model, texts, 'none') AS e;
END
$$;

-- With the model's prompt for what is searched with ...
CREATE OR REPLACE FUNCTION cdc_embedder.embed_query(model text, "text" text) RETURNS real[]
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT e FROM cdc_embedder._embed(model, ARRAY["text"], 'query') AS e);
END
$$;

-- ... and for what is found: as the service embeds rows.
CREATE OR REPLACE FUNCTION cdc_embedder.embed_document(model text, "text" text) RETURNS real[]
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT e FROM cdc_embedder._embed(model, ARRAY["text"], 'document') AS e);
END
$$;
