"""The one exception that means "the input is wrong, not the program"."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user can mend: a file, a setting, a model folder.

    The message is one line that names the place, says what was found and what to do next. Settings stand in it by
    their names in backticks, such as `max_length`: an argument for whoever calls the library, and for the commands,
    which print the message without a traceback and exit with status 1, the flag of that name.
    """


def reason_of(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(value: object) -> str:
    """A value as a message shows it: ASCII, and not too long."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def foreign(found: str, advice: str) -> Iterator[None]:
    """Whatever a library raises over somebody else's file becomes a `UserError`: "`found` (reason); `advice`".

    Parsers of foreign formats fail in any way there is, those written in Rust with a panic that is no `Exception`.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{found} ({reason_of(error)}); {advice}") from error
