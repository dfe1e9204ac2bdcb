"""Attention with three integers of visibility per token."""

from dgr_kernels.attention.api import attention
from dgr_kernels.attention.visibility import Visibility

__all__ = ["Visibility", "attention"]
