"""Names and texts as a terminal may show them."""

from __future__ import annotations


def words(name: str) -> str:
    """The name of a figure or a setting in words."""
    return name.replace("_", " ")


def printable(text: str) -> str:
    """`text` with control characters spelled out: a file's name must not drive the terminal, and a line stays one line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
