"""What an error says, and does not."""

import errno
import math

import pytest

from dgr_jax.errors import UserError, foreign, in_range, reason_of, shortage, shown


def test_a_message_keeps_its_beginning_and_its_advice():
    assert str(UserError("x is 3; give 4")) == "x is 3; give 4"
    assert str(UserError("two\nlines, \x1b[31m and \ud800")) == r"two lines, \x1b[31m and \ud800"
    long = str(UserError(f"x is {'9' * 5000}; give 4"))
    assert long.startswith("x is 999") and long.endswith("; give 4") and " [...] " in long and len(long) < 820


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space there"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; raise the limit of open files"),
        (OSError(errno.ENOENT, "No such file"), None),
        (ValueError("Error writing local file [os_error_code='28']"), "No space left on device; free space there"),
        (ValueError("I/O error: No space left on device (os error 28)"), "No space left on device; free space there"),
        (ValueError("shapes differ"), None),
    ],
)
def test_what_a_machine_has_run_out_of(error: Exception, said: str | None):
    found = shortage(error)
    assert said is None if found is None else "; ".join(found).startswith(str(said))


def test_ranges_tell_whole_numbers_from_others():
    assert in_range(3, 1, 5) and in_range(3, 1.0, 5.0) and in_range(0.5, 0.0, 1.0)
    assert not any(in_range(value, 1, 5) for value in (0, 6, 2.0, True, None, "3", math.nan))


class PanicException(BaseException):
    """As Rust's panics come."""


def test_what_libraries_raise_is_one_line_with_advice():
    with pytest.raises(UserError, match=r"^cannot read x \(first line\); fetch it again$"):
        with foreign("cannot read x", "fetch it again"):
            raise PanicException("first line\nsecond")
    with pytest.raises(UserError, match=r"^cannot write x \(No space left on device\); free space there, and run"):
        with foreign("cannot write x", "give another folder"):
            raise OSError(errno.ENOSPC, "no")
    with pytest.raises(KeyboardInterrupt), foreign("x", "y"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="^its own$"), foreign("x", "y"):
        raise UserError("its own")


def test_values_are_shown_short_and_in_ascii():
    assert shown("naïve") == "'na\\xefve'" and len(shown("x" * 500)) == 60 and reason_of(ValueError()) == "ValueError"
