-- After every function: nothing of ours may be called by everybody.

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA cdc_embedder FROM PUBLIC;
