-- What pg_catalog says of keys and types, in the words that the other functions need. They read and refuse nothing.

-- The primary key as it stands, in key order; no row where there is none.
CREATE OR REPLACE FUNCTION cdc_embedder._primary_key(
    source_table oid,
    OUT columns name[], OUT attnums int2[], OUT types text[], OUT collations oid[], OUT operators text[],
    OUT is_deferrable boolean, OUT access_method name)
RETURNS SETOF record
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_agg(a.attname ORDER BY k.position),
           array_agg(a.attnum ORDER BY k.position),
           array_agg(format_type(a.atttypid, a.atttypmod) ORDER BY k.position),
           array_agg(a.attcollation ORDER BY k.position),
           array_agg(format('OPERATOR(%I.%s)', n.nspname, p.oprname) ORDER BY k.position),
           bool_or(c.condeferrable),
           min(m.amname::text)::name
      FROM pg_constraint c
      JOIN pg_index i ON i.indexrelid = c.conindid
      JOIN pg_class x ON x.oid = i.indexrelid
      JOIN pg_am m ON m.oid = x.relam
      CROSS JOIN LATERAL unnest(c.conkey, i.indclass::oid[]) WITH ORDINALITY AS k(attnum, class, position)
      JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.attnum
      JOIN pg_opclass o ON o.oid = k.class
      LEFT JOIN pg_amop w ON w.amopfamily = o.opcfamily AND w.amopstrategy = 3
                         AND w.amoplefttype = o.opcintype AND w.amoprighttype = o.opcintype
      LEFT JOIN pg_operator p ON p.oid = w.amopopr
      LEFT JOIN pg_namespace n ON n.oid = p.oprnamespace
     WHERE c.conrelid = source_table AND c.contype = 'p'
    HAVING count(*) > 0
$$;

-- The type under any number of domains.
CREATE OR REPLACE FUNCTION cdc_embedder._base_type(type oid) RETURNS oid
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    WITH RECURSIVE step(type) AS (
        SELECT $1
        UNION ALL
        SELECT t.typbasetype FROM step s JOIN pg_type t ON t.oid = s.type WHERE t.typtype = 'd'
    )
    SELECT s.type FROM step s JOIN pg_type t ON t.oid = s.type WHERE t.typtype <> 'd'
$$;

-- The extension that brought a type, or NULL.
CREATE OR REPLACE FUNCTION cdc_embedder._type_extension(type oid) RETURNS name
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT x.extname
      FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid
     WHERE d.classid = 'pg_type'::regclass AND d.objid = $1
       AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._is_text_like(type oid) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT t.oid IN ('text'::regtype, 'varchar'::regtype, 'bpchar'::regtype)
        OR (t.typname = 'citext' AND cdc_embedder._type_extension(t.oid) = 'citext')
      FROM pg_type t WHERE t.oid = cdc_embedder._base_type($1)
$$;

-- What the type of a target column says: its kind, and its dimensions where it declares them.
-- No row where the type cannot hold a vector.
CREATE OR REPLACE FUNCTION cdc_embedder._vector_type(type oid, typmod int, OUT kind text, OUT dimensions int)
RETURNS SETOF record
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format_type($1, NULL), NULL::int WHERE $1 IN ('float4[]'::regtype, 'float8[]'::regtype)
    UNION ALL
    SELECT t.typname::text, nullif($2, -1)
      FROM pg_type t
     WHERE t.oid = $1 AND t.typname IN ('vector', 'halfvec') AND cdc_embedder._type_extension(t.oid) = 'vector'
$$;

-- The statement's words for a type of so many dimensions: pgvector's where the database has it.
CREATE OR REPLACE FUNCTION cdc_embedder._target_type(dimensions int) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce((
        SELECT format('%I.vector(%s)', n.nspname, $1)
          FROM pg_extension x
          JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = x.oid
                          AND d.classid = 'pg_type'::regclass AND d.deptype = 'e'
          JOIN pg_type t ON t.oid = d.objid
          JOIN pg_namespace n ON n.oid = t.typnamespace
         WHERE x.extname = 'vector' AND t.typname = 'vector'), 'real[]')
$$;
