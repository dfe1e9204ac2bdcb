"""Several hosts in one run: each feeds its own devices, and one of them writes.

All processes run the same program on the same inputs, as JAX asks of them: every one reads and plans everything, and
moves to its devices only what they hold.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dgr_jax.errors import UserError


def join(spec: str) -> None:
    """Joins this process with those of the other hosts. Must come before JAX is asked for a device.

    Args:
      spec: "auto", where JAX finds the hosts itself (a TPU pod, Slurm, Open MPI), or "ADDRESS:PORT,COUNT,INDEX".

    Raises:
      UserError: neither of the two, or nobody answers.
    """
    given: dict[str, Any] = {}
    if spec != "auto":
        address, *numbers = spec.split(",")
        if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or not address.rpartition(":")[2].isdecimal():
            raise UserError(f"--hosts={spec}: give auto, or ADDRESS:PORT,COUNT,INDEX such as 10.0.0.1:8476,2,0")
        count, index = map(int, numbers)
        if index >= count:
            raise UserError(f"--hosts={spec}: the index counts from 0 and must be below {count}")
        given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--hosts={spec}: {error}") from error


def several() -> bool:
    """Whether this process is one of several. Asks JAX for its devices only if it is."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def writes() -> bool:
    """Whether this process is the one that writes files and speaks to people."""
    return not several() or jax.process_index() == 0


def from_writer[T](work: Callable[[], T]) -> T:
    """What `work` returns in the process that writes, for all of them; nobody else calls it.

    Args:
      work: returns a JSON value.

    Raises:
      UserError: what `work` raised, in all processes.
    """
    if not several():
        return work()
    outcome: dict[str, Any] = {}
    if writes():
        try:
            outcome["value"] = work()
        except UserError as error:
            outcome["error"] = str(error)
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = text if writes() else np.zeros(size, np.uint8)
    outcome = json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer)))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def abandon(error: BaseException) -> None:
    """Ends this process at once if it is one of several: they would wait for it at their next step.

    Their runtime notices that it is gone and ends them, too.
    """
    if not several():
        return
    status = error.code if isinstance(error, SystemExit) else 1
    if status in (None, 0):  # an ordinary end, in which processes wait for each other
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
