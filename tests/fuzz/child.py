"""Runs the damaged inputs of one kind: python -m tests.fuzz.child KIND FIRST LAST

Prints the number of each case before it runs, and a JSON line for each that ends in anything but success or a
`UserError`. One number alone is a way to look at a case: its input stays in the folder that is named.
"""

import itertools
import json
import os
import pathlib
import random
import resource
import sys
import tempfile
import traceback

SEED = os.environ.get("FUZZ_SEED", "0")
MOST_BYTES = 2 << 30
"""What the cases of a process may take beyond what it has when they begin."""
LONGEST = 820
"""Characters of a message."""


def used_bytes() -> int:
    """Private memory of this process, as RLIMIT_DATA counts it."""
    (line,) = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) << 10


def main(name: str, first: int, last: int) -> None:
    """Runs cases `first` to before `last`."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from absl import logging

    from dgr_jax.errors import UserError
    from tests.fuzz.kinds import KINDS

    logging.set_verbosity(logging.FATAL)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f"fuzz_{name}_"))
    os.chdir(scratch)
    draw = KINDS[name](scratch)
    limit = used_bytes() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for number in range(first, last):
        print(number, flush=True)
        found = None
        try:
            draw(random.Random(f"{name}/{SEED}/{number}"))()
        except UserError as error:
            if not 10 < len(str(error)) < LONGEST or "\n" in str(error):
                found = f"no line of a fit length: {str(error)!r}"
            if isinstance(error.__cause__, MemoryError):
                found = traceback.format_exc()
        except BaseException:
            found = traceback.format_exc()
        if found:
            print(json.dumps([number, found]), flush=True)
    if last == first + 1:
        print(f"its input: {scratch}", file=sys.stderr)
    else:
        import shutil

        shutil.rmtree(scratch)


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    begin, end = [int(number) for number in itertools.islice([*numbers, int(numbers[0]) + 1], 2)]
    main(kind, begin, end)
