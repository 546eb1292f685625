"""Errors that a person can act on: what was expected, what was found, what to do next, in one line."""

import difflib
from collections.abc import Iterable


class SaeItalianError(Exception):
    """Base of every error raised on purpose here."""

    exit_code = 1


class UsageError(SaeItalianError, ValueError):
    """Something the user can fix: a name, a key, a file, a folder. The command line prints it in one line."""

    exit_code = 2


class DataError(UsageError):
    """A file on disk does not say what its manifest, its header or its neighbour says."""


def nearest(name: str, options: Iterable[str], limit: int = 8) -> str:
    """Return the end of an error message: the nearest valid name, or the valid ones when none is near."""
    options = list(dict.fromkeys(options))
    lower = {option.lower(): option for option in options}
    matches = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)
    if matches:
        return f"Did you mean {lower[matches[0]]!r}?"
    shown = ", ".join(options[:limit]) + (", ..." if len(options) > limit else "")
    return f"Valid: {shown}."
