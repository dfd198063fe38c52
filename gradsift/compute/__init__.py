"""Runs a function over shards, serially or on Ray, within the memory there is."""
