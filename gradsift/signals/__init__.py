"""Numbers about rows that a method can ask for: a module for each signal of `gradsift.types.Signal`."""
