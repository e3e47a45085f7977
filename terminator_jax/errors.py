"""The error for what a user can put right."""


class InputError(ValueError):
    """Says in one line what cannot be done, and what to do instead.

    The commands print it and exit with status 2, without a traceback.
    """
