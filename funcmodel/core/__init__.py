"""L1: one expression, one key, one header. Pure; no torch."""
