"""Who computes what: topology (arithmetic), process groups, tensor-parallel layers, random streams."""
