-- The tables of cdc_embedder: what to embed, with which model, and what the service has done about it.
-- Applied once, inside a transaction of the caller's (see schema.sql and cdc_embedder/install.py); no function, no
-- trigger and no view is here: those are re-applied as a whole by every `init`.
-- Every logged table has a primary key: a FOR ALL TABLES publication of the user's would include it (rule 11).

DO $$
BEGIN
    IF pg_catalog.to_regnamespace('cdc_embedder') IS NULL THEN
        CREATE SCHEMA cdc_embedder;
    END IF;
END
$$;

COMMENT ON SCHEMA cdc_embedder IS 'cdc-embedder: which columns hold the embeddings of which text, and how far they are';

CREATE TABLE cdc_embedder.migration (
    version int PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE cdc_embedder.model (
    name text PRIMARY KEY,
    source text,
    revision text,
    backend text NOT NULL DEFAULT 'local' CHECK (backend IN ('local', 'openai', 'ray', 'fake')),
    dimensions int NOT NULL CHECK (dimensions > 0),
    max_tokens int CHECK (max_tokens > 0),
    document_prompt text,
    query_prompt text,
    normalize boolean NOT NULL DEFAULT true,
    dtype text NOT NULL DEFAULT 'auto' CHECK (dtype IN ('auto', 'float32', 'bfloat16', 'float16')),
    trust_remote_code boolean NOT NULL DEFAULT false,
    options jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(options) = 'object')
);

COMMENT ON TABLE cdc_embedder.model IS 'one row a model; NULL means: as the model''s own files say';
COMMENT ON COLUMN cdc_embedder.model.source IS 'hub id or folder (backend openai: the model id that is sent); NULL: the name';

CREATE TABLE cdc_embedder.embedding_column (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source_table regclass NOT NULL,
    source_columns text[] NOT NULL,
    separator text NOT NULL DEFAULT E'\n\n',
    template text,
    target_column name NOT NULL,
    model text NOT NULL REFERENCES cdc_embedder.model ON UPDATE CASCADE,
    when_stale text NOT NULL DEFAULT 'keep' CHECK (when_stale IN ('keep', 'clear')),
    priority int NOT NULL DEFAULT 0,
    slot name NOT NULL DEFAULT 'cdc_embedder',
    enabled boolean NOT NULL DEFAULT true,
    on_existing text NOT NULL DEFAULT 'ask' CHECK (on_existing IN ('ask', 'replace', 'adopt')),
    keys_only boolean NOT NULL DEFAULT false,
    protect boolean NOT NULL DEFAULT false,
    source_schema name,
    source_name name,
    system_identifier bigint,
    database_oid oid,
    key_columns name[],
    key_attnums int2[],
    key_types text[],
    source_attnums int2[],
    target_attnum int2,
    generation int NOT NULL DEFAULT 1,
    publication_statement text,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT embedding_column_target UNIQUE (source_table, target_column)
);

COMMENT ON TABLE cdc_embedder.embedding_column IS 'one row a column that fills itself with embeddings: INSERT, UPDATE and DELETE are the interface';
COMMENT ON COLUMN cdc_embedder.embedding_column.keys_only IS 'publish the key columns alone (PostgreSQL 15 and up, pgoutput): cheaper to decode; with another replica identity than DEFAULT the application''s updates would fail';
COMMENT ON COLUMN cdc_embedder.embedding_column.source_schema IS 'from here on filled by triggers, whatever the statement says';
COMMENT ON COLUMN cdc_embedder.embedding_column.publication_statement IS 'what somebody with the right must run before the slot hears of the table; until then scans feed it';

CREATE TABLE cdc_embedder.generation (
    column_id int NOT NULL REFERENCES cdc_embedder.embedding_column ON DELETE CASCADE,
    generation int NOT NULL,
    settings jsonb NOT NULL,
    weights text,
    adopting boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    superseded_at timestamptz,
    PRIMARY KEY (column_id, generation)
);

CREATE UNIQUE INDEX generation_current ON cdc_embedder.generation (column_id) WHERE superseded_at IS NULL;

COMMENT ON TABLE cdc_embedder.generation IS 'every setting that decides a vector, numbered; the current one has superseded_at NULL and is locked FOR SHARE by each write-back';
COMMENT ON COLUMN cdc_embedder.generation.adopting IS 'on_existing = adopt: vectors that are there count as this generation''s; false again after the first scan';
COMMENT ON COLUMN cdc_embedder.generation.weights IS 'hub commit or SHA-256 of what the service loaded, set at the first load';

CREATE TABLE cdc_embedder.scan (
    column_id int PRIMARY KEY REFERENCES cdc_embedder.embedding_column ON DELETE CASCADE,
    requested_at timestamptz,
    reason text,
    started_at timestamptz,
    finished_at timestamptz,
    counted boolean NOT NULL DEFAULT false,
    rows bigint,
    "null" bigint,
    current bigint,
    failed bigint,
    truncated bigint,
    unfinished jsonb,
    storage bigint,
    adoptable_before xid8 DEFAULT pg_snapshot_xmin(pg_current_snapshot())
);

COMMENT ON TABLE cdc_embedder.scan IS 'a scan is wanted when requested_at is later than finished_at; counted: the first scan that covers all rows is done (rule 10)';
COMMENT ON COLUMN cdc_embedder.scan.unfinished IS 'where a pass that was broken off goes on: every row before its position was judged';
COMMENT ON COLUMN cdc_embedder.scan.adoptable_before IS 'only older transactions had all ended when the column was configured: the vector of a row that a later one wrote may be that of the text it had before, and is not adopted';
COMMENT ON COLUMN cdc_embedder.scan.storage IS 'hash of the files and partitions that the rows were in when last looked at; another one means rows that no event told of';

CREATE UNLOGGED TABLE cdc_embedder.column_state (
    column_id int PRIMARY KEY REFERENCES cdc_embedder.embedding_column ON DELETE CASCADE,
    state text,
    reason text,
    rows bigint,
    "null" bigint,
    current bigint,
    failed bigint,
    truncated bigint,
    pending bigint,
    backlog bigint,
    oldest_pending_s double precision,
    rows_per_s double precision,
    circuit_breaker text,
    engine text,
    last_error text,
    updated_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_embedder.column_state IS 'what the running service says of each column, at most once a second; empty after a crash of the server';

CREATE TABLE cdc_embedder.progress (
    system_identifier bigint NOT NULL,
    timeline int NOT NULL,
    database_oid oid NOT NULL,
    slot name NOT NULL,
    received pg_lsn,
    embedded_through pg_lsn,
    confirmed pg_lsn,
    updated_at timestamptz NOT NULL DEFAULT now(),
    service text,
    PRIMARY KEY (system_identifier, timeline, database_oid, slot)
);

COMMENT ON TABLE cdc_embedder.progress IS 'how far each slot is; rows of another cluster, as in a restored dump, do not count';

CREATE UNLOGGED TABLE cdc_embedder.leader (
    slot name PRIMARY KEY,
    term bigint NOT NULL,
    service text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
);

COMMENT ON TABLE cdc_embedder.leader IS 'who serves a slot; each one that takes over has a term of its own, and a write-back of an older term changes nothing (rule 9)';

CREATE UNLOGGED TABLE cdc_embedder.in_flight (
    slot name NOT NULL,
    service text NOT NULL,
    number int NOT NULL,
    column_id int NOT NULL,
    keys text NOT NULL,
    PRIMARY KEY (slot, service, number)
);

-- JSON that nobody reads before a crash: neither parsed nor compressed for every batch.
ALTER TABLE cdc_embedder.in_flight ALTER COLUMN keys SET STORAGE EXTERNAL;

COMMENT ON TABLE cdc_embedder.in_flight IS 'the keys that are with the model at this moment: what is found here after a crash is suspected of it (rule 7)';

CREATE UNLOGGED TABLE cdc_embedder.suspect (
    column_id int NOT NULL REFERENCES cdc_embedder.embedding_column ON DELETE CASCADE,
    key jsonb NOT NULL,
    fingerprint bytea NOT NULL,
    guilty boolean NOT NULL,
    PRIMARY KEY (column_id, key)
);

COMMENT ON TABLE cdc_embedder.suspect IS 'keys that were with the model when the process died: they are tried alone; guilty: it died again then (rule 7)';

CREATE TABLE cdc_embedder.sql_embed (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    enabled boolean NOT NULL DEFAULT false,
    max_texts int NOT NULL DEFAULT 10000 CHECK (max_texts > 0),
    max_bytes int NOT NULL DEFAULT 8388608 CHECK (max_bytes > 0),
    max_texts_per_s int NOT NULL DEFAULT 5000 CHECK (max_texts_per_s > 0),
    secret bytea NOT NULL
);

COMMENT ON TABLE cdc_embedder.sql_embed IS 'one row: whether SQL may ask for embeddings (the texts then enter the WAL), how much a request may hold, and how many texts a second all of them';
COMMENT ON COLUMN cdc_embedder.sql_embed.secret IS 'signs requests: a logical message that somebody made without EXECUTE on embed is passed over';

INSERT INTO cdc_embedder.sql_embed (secret)
VALUES (sha256(convert_to(gen_random_uuid()::text || gen_random_uuid()::text, 'UTF8')));

CREATE UNLOGGED TABLE cdc_embedder.answer (
    id uuid PRIMARY KEY,
    vectors real[],
    dimensions int,
    sqlstate text,
    message text,
    hint text,
    made_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Read once, within milliseconds: compressing it would take longer.
ALTER TABLE cdc_embedder.answer ALTER COLUMN vectors SET STORAGE EXTERNAL;

COMMENT ON TABLE cdc_embedder.answer IS 'answers to embed(): read by the session that asked, under an id that nobody else knows, and swept';

INSERT INTO cdc_embedder.migration (version, name) VALUES (1, 'tables');
