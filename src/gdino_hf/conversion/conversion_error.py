"""The exception for checkpoints that cannot be converted."""

from ..model.printable import printable


class ConversionError(ValueError):
    """Raised when a checkpoint cannot be converted, before anything is written; the message names key or file.

    Args:
        message: The sentence. Control characters in names from the checkpoint are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
