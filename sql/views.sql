-- What operators read. A function in a view is called as the reader: SELECT here goes with EXECUTE on the function.

CREATE OR REPLACE VIEW cdc_embedder.status AS
    SELECT * FROM cdc_embedder._status();

COMMENT ON VIEW cdc_embedder.status IS 'a row a column: state, counts, lag; cheap at any size';

CREATE OR REPLACE VIEW cdc_embedder.failed AS
    SELECT * FROM cdc_embedder._failed();

COMMENT ON VIEW cdc_embedder.failed IS 'a row a source row that could not be embedded: key, error, next try';
