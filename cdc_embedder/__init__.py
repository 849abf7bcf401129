"""A PostgreSQL column that fills itself with embeddings, fed by a logical replication slot."""

__version__ = "0.2.0"
