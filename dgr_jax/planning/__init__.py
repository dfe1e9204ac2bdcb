"""What a run would take on a machine that is not here: memory, time and traffic, by the machine's own compiler."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
