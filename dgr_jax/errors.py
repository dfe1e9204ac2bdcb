"""The one exception that means "the input is wrong, not the program"."""


class UserError(ValueError):
    """Something the user can mend: a file, a flag, a model folder.

    The message is one line that names the place, says what was found and what to do next. Scripts print it
    without a traceback and exit with status 1; library callers catch it as a `ValueError`.
    """
