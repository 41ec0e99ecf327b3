"""Checkpoints on disk: NeoX's sharded layer files."""
