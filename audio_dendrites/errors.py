"""The error that a program shows as one line, and how each program runs."""

import logging
import sys
from collections.abc import Callable, Iterable

from tqdm.contrib.logging import logging_redirect_tqdm


class UserError(ValueError):
    """Something that the user wrote, named or runs on is wrong. The message says what to change."""


def listed(names: Iterable[object], most: int = 10) -> str:
    """Names for a message: `a, b, c`, or the first ones and the number of all: `a, b, … (527)`."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f", … ({len(names)})" if len(names) > most else "")


def run_program(main: Callable[[list[str]], None], *errors: type[Exception]) -> None:
    """Run a program with the words of its command line, and show its log.

    Args:
        main: The program.
        errors: Exceptions that are shown as one line without a traceback, beside UserError. The exit code is then 1.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("audio_dendrites").setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():  # the log appears above the bars
            main(sys.argv[1:])
    except (UserError, *errors) as error:
        sys.exit(f"error: {error}")
