"""L2: whole state dicts and whole modules. Pure; no torch."""
