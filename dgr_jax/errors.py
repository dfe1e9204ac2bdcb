"""The one exception that means "the input is wrong, not the program"."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence


class UserError(ValueError):
    """Something the user can mend: a file, a setting, a model folder.

    The message is one line that names the place, says what was found and what to do next. Settings stand in it by
    their names in backticks, such as `max_length`: an argument for whoever calls the library, and for the commands,
    which print the message without a traceback and exit with status 1, the flag of that name.

    A message quotes somebody's file or server: it is made one line, what a terminal would not print is spelt out, and
    of one that is too long the beginning and the end, where the advice is, are kept.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.splitlines()))
        cut = len(line) > _LONGEST
        super().__init__(f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}" if cut else line)


_LONGEST = 800
"""Characters of a message."""


def reason_of(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(problems: Sequence[str]) -> str:
    """The first of some problems, and how many more there are, in one line."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def shown(value: object) -> str:
    """A value as a message shows it: ASCII, and not too long."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def in_range(value: object, least: float, most: float) -> bool:
    """Whether a value is a number from `least` to `most`: a whole one, where `least` is an int."""
    kinds = int if isinstance(least, int) else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turns a device's lack of memory, when a program is compiled for it or runs, into a `UserError` with advice."""
    try:
        yield
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device has too little memory: {reason_of(error)[:200]}; {advice}") from error


def shortage(error: BaseException) -> tuple[str, str] | None:
    """What the machine has run out of, in the system's words, and what to do; None for other errors."""
    number = getattr(error, "errno", None)
    if number is None and (told := _TOLD.search(str(error))):
        number = int(told[1])
    return (os.strerror(number), _ADVICE[number]) if number in _ADVICE else None


_TOLD = re.compile(r"os[_ ]error(?:_code=')? ?(\d+)")
"""How TensorStore and safetensors, which write by themselves, pass on the system's number."""
_ROOM = "free space there, and run the same command again: it goes on from what it has written"
_FILES = "raise the limit of open files (ulimit -n 4096), and run the same command again"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FILES),
    errno.EROFS: "give a writable folder",
}


@contextlib.contextmanager
def foreign(found: str, advice: str) -> Iterator[None]:
    """Whatever a library raises over a file becomes a `UserError`: "`found` (reason); `advice`".

    Parsers of foreign formats fail in any way there is, those written in Rust with a panic that is no `Exception`. A
    `shortage` has its own advice.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason, advice = shortage(error) or (reason_of(error), advice)
        raise UserError(f"{found} ({reason}); {advice}") from error
