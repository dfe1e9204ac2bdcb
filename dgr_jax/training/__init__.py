"""Supervised fine-tuning: recipe, batches, the loop, its checkpoints and metrics."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
