"""Numbers about rows that a method can ask for: one module per signal."""
