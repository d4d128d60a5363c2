"""Text from outside, such as file names and message headers, made safe for a terminal and for one line."""

from __future__ import annotations


def printable(text: object) -> str:
    """The text with backslash escapes for what is not printable: line breaks, and what a terminal would obey."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in shown)
