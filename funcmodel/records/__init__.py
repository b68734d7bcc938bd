"""L0: frozen data. No logic beyond properties, converters and validators; no torch."""
