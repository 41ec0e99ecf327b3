"""Errors a user can put right: printed as `error: <message>`, exit status 2, no traceback."""


class NeoXError(Exception):
    """Base of every error that is the input's fault: what, the numbers, what to do."""


class ConfigError(NeoXError):
    """The configuration or the command line is wrong."""


class CheckpointError(NeoXError):
    """A checkpoint is missing, damaged, or does not fit the configuration."""


class DamageError(CheckpointError):
    """A file of a checkpoint is missing, or is not as it was written."""


class DataError(NeoXError):
    """A dataset, tokenizer file or prompt file is missing, damaged, or unusable."""


class RequestError(NeoXError):
    """What a model is asked to generate cannot be: the prompt is too long, say."""


class DivergenceError(NeoXError):
    """The loss or a gradient is no number any more; to start again would come to the same."""
