"""What a conversion raises."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted: the message names the key or the file, and the remedy; nothing was written."""
