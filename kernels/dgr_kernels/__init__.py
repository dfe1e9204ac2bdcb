"""Attention over packed and prefix-shared rows, and token scores without logits. Depends on JAX and jaxtyping alone.

The two operations are `dgr_kernels.attention` and `dgr_kernels.token_scores`; here is what belongs to both.
"""

from dgr_kernels.dispatch import IMPLEMENTATIONS, KERNELS
from dgr_kernels.partition import Partition

__all__ = ["IMPLEMENTATIONS", "KERNELS", "Partition"]
