"""From a command line to running processes: what to start, where, and how it ended."""
