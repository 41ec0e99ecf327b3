"""The model: a list of layers, and the table that says how each parameter is laid out."""
