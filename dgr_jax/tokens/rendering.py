"""Traces -> tokens, in worker processes where tokenising would keep a device waiting."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence

from dgr_jax.data.trace import Trace
from dgr_jax.tokens.chat import ChatFormat, Rendered

_GRACE = 60
"""Seconds that a worker goes on after SIGTERM."""
_CHUNK = 64
"""Traces that travel to a worker together."""

_chat: ChatFormat | None = None
"""A worker's own."""


def render_all(chat: ChatFormat, traces: Iterable[Trace], workers: int) -> Iterator[tuple[Trace, Rendered]]:
    """Each trace with its tokens, in order.

    Args:
      chat: how they are rendered.
      traces: any number; read a few chunks ahead.
      workers: processes; 0 renders here.

    Raises:
      UserError: a trace that cannot be rendered, as `ChatFormat.render` says.
    """
    if not workers:
        for trace in traces:
            yield trace, chat.render(trace)
        return
    # Spawned, because a fork of a process with JAX's threads may hang.
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque[tuple[Sequence[Trace], concurrent.futures.Future[list[Rendered]]]] = collections.deque()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (chat,)) as pool:
        try:
            for chunk in itertools.batched(traces, _CHUNK):
                waiting.append((chunk, pool.submit(_render, chunk)))
                if len(waiting) > 2 * workers:
                    yield from _first(waiting)
            while waiting:
                yield from _first(waiting)
        finally:
            pool.shutdown(cancel_futures=True)


def _first(
    waiting: collections.deque[tuple[Sequence[Trace], concurrent.futures.Future[list[Rendered]]]],
) -> Iterator[tuple[Trace, Rendered]]:
    chunk, rendered = waiting.popleft()
    return zip(chunk, rendered.result(), strict=True)


def _start_worker(chat: ChatFormat) -> None:
    global _chat
    # A shell's Ctrl-C and a machine's shutdown reach us too, and are for the process that waits for us: it ends us when
    # it has what it needs, or is gone with its machine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE))
    _chat = chat


def _render(traces: Sequence[Trace]) -> list[Rendered]:
    assert _chat is not None
    return [_chat.render(trace) for trace in traces]
