"""Text from a model: cache, sampling, the decoding loop, and the ways to ask for it."""
