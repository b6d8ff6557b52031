"""User errors and warnings, each one line that names the cause and the remedy."""
import difflib
import os
import re
import sys
from functools import lru_cache
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print its one line and exit with code 2."""


@lru_cache
def warn_once(note):
    """Print one line on stderr, but only once, whatever the number of seeds and loads."""
    print(f"warning: {note}", file=sys.stderr)


def nearest(word, known):
    """` (did you mean 'x'?)`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def brief(error):
    """An exception in one short line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(re.sub("<[^>]*>", "", text).split())        # without an object's address
    return text if len(text) <= 120 else f"{text[:120].rpartition(' ')[0]} ..."


def expand(path):
    """An absolute path, with ~ expanded; UserError if the working directory is gone."""
    path = os.path.expanduser(path)
    try:
        return Path(path).absolute()
    except FileNotFoundError:
        raise UserError(f"{path} is relative to the working directory, which no longer exists: "
                        "change to another directory") from None
