"""What went wrong, said to the person who can mend it: one sentence that names the file, the key, the value and the fix."""

from __future__ import annotations

import functools
import logging


class IqliteError(Exception):
    """A message for the user. The command line prints it and exits with code 2; nothing else catches it."""


class RecipeError(IqliteError):
    """The recipe, or a `--set` beside it, can't be used as it stands."""


class PromptsError(IqliteError):
    """A prompt file or data set can't be read, or holds nothing to train on."""


class BaseError(IqliteError):
    """The base model can't be had, can't be read, or isn't supported."""


class AdapterError(IqliteError):
    """An adapter is missing, broken, or belongs to another base."""


class RunError(IqliteError):
    """The run directory can't be written, exists already, or doesn't fit the recipe that resumes it."""


class AimError(IqliteError):
    """The target points the wrong way: training would take away what it should give."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, without a final full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@functools.lru_cache(maxsize=1024)
def warn(text: str) -> None:
    """Tells the user, once, of something that went wrong and was survived: a sentence through Python's logging, under the name iqlite."""
    logging.getLogger("iqlite").warning(text)
