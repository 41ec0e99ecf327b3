"""What a run needs, before it runs: memory, messages, time; no device is touched."""
