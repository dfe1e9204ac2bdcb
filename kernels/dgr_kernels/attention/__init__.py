"""Attention with three integers of visibility per token."""

from dgr_kernels.attention.api import attention, prepare
from dgr_kernels.attention.tiles import Blocks, TileCount, count_tiles
from dgr_kernels.attention.visibility import Visibility

__all__ = ["Blocks", "TileCount", "Visibility", "attention", "count_tiles", "prepare"]
