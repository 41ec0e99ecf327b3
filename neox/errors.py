"""Errors a user can put right. Entry points print them as `error: <message>` and exit with status 2."""


class NeoXError(Exception):
    """Base of every error that is the input's fault; its text says what, the numbers, what to do."""


class ConfigError(NeoXError):
    """The configuration or the command line is wrong."""


class CheckpointError(NeoXError):
    """A checkpoint is missing, damaged, or does not fit the configuration."""


class DataError(NeoXError):
    """A dataset, tokenizer file or prompt file is missing, damaged, or unusable."""
