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


def as_they_come[Item, Found](
    work: Callable[[Item], Found],
    items: Sequence[Item],
    at_a_time: int,
    again: Callable[[Found], Item | None] = lambda _: None,
) -> Generator[Found]:
    """What `work` finds, in the order in which it is found.

    Nobody waits for its threads: a reader that leaves, or an error, leaves behind what they are doing.

    Args:
      work: called in threads.
      items: what it is called with.
      at_a_time: calls under way at a time.
      again: what else to call it with after something was found, or None; called here, before that comes out.

    Raises:
      BaseException: the first that `work` raises.
    """
    left: queue.LifoQueue[Item | None] = queue.LifoQueue()  # what is called again comes first
    found: queue.SimpleQueue[tuple[Found | None, BaseException | None]] = queue.SimpleQueue()
    for item in reversed(items):
        left.put(item)

    def serve() -> None:
        while (item := left.get()) is not None:
            try:
                found.put((work(item), None))
            except BaseException as error:
                found.put((None, error))

    threads, under_way = min(at_a_time, len(items)), len(items)
    for _ in range(threads):
        threading.Thread(target=serve, daemon=True).start()
    try:
        while under_way:
            value, error = found.get()
            if error is not None:
                raise error
            more = again(value)  # pyright: ignore[reportArgumentType]
            if more is None:
                under_way -= 1
            else:
                left.put(more)
            yield value  # pyright: ignore[reportReturnType]
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                left.get_nowait()
        for _ in range(threads):
            left.put(None)
