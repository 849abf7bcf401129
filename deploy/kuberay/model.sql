-- The model of a column, in the Ray cluster of raycluster.yaml: the address is its head's service, port `client`.
-- The columns' vectors are made anew, as for any change of a model that may change them.
UPDATE cdc_embedder.model
   SET backend = 'ray',
       options = '{"address": "ray://embedders-head-svc:10001", "actors": 2, "num_gpus": 1, "num_cpus": 4}'
 WHERE name = 'intfloat/e5-small-v2';
