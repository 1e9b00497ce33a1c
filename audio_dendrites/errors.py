"""The error that a program shows as one line, and how each program runs."""

import logging
import sys
from collections.abc import Callable

from tqdm.contrib.logging import logging_redirect_tqdm


class UserError(ValueError):
    """Something that the user wrote, named or runs on is wrong. The message says what to change."""


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
