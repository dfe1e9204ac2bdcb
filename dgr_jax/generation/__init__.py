"""Text from a model: the engine that everything asks, the built-in sampler, and OpenAI-compatible servers."""
