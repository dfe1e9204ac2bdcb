"""Work that goes on beside the caller's."""

import collections
import concurrent.futures
from collections.abc import Generator
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
