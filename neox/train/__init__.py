"""Training: the visible loop, its learning-rate schedule, when it saves, what it tells."""
