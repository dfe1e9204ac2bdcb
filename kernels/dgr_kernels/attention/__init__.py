"""Attention with three integers of visibility per token."""

from dgr_kernels.attention.api import attention, attention_and_log_sum_exp, prepare
from dgr_kernels.attention.cached import cached_attention
from dgr_kernels.attention.tiles import TileCount, Tiles, TileShape, count_tiles
from dgr_kernels.attention.visibility import Visibility

__all__ = [
    "TileCount",
    "TileShape",
    "Tiles",
    "Visibility",
    "attention",
    "attention_and_log_sum_exp",
    "cached_attention",
    "count_tiles",
    "prepare",
]
