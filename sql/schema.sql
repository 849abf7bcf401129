-- Everything, for psql: `psql -v slot=cdc_embedder -v pgml=false -f schema.sql` (both may be left out). The same as
-- `cdc-embedder init`, and as repeatable; but it is `init` that checks the server and explains what is wrong.
-- Run it as the service's role, or with `SET ROLE` to it: who runs it owns what it makes.

\set ON_ERROR_STOP on
\if :{?slot}
\else
    \set slot cdc_embedder
\endif
\if :{?pgml}
\else
    \set pgml false
\endif

BEGIN;
-- A function of somebody's in a schema that he may write to must not be taken for one of PostgreSQL's.
SET LOCAL search_path = pg_catalog, pg_temp;
SELECT pg_advisory_xact_lock(hashtextextended('cdc_embedder install', 0));

SELECT to_regclass('cdc_embedder.migration') IS NULL AS fresh \gset
\if :fresh
    \ir migrations/001_tables.sql
\endif
SELECT NOT EXISTS (SELECT FROM cdc_embedder.migration WHERE version = 2) AS missing \gset
\if :missing
    \ir migrations/002_slots.sql
\endif
SELECT NOT EXISTS (SELECT FROM cdc_embedder.migration WHERE version = 3) AS missing \gset
\if :missing
    \ir migrations/003_commit_times.sql
\endif

\ir functions/catalog.sql
\ir functions/validation.sql
\ir functions/publication.sql
\ir functions/columns.sql
\ir functions/requests.sql
\ir functions/vectors.sql
\ir functions/embed.sql
\ir functions/search.sql
\ir functions/freshness.sql
\ir functions/status.sql
\ir functions/privileges.sql
\ir functions/triggers.sql
\ir views.sql
\ir models.sql

-- The names of PostgresML, where they are wanted or were before.
SELECT :'pgml'::boolean
       OR starts_with(obj_description(to_regnamespace('pgml'), 'pg_namespace'), 'cdc-embedder') IS TRUE AS with_pgml \gset
\if :with_pgml
    \ir pgml.sql
\endif

ALTER TABLE cdc_embedder.embedding_column ALTER slot SET DEFAULT :'slot';

-- Empty, and before the slots: rule 11.
SELECT NOT EXISTS (SELECT FROM pg_publication WHERE pubname = :'slot') AS unpublished \gset
\if :unpublished
    CREATE PUBLICATION :"slot" WITH (publish = 'insert, update', publish_via_partition_root = true);
\endif
\set embed_slot :slot '_embed'
SELECT NOT EXISTS (SELECT FROM pg_publication WHERE pubname = :'embed_slot') AND length(:'embed_slot') <= 63
    AS unpublished \gset
\if :unpublished
    CREATE PUBLICATION :"embed_slot" WITH (publish = 'insert, update', publish_via_partition_root = true);
\endif
COMMIT;
