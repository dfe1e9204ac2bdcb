"""Evaluation: suites of prompts, graders of answers, judges of refusals, and intervals around their rates."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
