-- The models that are known from the start, with the prompts of their model cards. A row that is there already is the
-- user's and stays as it is. `source` is where a name differs from the hub's id.

INSERT INTO cdc_embedder.model (name, source, dimensions, document_prompt, query_prompt, trust_remote_code)
VALUES
    ('all-MiniLM-L6-v2', 'sentence-transformers/all-MiniLM-L6-v2', 384, NULL, NULL, false),
    ('intfloat/e5-small-v2', NULL, 384, 'passage: ', 'query: ', false),
    ('mixedbread-ai/mxbai-embed-large-v1', NULL, 1024, NULL,
     'Represent this sentence for searching relevant passages: ', false),
    -- Its architecture is code in its own repository: the operator has to allow that as well.
    ('Alibaba-NLP/gte-large-en-v1.5', NULL, 1024, NULL, NULL, true)
ON CONFLICT (name) DO NOTHING;
