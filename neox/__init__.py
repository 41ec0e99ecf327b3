"""GPT-NeoX: one configuration language, one model definition, from laptop to cluster."""

__version__ = "0.1.0"
