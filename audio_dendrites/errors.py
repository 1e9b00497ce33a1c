"""The errors that a program shows as one line, without a traceback."""


class UserError(ValueError):
    """Something that the user wrote, named or runs on is wrong. The message says what to change."""
