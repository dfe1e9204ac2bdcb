"""Text from a model: the engine that everything asks, the built-in sampler, and OpenAI-compatible servers."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
