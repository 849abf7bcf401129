-- When the change of a spilled key was committed, by the server's clock: how late its vector came is told of the late
-- ones above all.

DO $$
DECLARE
    backlog regclass;
BEGIN
    FOR backlog IN
        SELECT c.oid::regclass
          FROM pg_catalog.pg_class c
         WHERE c.relnamespace = 'cdc_embedder'::pg_catalog.regnamespace AND c.relkind = 'r' AND c.relname ~ '^backlog_[0-9]+$'
    LOOP
        EXECUTE pg_catalog.format('ALTER TABLE %s ADD COLUMN committed_at timestamptz', backlog);
    END LOOP;
END
$$;

INSERT INTO cdc_embedder.migration (version, name) VALUES (3, 'commit_times');
