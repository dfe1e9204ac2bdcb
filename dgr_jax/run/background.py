"""Work that goes on beside the caller's."""

import queue
import threading
from collections.abc import Generator

_PATIENCE = 0.1


def in_background[Item](items: Generator[Item], ahead: int) -> Generator[Item]:
    """The items of a generator that runs in a thread of its own.

    Args:
      items: closed when its items, or their reader, come to an end.
      ahead: items that may wait to be read.

    Raises:
      Exception: whatever `items` raises, after the items before it.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(ahead)
    abandoned = threading.Event()

    def put(item: Item | None, error: BaseException | None = None) -> None:
        while not abandoned.is_set():
            try:
                return ready.put((item, error), timeout=_PATIENCE)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if abandoned.is_set():
                    break
            put(None, StopIteration())
        except BaseException as error:  # for the reader to raise
            put(None, error)
        finally:
            items.close()

    thread = threading.Thread(target=work, name="background", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # pyright: ignore[reportReturnType]
    finally:
        abandoned.set()
        thread.join()
