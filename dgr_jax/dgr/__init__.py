"""The paper: ask the target model for a rewrite, filter it, fall back to the original, and measure the shift."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
