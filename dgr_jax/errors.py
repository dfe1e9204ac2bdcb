"""The one exception that means "the input is wrong, not the program"."""


class UserError(ValueError):
    """Something the user can mend: a file, a setting, a model folder.

    The message is one line that names the place, says what was found and what to do next. Settings stand in it by
    their names in backticks, such as `max_length`: an argument for whoever calls the library, and for the commands,
    which print the message without a traceback and exit with status 1, the flag of that name.
    """


def reason_of(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
