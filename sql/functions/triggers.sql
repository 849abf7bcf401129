-- Which function answers which statement. Row triggers of one kind fire in the order of their names.

CREATE OR REPLACE TRIGGER a_protect BEFORE UPDATE ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._protect();

CREATE OR REPLACE TRIGGER b_validate
    BEFORE INSERT OR UPDATE OF source_table, source_columns, separator, template, target_column, model, when_stale, slot, keys_only, protect
    ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._validate();

CREATE OR REPLACE TRIGGER b_validate_resumed BEFORE UPDATE OF enabled ON cdc_embedder.embedding_column
    FOR EACH ROW WHEN (NEW.enabled AND NOT OLD.enabled) EXECUTE FUNCTION cdc_embedder._validate();

CREATE OR REPLACE TRIGGER c_publish BEFORE INSERT OR UPDATE OF source_table, slot, enabled, keys_only
    ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._publish();

CREATE OR REPLACE TRIGGER d_renew_generation BEFORE UPDATE ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._renew_generation();

CREATE OR REPLACE TRIGGER before_delete BEFORE DELETE ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._before_delete();

CREATE OR REPLACE TRIGGER after_insert AFTER INSERT ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._after_insert();

CREATE OR REPLACE TRIGGER after_update AFTER UPDATE ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._after_update();

CREATE OR REPLACE TRIGGER unpublish AFTER DELETE OR UPDATE OF slot, source_table ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._unpublish();

CREATE OR REPLACE TRIGGER guards_a_made AFTER INSERT ON cdc_embedder.embedding_column
    FOR EACH ROW WHEN (NEW.when_stale = 'clear' OR NEW.protect) EXECUTE FUNCTION cdc_embedder._make_guards();

CREATE OR REPLACE TRIGGER guards_a_made_anew AFTER UPDATE ON cdc_embedder.embedding_column
    FOR EACH ROW WHEN (OLD.when_stale <> NEW.when_stale OR OLD.protect <> NEW.protect OR OLD.source_table <> NEW.source_table
        OR (OLD.source_columns <> NEW.source_columns AND OLD.source_attnums <> NEW.source_attnums)
        OR (OLD.target_column <> NEW.target_column AND OLD.target_attnum <> NEW.target_attnum))
    EXECUTE FUNCTION cdc_embedder._make_guards();

CREATE OR REPLACE TRIGGER guards_b_set AFTER INSERT ON cdc_embedder.embedding_column
    FOR EACH ROW WHEN (NEW.when_stale = 'clear' OR NEW.protect) EXECUTE FUNCTION cdc_embedder._set_guards();

CREATE OR REPLACE TRIGGER guards_b_set_anew AFTER UPDATE ON cdc_embedder.embedding_column
    FOR EACH ROW WHEN (OLD.when_stale <> NEW.when_stale OR OLD.protect <> NEW.protect OR OLD.source_table <> NEW.source_table
        OR (OLD.source_columns <> NEW.source_columns AND OLD.source_attnums <> NEW.source_attnums)
        OR (OLD.target_column <> NEW.target_column AND OLD.target_attnum <> NEW.target_attnum))
    EXECUTE FUNCTION cdc_embedder._set_guards();

CREATE OR REPLACE TRIGGER guards_gone AFTER DELETE ON cdc_embedder.embedding_column
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._make_guards();

CREATE OR REPLACE TRIGGER refuse_truncate BEFORE TRUNCATE ON cdc_embedder.embedding_column
    FOR EACH STATEMENT EXECUTE FUNCTION cdc_embedder._refuse_truncate();

CREATE OR REPLACE TRIGGER notify AFTER INSERT OR UPDATE OR DELETE ON cdc_embedder.embedding_column
    FOR EACH STATEMENT EXECUTE FUNCTION cdc_embedder._notify();

CREATE OR REPLACE TRIGGER check_model BEFORE INSERT OR UPDATE ON cdc_embedder.model
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._check_model();

CREATE OR REPLACE TRIGGER after_update AFTER UPDATE ON cdc_embedder.model
    FOR EACH ROW EXECUTE FUNCTION cdc_embedder._after_model_update();

CREATE OR REPLACE TRIGGER notify AFTER INSERT OR UPDATE OR DELETE ON cdc_embedder.model
    FOR EACH STATEMENT EXECUTE FUNCTION cdc_embedder._notify();

-- Not of the service's own notes on its progress.
CREATE OR REPLACE TRIGGER notify AFTER INSERT OR UPDATE OF requested_at ON cdc_embedder.scan
    FOR EACH STATEMENT EXECUTE FUNCTION cdc_embedder._notify();

CREATE OR REPLACE TRIGGER notify AFTER UPDATE ON cdc_embedder.sql_embed
    FOR EACH STATEMENT EXECUTE FUNCTION cdc_embedder._notify();
