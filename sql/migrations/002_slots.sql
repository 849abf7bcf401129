-- Slots that the service gave up because they held back more WAL than its operator allows, until somebody says that they
-- may be made again. Durable, so that neither a restart nor another instance makes them by itself.

CREATE TABLE cdc_embedder.given_up (
    slot name PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    retained_bytes bigint NOT NULL
);

COMMENT ON TABLE cdc_embedder.given_up IS 'slots that were given up beyond the limit on WAL: SELECT cdc_embedder.take_slot_again() ends it';

-- Slots on a standby, which the primary does not show. `proof` is what the standby has to show before it is believed to
-- follow this server.
CREATE TABLE cdc_embedder.standby_slot (
    slot name PRIMARY KEY,
    plugin text,
    proof uuid NOT NULL
);

COMMENT ON TABLE cdc_embedder.standby_slot IS 'slots that are read on a standby: they are to be dropped there, too';

INSERT INTO cdc_embedder.migration (version, name) VALUES (2, 'slots');
