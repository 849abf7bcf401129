-- The least that the service's role needs, and no more; for psql, as a superuser. Repeatable. deploy/README.md explains
-- each statement, and what there is to do where nobody is a superuser.
--
-- The role, before `cdc-embedder init --owner cdc_service`:
--     psql -d app -v role=cdc_service -f grants.sql
-- The same, and what it needs on a table; for every table, before or after it is configured:
--     psql -d app -v role=cdc_service -v table=public.documents -v sources=title,body -v target=embedding -f grants.sql
--
-- Names are written as in SQL: "Mixed Case" in double quotes. Options, each on or off (off):
--     -v origins=on        it may mark what it writes, so that it need not hear it again: a third of the rate
--     -v quiet=on          its writes fire no ordinary trigger (15 and up)
--     -v row_security=on   it sees every row of a table with row-level security
--     -v adopting=on       of the table: it may keep the vectors that are there, until the first scan is over
--     -v standby=on        a slot on a standby is made at once (16 and up)
--     -v monitoring=on     `cdc-embedder doctor` sees the size of the WAL and since when transactions are open
-- and -v replication=rds_replication   where a role is granted in place of the attribute REPLICATION (Amazon RDS).

\set ON_ERROR_STOP on
\if :{?origins}
\else
    \set origins off
\endif
\if :{?quiet}
\else
    \set quiet off
\endif
\if :{?row_security}
\else
    \set row_security off
\endif
\if :{?adopting}
\else
    \set adopting off
\endif
\if :{?standby}
\else
    \set standby off
\endif
\if :{?monitoring}
\else
    \set monitoring off
\endif

BEGIN;

SELECT NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = :'role') AS missing \gset
\if :missing
    CREATE ROLE :"role";
\endif
ALTER ROLE :"role" LOGIN;
\if :{?replication}
    GRANT :"replication" TO :"role";
\else
    ALTER ROLE :"role" REPLICATION;
\endif
SELECT pg_catalog.format('GRANT CONNECT ON DATABASE %I TO %I', pg_catalog.current_database(), :'role') \gexec

\if :row_security
    ALTER ROLE :"role" BYPASSRLS;
\endif
\if :quiet
    GRANT SET ON PARAMETER session_replication_role TO :"role";
\endif
\if :standby
    GRANT EXECUTE ON FUNCTION pg_catalog.pg_log_standby_snapshot() TO :"role";
\endif
\if :monitoring
    GRANT pg_monitor TO :"role";
\endif
\if :origins
    -- by name: what the functions take differs between versions
    SELECT pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO %I', p.oid::pg_catalog.regprocedure, :'role')
      FROM pg_catalog.pg_proc p
     WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace
       AND p.proname IN ('pg_replication_origin_create', 'pg_replication_origin_oid',
                         'pg_replication_origin_session_setup') \gexec
\endif

\if :{?table}
    SELECT :'table'::pg_catalog.regclass::pg_catalog.oid AS relation \gset
    -- The columns of the primary key, those that hold the text, and the vector's; a name that is none fails in GRANT.
    SELECT pg_catalog.string_agg(DISTINCT pg_catalog.quote_ident(c.name), ', ') AS readable,
           pg_catalog.string_agg(DISTINCT pg_catalog.quote_ident(c.name), ', ') FILTER (WHERE c.target) AS writable
      FROM (SELECT a.attname::text AS name, false AS target
              FROM pg_catalog.pg_constraint k
              JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)
             WHERE k.conrelid = :relation AND k.contype = 'p'
             UNION ALL
            SELECT (pg_catalog.parse_ident(m[1]))[1], false
              FROM pg_catalog.regexp_matches(:'sources', '("(?:[^"]|"")*"|[^",]+)', 'g') AS m
             UNION ALL
            SELECT (pg_catalog.parse_ident(:'target'))[1], true) c \gset
    SELECT pg_catalog.format('GRANT USAGE ON SCHEMA %s TO %I', relnamespace::pg_catalog.regnamespace, :'role')
      FROM pg_catalog.pg_class WHERE oid = :relation \gexec
    SELECT pg_catalog.format('GRANT SELECT (%s), UPDATE (%s) ON %s TO %I', :'readable', :'writable',
                             :relation::pg_catalog.regclass, :'role') \gexec
    \if :adopting
        SELECT pg_catalog.format('GRANT SELECT (xmin) ON %s TO %I', :relation::pg_catalog.regclass, :'role') \gexec
    \endif
\endif

COMMIT;
