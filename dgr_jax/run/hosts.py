"""Several hosts in one run: each feeds its own devices, and the first of them writes.

All processes run the same program on the same inputs, as JAX asks of them: every one reads and plans everything, and
moves to its devices only what they hold.
"""

import contextvars
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dgr_jax.errors import UserError, reason_of

_PATIENCE = 300.0
"""Seconds that a host waits for the first one to be there; JAX's own limit for the others."""


_by_itself = contextvars.ContextVar("by_itself", default=False)
"""Whether this process does something that the others do not do with it."""


def join(spec: str, patience: float = _PATIENCE) -> None:
    """Joins this process with those of the other hosts. Must come before JAX is asked for a device.

    A first host that waits in vain for the others is ended by JAX's runtime, with its own words.

    Args:
      spec: "auto", where JAX finds the hosts itself (a TPU pod, Slurm, Open MPI), or "ADDRESS:PORT,COUNT,INDEX".
      patience: seconds to wait for the first host.

    Raises:
      UserError: neither of the two, no cluster found, or the first host does not answer.
    """
    given: dict[str, Any] = {}
    if spec != "auto":
        address, *numbers = spec.split(",")
        host, _, port = address.rpartition(":")
        if len(numbers) != 2 or not all(number.isdecimal() for number in (*numbers, port)) or not host:
            raise UserError(f"`hosts` {spec}: give auto, or ADDRESS:PORT,COUNT,INDEX such as 10.0.0.1:8476,2,0")
        count, index = map(int, numbers)
        if index >= count:
            raise UserError(f"`hosts` {spec}: the index counts from 0 and must be below {count}")
        given = {"coordinator_address": address, "num_processes": count, "process_id": index}
        if index:
            _wait_for(host, int(port), patience)
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        hint = "no cluster was found here; give ADDRESS:PORT,COUNT,INDEX" if spec == "auto" else str(error)
        raise UserError(f"`hosts` {spec}: {hint}") from error
    jax.devices()  # all hosts meet here, while nothing has been read that could take them unequal time


def _wait_for(host: str, port: int, patience: float) -> None:
    """Returns when somebody listens there: JAX's own client would end the process after a wait in vain."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"`hosts`: the first host does not answer at {host}:{port} ({error}); start the command there, and "
                    "see that this machine can reach it"
                ) from error
            time.sleep(0.5)


def several() -> bool:
    """Whether this process is one of several that do the same. Asks JAX for its devices only then."""
    return not _by_itself.get() and jax.distributed.is_initialized() and jax.process_count() > 1


def writes() -> bool:
    """Whether this process is the one that writes files."""
    return not several() or jax.process_index() == 0


def takes(number: int) -> bool:
    """Whether the piece of work of that number is this process' own, of those that are dealt out in turn."""
    return not several() or number % jax.process_count() == jax.process_index()


def from_writer[T](work: Callable[[], T]) -> T:
    """What `work` returns in the process that writes, for all of them; nobody else calls it.

    Within it there are no other hosts.

    Args:
      work: returns a JSON value.

    Raises:
      UserError: what `work` raised, in all processes.
    """
    if not several():
        return work()
    outcome: dict[str, Any] = {}
    if writes():
        token = _by_itself.set(True)
        try:
            outcome["value"] = work()
        except UserError as error:
            outcome["error"] = str(error)
        finally:
            _by_itself.reset(token)
    outcome = json.loads(_gather(json.dumps(outcome))[0])
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def together[T](work: Callable[[], T]) -> T:
    """What `work` returns here, once it has returned everywhere.

    Raises:
      UserError: what `work` raised in any process, in all of them.
    """
    if not several():
        return work()
    value, error = None, ""
    try:
        value = work()
    except UserError as raised:
        error = str(raised)
    said = _gather(error)
    if failed := [index for index, text in enumerate(said) if text]:
        raise UserError(("" if all(said) else f"host {failed[0]}: ") + said[failed[0]])
    return value  # pyright: ignore[reportReturnType]


def most(number: int) -> int:
    """The largest of the numbers that the processes call this with, in all of them."""
    return max(map(int, _gather(str(number)))) if several() else number


def least(number: int) -> int:
    """The smallest of the numbers that the processes call this with, in all of them."""
    return -most(-number)


def check_equal(facts: Mapping[str, Any]) -> None:
    """Compares what the processes were given: rows of different inputs would be mixed in one batch.

    Args:
      facts: name -> JSON value.

    Raises:
      UserError: a host differs from the first; in all processes.
    """
    if not several():
        return
    first, *others = map(json.loads, _gather(json.dumps(facts)))
    for index, other in enumerate(others, start=1):
        for name in first:
            if first[name] != other[name]:
                raise UserError(
                    f"host {index}: {name} is {other[name]}, and {first[name]} on the first host; all hosts take the "
                    "same command, files and versions"
                )


def _gather(text: str) -> list[str]:
    """The texts of all processes, by index."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.pad(data, (0, int(sizes.max()) + 1 - len(data)))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


_OF_ANOTHER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket closed|heartbeat|coordination service", re.IGNORECASE
)
"""What JAX's runtime says of hosts that do not answer."""


def _tells_of_another(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and _OF_ANOTHER.search(str(error)) is not None


def abandon(error: BaseException) -> None:
    """Ends this process at once if it is one of several: they would wait for it at their next step.

    Their runtime notices that it is gone and ends them, too.
    """
    if not several():
        return
    status = error.code if isinstance(error, SystemExit) else 1
    if status in (None, 0):  # an ordinary end, in which processes wait for each other
        return
    if _tells_of_another(error):
        here, reason = f"host {jax.process_index()} of {jax.process_count()}", reason_of(error)
        advice = "see there why, and run the same command on all hosts to go on"
        print(f"error: {here}: another host is gone ({reason}); {advice}", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
