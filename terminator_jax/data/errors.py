"""The error for what a user can put right."""


class InputError(ValueError):
    """What was asked for cannot be done; the message is one line that says what to do instead.

    The commands print it and exit with status 2, without a traceback.
    """
