"""A study: arms and seeds, each refined, fine-tuned and evaluated, held against the paper's claims in a report."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
