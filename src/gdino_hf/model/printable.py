"""Text from outside, such as file names and labels, made safe to print in a terminal."""

import re
import unicodedata

# Control characters, direction marks and other invisible characters, lone surrogates, private use, line separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Invisible characters that scripts and emoji are written with.
_JOINERS = "\u200c\u200d"
# Line breaks, tabs, and the cursor's movements to the start of a line and to the line above, which tqdm writes.
_MOVEMENT = re.compile(r"([\n\r\t]|\x1b\[A)")


def printable(value: object, limit: int | None = None) -> str:
    r"""Return text without characters that a terminal would act on.

    A file name may hold escape sequences, which could move the cursor, clear the screen or set the window's title, and
    direction marks, which show "exe.gnp" as a PNG. Such characters are written as escapes: ESC becomes \x1b.

    Args:
        value: Text, path or bytes.
        limit: Longest text to return; longer text is cut and ends in "..."; None for any length.

    Returns:
        The text in one line.
    """
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def printable_lines(text: str) -> str:
    """Return text for a terminal with its line breaks, tabs and the movements of progress bars, and nothing else.

    Args:
        text: What a command prints.

    Returns:
        The text with other control characters written as escapes, as in `printable`.
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        piece if _MOVEMENT.fullmatch(piece) else printable(piece) for piece in _MOVEMENT.split(text) if piece
    )


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
