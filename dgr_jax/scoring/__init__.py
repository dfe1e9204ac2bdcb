"""The jitted log-likelihood scorer: traces in, log-probabilities of their response tokens out."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
