"""Work that goes on beside the caller's."""

import collections
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any


def in_background[Item](items: Generator[Item], ahead: int) -> Generator[Item]:
    """The items of a generator that runs in a thread of its own, a few of them ahead of their reader.

    Args:
      items: closed when its items, or their reader, come to an end.
      ahead: items that may wait to be read.

    Raises:
      Exception: whatever `items` raises, after the items before it.
    """
    end: Any = object()
    waiting: collections.deque[concurrent.futures.Future[Item]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1, "background") as thread:
        try:
            waiting.extend(thread.submit(next, items, end) for _ in range(ahead + 1))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item
        finally:
            for future in waiting:
                future.cancel()
            thread.submit(items.close).result()


def as_they_come[Item, Found](work: Callable[[Item], Found], items: Sequence[Item], at_a_time: int) -> Generator[Found]:
    """What `work` finds, in the order in which it is found.

    Nobody waits for its threads: a reader that leaves, or an error, leaves behind what they are doing.

    Args:
      work: called in threads.
      items: what it is called with.
      at_a_time: calls under way at a time.

    Raises:
      BaseException: the first that `work` raises.
    """
    left: queue.SimpleQueue[Item] = queue.SimpleQueue()
    found: queue.SimpleQueue[tuple[Found | None, BaseException | None]] = queue.SimpleQueue()
    for item in items:
        left.put(item)

    def serve() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                item = left.get_nowait()
                try:
                    found.put((work(item), None))
                except BaseException as error:
                    found.put((None, error))

    for _ in range(min(at_a_time, len(items))):
        threading.Thread(target=serve, daemon=True).start()
    try:
        for _ in items:
            value, error = found.get()
            if error is not None:
                raise error
            yield value  # pyright: ignore[reportReturnType]
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                left.get_nowait()
