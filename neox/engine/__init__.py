"""Training engines: the door to DeepSpeed."""
