"""Errors that a person can act on: what was expected, what was found, what to do next, in one line."""

import difflib
from collections.abc import Collection, Iterable
from numbers import Real


class SaeItalianError(Exception):
    """Base of every error raised on purpose here."""

    exit_code = 1


class UsageError(SaeItalianError, ValueError):
    """Something the user can fix: a name, a key, a file, a folder. The command line says it in one line."""

    exit_code = 2


class DataError(UsageError):
    """A file on disk does not say what its manifest, its header or its neighbour says."""


def check_whole(least: int, **given: object) -> None:
    """Raise UsageError for a setting that is below `least`, or no whole number; None is none given."""
    for name, value in given.items():
        if value is not None and not (isinstance(value, Real) and not value < least and value % 1 == 0):
            raise UsageError(f"{name} is {value!r}; it must be {least} or more, a whole number.")


def check_known(what: str, known: Collection[str], *given: object) -> None:
    """Raise UsageError, with the nearest one, for the first name given that is not among the known ones."""
    for name in given:
        if name not in list(known):  # what cannot be hashed is asked for too
            raise UsageError(f"{what} {name!r:.80} is unknown. {nearest(name, known)}")


def nearest(name: object, options: Iterable[str], limit: int = 8) -> str:
    """Return the end of an error message: the nearest valid name, or the valid ones when none is near."""
    known = {option.lower(): option for option in options}
    if matches := difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.5):
        return f"Did you mean {known[matches[0]]!r}?"
    shown = ", ".join(list(known.values())[:limit]) + (", ..." if len(known) > limit else "")
    return f"Valid: {shown}."
