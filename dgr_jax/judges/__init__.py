"""Judges of answers to requests, harmful and harmless: phrases, and guard models that our own decoder runs."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
