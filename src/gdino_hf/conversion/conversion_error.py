"""The exception for checkpoints that cannot be converted."""


class ConversionError(ValueError):
    """Raised when a checkpoint cannot be converted, before anything is written; the message names key or file."""
