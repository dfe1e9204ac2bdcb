"""Compiling for accelerators that are not here; run by `make check-hardware`.

libtpu and the CUDA plugin hold real compilers, and a description of a device is all that they need.
"""

import os

# libtpu asks a metadata server what it runs on, unless it is told; no GPU must be looked for.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    CUDA_VISIBLE_DEVICES="-1",
)
