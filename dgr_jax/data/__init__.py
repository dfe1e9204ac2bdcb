"""Traces: the record, its files, and the published data sets that become it."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
