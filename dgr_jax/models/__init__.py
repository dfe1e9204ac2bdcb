"""Decoders of the target models, with weights in and out of Hugging Face format."""

from dgr_jax.models.config import Llama3Scaling, ModelConfig
from dgr_jax.models.decoder import Decoder, KVCache, init_model
from dgr_jax.models.weights import from_pretrained, save_pretrained

__all__ = ["Decoder", "KVCache", "Llama3Scaling", "ModelConfig", "from_pretrained", "init_model", "save_pretrained"]
