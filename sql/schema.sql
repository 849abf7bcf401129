-- Everything, for psql: `psql -v slot=cdc_embedder -f schema.sql` (the slot's name may be left out). The same as
-- `cdc-embedder init`, and as repeatable; but it is `init` that checks the server and explains what is wrong.
-- Run it as the service's role, or with `SET ROLE` to it: who runs it owns what it makes.

\set ON_ERROR_STOP on
\if :{?slot}
\else
    \set slot cdc_embedder
\endif

BEGIN;
SELECT pg_advisory_xact_lock(hashtextextended('cdc_embedder install', 0));

SELECT to_regclass('cdc_embedder.migration') IS NULL AS fresh \gset
\if :fresh
    \ir migrations/001_tables.sql
\endif

\ir functions/catalog.sql
\ir functions/validation.sql
\ir functions/publication.sql
\ir functions/columns.sql
\ir functions/requests.sql
\ir functions/status.sql
\ir functions/privileges.sql
\ir functions/triggers.sql
\ir views.sql
\ir models.sql

ALTER TABLE cdc_embedder.embedding_column ALTER slot SET DEFAULT :'slot';

-- Empty, and before the slot: rule 11.
SELECT NOT EXISTS (SELECT FROM pg_publication WHERE pubname = :'slot') AS unpublished \gset
\if :unpublished
    CREATE PUBLICATION :"slot" WITH (publish = 'insert, update', publish_via_partition_root = true);
\endif
COMMIT;
