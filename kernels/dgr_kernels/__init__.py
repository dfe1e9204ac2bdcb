"""Attention over packed and prefix-shared rows, and token scores without logits. Depends on JAX alone."""

from dgr_kernels.dispatch import IMPLEMENTATIONS, KERNELS
from dgr_kernels.partition import Partition

__all__ = ["IMPLEMENTATIONS", "KERNELS", "Partition"]
