"""One decoder for Qwen2, Qwen3, Llama and Mistral, with its weights in and out of Hugging Face folders."""

from dgr_jax import offer

__getattr__, __dir__ = offer(__name__)
