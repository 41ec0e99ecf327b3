"""Who computes what: topology (arithmetic), process groups, sharded layers, random streams."""
