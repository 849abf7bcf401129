-- What a row of embedding_column must be before it is accepted: every refusal says what to do about it.
-- Nothing here changes anything; it runs as the schema's owner, so that a caller needs no right on our other tables.

CREATE OR REPLACE FUNCTION cdc_embedder._check_table(source_table oid, column_id int) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    t record;
    relative text;
BEGIN
    SELECT c.oid::regclass::text AS shown, c.relkind, c.relpersistence, c.relnamespace::regnamespace::text AS schema
      INTO t FROM pg_class c WHERE c.oid = source_table;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no table with oid %', source_table
            USING ERRCODE = 'undefined_table', HINT = 'Name the table: source_table = ''schema.table''.';
    END IF;
    IF t.relkind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION '% is %, not a table', t.shown, CASE t.relkind WHEN 'v' THEN 'a view'
                WHEN 'm' THEN 'a materialized view' WHEN 'f' THEN 'a foreign table' WHEN 'S' THEN 'a sequence'
                WHEN 'i' THEN 'an index' WHEN 'I' THEN 'an index' ELSE 'a relation of another kind' END
            USING ERRCODE = 'wrong_object_type',
                  HINT = 'Vectors are kept for ordinary and partitioned tables: configure the table that holds the text.';
    END IF;
    IF t.relpersistence = 't' THEN
        RAISE EXCEPTION '% is a temporary table', t.shown
            USING ERRCODE = 'wrong_object_type', HINT = 'No other session can see it: use an ordinary table.';
    END IF;
    IF source_table < 16384 OR t.schema IN ('pg_catalog', 'information_schema', 'pg_toast', 'cdc_embedder') THEN
        RAISE EXCEPTION '% is a system table', t.shown
            USING ERRCODE = 'wrong_object_type', HINT = 'Configure a table of the application.';
    END IF;
    IF t.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = source_table) THEN
        RAISE EXCEPTION '% is an inheritance parent', t.shown
            USING ERRCODE = 'wrong_object_type',
                  HINT = 'Its primary key does not reach the children: configure each child, or use declarative partitioning.';
    END IF;
    SELECT e.source_table::text INTO relative
      FROM cdc_embedder.embedding_column e
     WHERE e.id IS DISTINCT FROM column_id AND e.source_table <> $1
       AND (e.source_table IN (SELECT relid FROM pg_partition_ancestors($1))
            OR e.source_table IN (SELECT relid FROM pg_partition_tree($1)));
    IF FOUND THEN
        RAISE EXCEPTION '% and the configured table % are partitions of one another', t.shown, relative
            USING ERRCODE = 'wrong_object_type',
                  HINT = 'Each row would be embedded twice: configure either the partitioned table or its partitions.';
    END IF;
    IF t.relpersistence = 'u' THEN
        RAISE NOTICE '% is unlogged: the slot never hears of it, so scans alone feed it', t.shown
            USING HINT = 'Ask for a scan with cdc_embedder.reconcile(), or ALTER TABLE ... SET LOGGED.';
    END IF;
END
$$;

-- A usable primary key, and a replica identity under which publishing updates cannot make the application's UPDATE fail.
CREATE OR REPLACE FUNCTION cdc_embedder._check_key(source_table oid, keys_only boolean) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    key record;
    leaf text;
BEGIN
    SELECT * INTO key FROM cdc_embedder._primary_key(source_table);
    IF NOT FOUND THEN
        RAISE EXCEPTION '% has no primary key', source_table::regclass
            USING ERRCODE = 'invalid_table_definition',
                  HINT = format('Rows are addressed by it: ALTER TABLE %s ADD PRIMARY KEY (...).', source_table::regclass);
    END IF;
    IF key.is_deferrable THEN
        RAISE EXCEPTION 'the primary key of % is deferrable', source_table::regclass
            USING ERRCODE = 'invalid_table_definition',
                  HINT = 'It is no replica identity, and does not hold at every moment: make it NOT DEFERRABLE.';
    END IF;
    IF key.access_method <> 'btree' THEN
        RAISE EXCEPTION 'the primary key of % is WITHOUT OVERLAPS', source_table::regclass
            USING ERRCODE = 'feature_not_supported', HINT = 'Give the table a primary key of equality alone.';
    END IF;
    SELECT c.oid::regclass::text INTO leaf
      FROM pg_class c
     WHERE (c.oid = source_table OR c.oid IN (SELECT relid FROM pg_partition_tree(source_table)))
       AND (c.relreplident = 'n' OR c.relreplident = 'i' AND NOT EXISTS (
                SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident))
     ORDER BY c.oid = source_table DESC, c.oid
     LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION '% has no usable replica identity (NOTHING, or an index that is gone)', leaf
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Published like that, its updates would fail: ALTER TABLE %s REPLICA IDENTITY DEFAULT.', leaf);
    END IF;
    IF keys_only AND current_setting('server_version_num')::int < 150000 THEN
        RAISE EXCEPTION 'keys_only needs PostgreSQL 15: an older publication has no column lists'
            USING ERRCODE = 'feature_not_supported', HINT = 'Leave keys_only at false.';
    END IF;
    SELECT c.oid::regclass::text INTO leaf
      FROM pg_class c
     WHERE (c.oid = source_table OR c.oid IN (SELECT relid FROM pg_partition_tree(source_table)))
       AND c.relreplident <> 'd'
     ORDER BY c.oid = source_table DESC, c.oid
     LIMIT 1;
    IF keys_only AND FOUND THEN
        RAISE EXCEPTION 'keys_only: % has another replica identity than its primary key', leaf
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Published like that, its updates would fail: ALTER TABLE %s REPLICA IDENTITY DEFAULT, or leave keys_only at false.', leaf);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._check_sources(source_table oid, source_columns text[]) RETURNS int2[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    attnums int2[];
    missing text;
    wrong record;
    candidates text;
BEGIN
    IF coalesce(array_ndims(source_columns), 0) <> 1 OR array_position(source_columns, NULL) IS NOT NULL THEN
        RAISE EXCEPTION 'source_columns names no column, or one that is NULL'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Name the columns that hold the text: ''{title,body}''.';
    END IF;
    SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) INTO candidates
      FROM pg_attribute a
     WHERE a.attrelid = source_table AND a.attnum > 0 AND NOT a.attisdropped
       AND cdc_embedder._is_text_like(a.atttypid);
    SELECT array_agg(a.attnum ORDER BY s.position), min(s.name) FILTER (WHERE a.attnum IS NULL)
      INTO attnums, missing
      FROM unnest(source_columns) WITH ORDINALITY AS s(name, position)
      LEFT JOIN pg_attribute a ON a.attrelid = source_table AND a.attname = s.name
                              AND a.attnum > 0 AND NOT a.attisdropped;
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION '% has no column %', source_table::regclass, quote_ident(missing)
            USING ERRCODE = 'undefined_column',
                  HINT = format('Its columns that hold text: %s. Case counts, and quotes are not written.', coalesce(candidates, 'none'));
    END IF;
    IF (SELECT count(DISTINCT n) < count(*) FROM unnest(attnums) AS n) THEN
        RAISE EXCEPTION 'source_columns names a column twice'
            USING ERRCODE = 'duplicate_column', HINT = 'Name each column once.';
    END IF;
    SELECT a.attname, format_type(a.atttypid, a.atttypmod) AS type INTO wrong
      FROM pg_attribute a
     WHERE a.attrelid = source_table AND a.attnum = ANY (attnums) AND NOT cdc_embedder._is_text_like(a.atttypid)
     ORDER BY array_position(attnums, a.attnum)
     LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the source column % of % is of type %, which is no text',
                quote_ident(wrong.attname), source_table::regclass, wrong.type
            USING ERRCODE = 'datatype_mismatch',
                  HINT = format('Text is text, varchar, char or citext, or a domain over one. Columns that hold text: %s.', coalesce(candidates, 'none'));
    END IF;
    RETURN attnums;
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._check_target(
    source_table oid, target_column name, source_columns text[], model text, dimensions int)
RETURNS int2
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    shown text := format('the target column %s of %s', quote_ident(target_column), source_table::regclass);
    wanted text := cdc_embedder._target_type(dimensions);
    a record;
    v record;
BEGIN
    IF target_column = ANY (source_columns) THEN
        RAISE EXCEPTION '% is a source column as well', shown
            USING ERRCODE = 'invalid_parameter_value', HINT = 'The vector needs a column of its own.';
    END IF;
    SELECT attnum, attnotnull, attgenerated, atttypid, atttypmod, format_type(atttypid, atttypmod) AS type INTO a
      FROM pg_attribute
     WHERE attrelid = source_table AND attname = target_column AND attnum > 0 AND NOT attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION '% does not exist', shown
            USING ERRCODE = 'undefined_column',
                  HINT = format('ALTER TABLE %s ADD COLUMN %I %s; or let cdc_embedder.add_embedding_column() add it.',
                                source_table::regclass, target_column, wanted);
    END IF;
    IF EXISTS (SELECT FROM cdc_embedder._primary_key(source_table) k WHERE a.attnum = ANY (k.attnums)) THEN
        RAISE EXCEPTION '% is in the primary key', shown
            USING ERRCODE = 'invalid_column_definition', HINT = 'The vector needs a column of its own.';
    END IF;
    IF a.attgenerated <> '' THEN
        RAISE EXCEPTION '% is generated', shown
            USING ERRCODE = 'generated_always',
                  HINT = format('ALTER TABLE %s ALTER COLUMN %I DROP EXPRESSION.', source_table::regclass, target_column);
    END IF;
    IF a.attnotnull THEN
        RAISE EXCEPTION '% is NOT NULL', shown
            USING ERRCODE = 'invalid_column_definition',
                  HINT = format('A row has no vector until it is embedded: ALTER TABLE %s ALTER COLUMN %I DROP NOT NULL.',
                                source_table::regclass, target_column);
    END IF;
    SELECT * INTO v FROM cdc_embedder._vector_type(a.atttypid, a.atttypmod);
    IF NOT FOUND THEN
        RAISE EXCEPTION '% is of type %, which cannot hold a vector', shown, a.type
            USING ERRCODE = 'datatype_mismatch',
                  HINT = format('Vectors are real[], double precision[], vector(n) or halfvec(n); here for example %s.', wanted);
    END IF;
    IF v.kind IN ('vector', 'halfvec') AND v.dimensions IS NULL THEN
        RAISE EXCEPTION '% is a % without a dimension', shown, v.kind
            USING ERRCODE = 'datatype_mismatch',
                  HINT = format('ALTER TABLE %s ALTER COLUMN %I TYPE %s.', source_table::regclass, target_column,
                                format('%s(%s)', format_type(a.atttypid, NULL), dimensions));
    END IF;
    IF v.dimensions <> _check_target.dimensions THEN
        RAISE EXCEPTION '% is %, the model % has % dimensions', shown, a.type, model, _check_target.dimensions
            USING ERRCODE = 'datatype_mismatch',
                  HINT = 'Name a model of that many dimensions, or give the column the type of the model''s.';
    END IF;
    RETURN a.attnum;
END
$$;

-- Whether the service, which is the schema's owner and runs this, may read and write what it must; a NOTICE where not.
CREATE OR REPLACE FUNCTION cdc_embedder._notice_missing_rights(source_table oid, readable int2[], target_attnum int2)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    schema oid := (SELECT relnamespace FROM pg_class WHERE oid = source_table);
    target text := (SELECT quote_ident(attname) FROM pg_attribute WHERE attrelid = source_table AND attnum = target_attnum);
    columns text;
    statements text[] := '{}';
BEGIN
    IF NOT has_schema_privilege(schema, 'USAGE') THEN
        statements := statements || format('GRANT USAGE ON SCHEMA %s TO %I', schema::regnamespace, current_user);
    END IF;
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO columns
      FROM pg_attribute
     WHERE attrelid = source_table AND attnum = ANY (readable || target_attnum)
       AND NOT has_column_privilege(source_table, attnum, 'SELECT');
    IF columns IS NOT NULL THEN
        statements := statements || format('GRANT SELECT (%s) ON %s TO %I', columns, source_table::regclass, current_user);
    END IF;
    IF NOT has_column_privilege(source_table, target_attnum, 'UPDATE') THEN
        statements := statements || format('GRANT UPDATE (%s) ON %s TO %I', target, source_table::regclass, current_user);
    END IF;
    IF row_security_active(source_table) THEN
        statements := statements || format('ALTER ROLE %I BYPASSRLS', current_user);
    END IF;
    IF statements <> '{}' THEN
        RAISE NOTICE 'the service''s role % cannot serve % yet', current_user, source_table::regclass
            USING HINT = array_to_string(statements, '; ') || '.';
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._check_options(c cdc_embedder.embedding_column) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    elsewhere name;
BEGIN
    IF c.source_table IS NULL OR c.source_columns IS NULL OR c.target_column IS NULL OR c.model IS NULL THEN
        RAISE EXCEPTION 'source_table, source_columns, target_column and model must be given'
            USING ERRCODE = 'not_null_violation',
                  HINT = 'INSERT INTO cdc_embedder.embedding_column (source_table, source_columns, target_column, model) VALUES (''documents'', ''{body}'', ''embedding'', ''all-MiniLM-L6-v2'').';
    END IF;
    IF c.slot !~ '^[a-z0-9_]{1,63}$' THEN
        RAISE EXCEPTION '"%" cannot be the name of a replication slot', c.slot
            USING ERRCODE = 'invalid_name', HINT = 'Lower-case letters, digits and underscores, 63 at most.';
    END IF;
    SELECT database INTO elsewhere FROM pg_replication_slots
     WHERE slot_name = c.slot AND database IS DISTINCT FROM current_database();
    IF FOUND THEN
        RAISE EXCEPTION 'the replication slot "%" belongs to %', c.slot, coalesce(format('the database "%s"', elsewhere), 'physical replication')
            USING ERRCODE = 'object_in_use',
                  HINT = 'Slot names are cluster-wide: choose another, and run `cdc-embedder init --slot NAME` with it.';
    END IF;
    IF EXISTS (SELECT FROM cdc_embedder.embedding_column e
                WHERE e.source_table = c.source_table AND e.target_column = c.target_column AND e.id IS DISTINCT FROM c.id) THEN
        RAISE EXCEPTION 'the column % of % is configured already', quote_ident(c.target_column), c.source_table
            USING ERRCODE = 'unique_violation', CONSTRAINT = 'embedding_column_target',
                  HINT = 'UPDATE its row in cdc_embedder.embedding_column, or DELETE it first.';
    END IF;
    IF NOT EXISTS (SELECT FROM cdc_embedder.model m WHERE m.name = c.model) THEN
        RAISE EXCEPTION 'there is no model "%"', c.model
            USING ERRCODE = 'undefined_object',
                  HINT = format('Known: %s. Another is a row in cdc_embedder.model (name and dimensions are enough).',
                                (SELECT string_agg(m.name, ', ' ORDER BY m.name) FROM cdc_embedder.model m));
    END IF;
END
$$;

-- A template's parts in order: text as a JSON string, a column as its place in `source_columns`, from 0; a name that is
-- none of them, or a brace that stands alone, as null. {{ and }} are braces. NULL: no template.
CREATE OR REPLACE FUNCTION cdc_embedder._template_parts(template text, source_columns text[]) RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN template IS NOT NULL THEN coalesce(jsonb_agg(
               CASE WHEN p.part = '{{' THEN to_jsonb('{'::text)
                    WHEN p.part = '}}' THEN to_jsonb('}'::text)
                    WHEN p.part ~ '^\{.*\}$' THEN to_jsonb(array_position(source_columns, substr(p.part, 2, length(p.part) - 2)) - 1)
                    WHEN p.part IN ('{', '}') THEN 'null'
                    ELSE to_jsonb(p.part) END ORDER BY p.position), '[]') END
      FROM (SELECT m[1] AS part, position
              FROM regexp_matches(template, '(\{\{|\}\}|\{[^{}]*\}|[^{}]+|[{}])', 'g') WITH ORDINALITY AS r(m, position)) p
$$;

-- The template that has these parts, with other names for its columns.
CREATE OR REPLACE FUNCTION cdc_embedder._template_of(parts jsonb, source_columns text[]) RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT string_agg(CASE jsonb_typeof(p.part)
                          WHEN 'number' THEN '{' || source_columns[(p.part #>> '{}')::int + 1] || '}'
                          ELSE replace(replace(p.part #>> '{}', '{', '{{'), '}', '}}') END, '' ORDER BY p.position)
      FROM jsonb_array_elements(parts) WITH ORDINALITY AS p(part, position)
$$;

-- The columns that a template names, in the order of their first mention.
CREATE OR REPLACE FUNCTION cdc_embedder._template_columns(template text) RETURNS text[]
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_agg(n.name ORDER BY n.first)
      FROM (SELECT substr(m[1], 2, length(m[1]) - 2) AS name, min(position) AS first
              FROM regexp_matches(template, '(\{\{|\}\}|\{[^{}]*\}|[^{}]+|[{}])', 'g') WITH ORDINALITY AS r(m, position)
             WHERE m[1] ~ '^\{.*\}$' AND m[1] <> '{{' AND m[1] <> '}}'
             GROUP BY 1) n
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._check_template(template text, source_columns text[]) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    parts jsonb := cdc_embedder._template_parts(template, source_columns);
    unknown text := (SELECT min(n) FROM unnest(cdc_embedder._template_columns(template)) AS n WHERE n <> ALL (source_columns));
    unused text := (SELECT min(n) FROM unnest(source_columns) AS n WHERE n <> ALL (coalesce(cdc_embedder._template_columns(template), '{}')));
BEGIN
    IF template IS NULL THEN
        RETURN;
    ELSIF unknown IS NOT NULL THEN
        RAISE EXCEPTION 'the template names %, which is none of the source columns', quote_ident(unknown)
            USING ERRCODE = 'undefined_column',
                  HINT = format('They are: %s. A brace that is meant is written twice: {{ or }}.', array_to_string(source_columns, ', '));
    ELSIF jsonb_path_exists(parts, '$[*] ? (@ == null)') THEN
        RAISE EXCEPTION 'a brace of the template stands alone'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'A column is {name}; a brace that is meant is written twice: {{ or }}.';
    ELSIF unused IS NOT NULL THEN
        RAISE EXCEPTION 'the template does not name the source column %', quote_ident(unused)
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Its changes would make every vector stale for nothing: name it in the template, or leave it out of source_columns.';
    END IF;
END
$$;

-- Columns are followed by number: where a name is as it was and the column was renamed, the new name is taken.
CREATE OR REPLACE FUNCTION cdc_embedder._follow_renames(
    old cdc_embedder.embedding_column, INOUT new cdc_embedder.embedding_column)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    names text[];
BEGIN
    IF new.source_table <> old.source_table OR old.database_oid <> (SELECT oid FROM pg_database WHERE datname = current_database())
       OR old.system_identifier <> (SELECT system_identifier FROM pg_control_system()) THEN
        RETURN;
    END IF;
    SELECT array_agg(a.attname::text ORDER BY s.position) INTO names
      FROM unnest(old.source_attnums) WITH ORDINALITY AS s(attnum, position)
      JOIN pg_attribute a ON a.attrelid = old.source_table AND a.attnum = s.attnum AND NOT a.attisdropped;
    IF new.source_columns = old.source_columns AND cardinality(names) = cardinality(old.source_attnums) THEN
        IF new.template = old.template AND names <> old.source_columns THEN
            IF array_to_string(names, '') ~ '[{}]' THEN
                RAISE EXCEPTION 'a source column of % was renamed, and a template cannot name it: %', old.source_table,
                        (SELECT string_agg(quote_ident(n), ', ') FROM unnest(names) AS n WHERE n ~ '[{}]')
                    USING ERRCODE = 'undefined_column',
                          HINT = 'A name in a template has no brace: rename the column, or set template = NULL and a separator.';
            END IF;
            new.template := cdc_embedder._template_of(cdc_embedder._template_parts(old.template, old.source_columns), names);
        END IF;
        new.source_columns := names;
    END IF;
    IF new.target_column = old.target_column THEN
        new.target_column := coalesce((
            SELECT attname FROM pg_attribute
             WHERE attrelid = old.source_table AND attnum = old.target_attnum AND NOT attisdropped), new.target_column);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._validate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    key record;
    of_model cdc_embedder.model;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        NEW := cdc_embedder._follow_renames(OLD, NEW);
    ELSE
        NEW.generation := 1;
    END IF;
    IF NEW.source_columns IS NULL AND NEW.template IS NOT NULL THEN
        NEW.source_columns := cdc_embedder._template_columns(NEW.template);
    END IF;
    PERFORM cdc_embedder._check_options(NEW);
    -- FOR SHARE: a change of the model under way must not miss this column.
    SELECT * INTO of_model FROM cdc_embedder.model m WHERE m.name = NEW.model FOR SHARE;
    PERFORM cdc_embedder._check_table(NEW.source_table, NEW.id);
    PERFORM cdc_embedder._check_key(NEW.source_table, NEW.keys_only);
    NEW.source_attnums := cdc_embedder._check_sources(NEW.source_table, NEW.source_columns);
    PERFORM cdc_embedder._check_template(NEW.template, NEW.source_columns);
    IF NEW.when_stale = 'clear' AND EXISTS (
            SELECT FROM pg_attribute a WHERE a.attrelid = NEW.source_table AND a.attnum = ANY (NEW.source_attnums) AND a.attgenerated <> '') THEN
        RAISE EXCEPTION 'when_stale = ''clear'' cannot see a generated source column change'
            USING ERRCODE = 'feature_not_supported',
                  HINT = 'Name the columns that it is generated from, or leave when_stale at ''keep''.';
    END IF;
    NEW.target_attnum := cdc_embedder._check_target(
        NEW.source_table, NEW.target_column, NEW.source_columns, of_model.name, of_model.dimensions);
    SELECT * INTO key FROM cdc_embedder._primary_key(NEW.source_table);
    NEW.key_columns := key.columns;
    NEW.key_attnums := key.attnums;
    NEW.key_types := key.types;
    SELECT n.nspname, c.relname INTO NEW.source_schema, NEW.source_name
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = NEW.source_table;
    SELECT d.oid, s.system_identifier INTO NEW.database_oid, NEW.system_identifier
      FROM pg_database d, pg_control_system() s WHERE d.datname = current_database();
    PERFORM cdc_embedder._notice_missing_rights(
        NEW.source_table,
        -- -2 is xmin, which tells whether a row was written since (scan.adoptable_before)
        NEW.key_attnums || NEW.source_attnums || CASE WHEN NEW.on_existing = 'adopt' THEN '{-2}'::int2[] ELSE '{}' END,
        NEW.target_attnum);
    RETURN NEW;
END
$$;
