-- The publication of a slot: a table is added when the first of its columns is configured, and dropped with the last.
-- ADD and DROP, never SET: the list may hold tables that others put there. It runs as the caller, whose right it takes
-- (of the table and of the publication); where that is not enough the row is kept and says which statement is missing.

CREATE OR REPLACE FUNCTION cdc_embedder._publish() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '1s'
AS $$
DECLARE
    statement text;
    keys text := CASE WHEN NEW.keys_only
                      THEN (SELECT format(' (%s)', string_agg(quote_ident(k), ', ')) FROM unnest(NEW.key_columns) k)
                      ELSE '' END;
    renewed boolean := CASE WHEN TG_OP = 'UPDATE' THEN NEW.keys_only <> OLD.keys_only ELSE false END;
BEGIN
    SELECT format('ALTER PUBLICATION %I ADD TABLE %I.%I%s', NEW.slot, n.nspname, c.relname, keys) INTO statement
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.oid = NEW.source_table AND c.relpersistence = 'p';
    IF statement IS NULL
       OR EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = NEW.slot AND plugin = 'wal2json') THEN
        NEW.publication_statement := NULL;
        RETURN NEW;
    END IF;
    IF EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                WHERE p.pubname = NEW.slot AND r.prrelid = NEW.source_table) THEN
        IF NOT renewed THEN
            NEW.publication_statement := NULL;
            RETURN NEW;
        END IF;
        -- In one transaction: no change of the table is passed over.
        statement := format('ALTER PUBLICATION %I DROP TABLE %s; %s', NEW.slot, NEW.source_table, statement);
    END IF;
    NEW.publication_statement := statement;
    -- Twice: a wait of deadlock_timeout is what makes an autovacuum of the table give way.
    FOR attempt IN 1..2 LOOP
        BEGIN
            EXECUTE statement;
            NEW.publication_statement := NULL;
            RETURN NEW;
        EXCEPTION
            WHEN lock_not_available THEN
                CONTINUE WHEN attempt = 1;
                RAISE NOTICE '%: % is locked; until it is published, scans alone feed it', statement, NEW.source_table
                    USING HINT = 'Run the statement when the lock is gone.';
            WHEN OTHERS THEN
                RAISE NOTICE '%: %; until it is published, scans alone feed it', statement, SQLERRM
                    USING HINT = 'It takes the rights of the owner of the table and of the publication: a superuser, or a member of both roles.';
                EXIT;
        END;
    END LOOP;
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION cdc_embedder._unpublish() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '1s'
AS $$
DECLARE
    statement text;
BEGIN
    IF TG_OP = 'UPDATE' AND (NEW.slot, NEW.source_table) = (OLD.slot, OLD.source_table)
       OR EXISTS (SELECT FROM cdc_embedder.embedding_column e
                   WHERE e.slot = OLD.slot AND e.source_table = OLD.source_table) THEN
        RETURN NULL;
    END IF;
    SELECT format('ALTER PUBLICATION %I DROP TABLE %I.%I', p.pubname, n.nspname, c.relname) INTO statement
      FROM pg_publication p
      JOIN pg_publication_rel r ON r.prpubid = p.oid
      JOIN pg_class c ON c.oid = r.prrelid
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE p.pubname = OLD.slot AND r.prrelid = OLD.source_table;
    IF statement IS NOT NULL THEN
        EXECUTE statement;
    END IF;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    RAISE NOTICE '%: %', statement, SQLERRM
        USING HINT = 'The table stays in the publication, at the price of changes that are read for nothing: run the statement as a role that owns both.';
    RETURN NULL;
END
$$;
