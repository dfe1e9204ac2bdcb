"""Ctrl-C and SIGTERM: long work ends at its next border, where nothing is lost; asked a second time, at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dgr_jax.run import hosts

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class Stopped(KeyboardInterrupt):
    """Somebody asked the process to end.

    Attributes:
      signal: which way, signal.SIGINT or signal.SIGTERM.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


def stop_on_sigterm() -> None:
    """Lets SIGTERM end this process as Ctrl-C does: by an exception, so that what is open is closed."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def at_borders(name: str) -> Iterator[Callable[[], bool]]:
    """Holds the first signal back until the work in the context is at a border.

    Outside the main thread, and for a signal that the process ignores, nothing changes.

    Args:
      name: what ends at a border, such as "step", for the line that says that the signal was heard.

    Yields:
      Whether somebody asked; on several hosts, any of them, and all must call it at the same border. The caller saves
      what it has and leaves the context, which then raises.

    Raises:
      Stopped: a signal was held back.
    """
    asked: list[int] = []

    def listen(number: int, frame: FrameType | None) -> None:
        if asked:
            raise Stopped(number)
        asked.append(number)
        # Not by print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(_STDERR, f"\nstopping after this {name}; once more stops at once\n".encode())

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, listen)
    try:
        yield lambda: bool(hosts.most(asked[0] if asked else 0))
    except Exception as error:  # what goes wrong in the last moment will do so again
        if asked:
            raise Stopped(asked[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if number := hosts.most(asked[0] if asked else 0):
        raise Stopped(number)
