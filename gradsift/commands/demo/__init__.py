"""The whole job on a generated pool, offline."""
