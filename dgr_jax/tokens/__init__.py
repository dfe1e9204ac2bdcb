"""Traces as token ids, token ids as the rows of a batch, and tokens as text for people."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
