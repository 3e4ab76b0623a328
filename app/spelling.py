"""What somebody who misspelt a word most likely meant."""

import difflib
from collections.abc import Iterable

_CLOSE = 0.7


def meant(word: object, known: Iterable[str]) -> str:
    """Give the end of a sentence that names the word nearest to this one; empty if none is near."""
    close = difflib.get_close_matches(str(word).lower(), known, n=1, cutoff=_CLOSE)
    return f"; did you mean {close[0]}?" if close else ""
