"""Programs that made something: gdino-nano and its parts, and the scenes that prove that words drive detection."""
