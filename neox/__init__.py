"""GPT-NeoX: one configuration language, one model definition, from laptop to cluster."""
