"""The parameters of a decoder, said once: shape, logical axes, initialiser and Hugging Face name.

Weights keep Hugging Face's orientation ([out, in]) and are only reshaped, so that loading streams slices of files
and a round trip is exact to the byte. Layer parameters are stacked on a leading axis L.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from dgr_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
      shape: in memory; layer parameters begin with L.
      axes: logical axis of each dimension (see `dgr_jax.models.sharding`).
      hf_name: name in the safetensors files, with "{layer}" where there is one tensor per layer.
      hf_shape: shape of one such tensor; a reshape away from `shape` (without L).
      initial: "normal", "ones" or "zeros"; of an adapter's A "fan_in".
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    hf_shape: tuple[int, ...]
    initial: str = "normal"

    @property
    def stacked(self) -> bool:
        """Whether one tensor per layer makes up this parameter."""
        return "{layer}" in self.hf_name


def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Name (with "layers." before what is stacked) -> spec, for exactly the parameters that `config` has."""
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    specs = {
        "embed": ParameterSpec((V, D), ("vocab", "embed"), "model.embed_tokens.weight", (V, D)),
        "final_norm": ParameterSpec((D,), ("norm",), "model.norm.weight", (D,), "ones"),
    }
    if config.labels:
        specs["score"] = ParameterSpec((config.labels, D), ("labels", "embed"), "score.weight", (config.labels, D))
    elif not config.tie_embeddings:
        specs["unembed"] = ParameterSpec((V, D), ("vocab", "embed"), "lm_head.weight", (V, D))

    def layer(name: str, shape: tuple[int, ...], axes: tuple[str, ...], hf: str, hf_shape=None, initial="normal"):
        hf_shape = shape if hf_shape is None else hf_shape
        assert math.prod(hf_shape) == math.prod(shape), name
        spec = ParameterSpec((L, *shape), ("layers", *axes), f"model.layers.{{layer}}.{hf}", hf_shape, initial)
        specs[f"layers.{name}"] = spec

    layer("attention_norm", (D,), ("norm",), "input_layernorm.weight", initial="ones")
    layer("q", (N, H, D), ("heads", "head", "embed"), "self_attn.q_proj.weight", (N * H, D))
    layer("k", (K, H, D), ("kv_heads", "head", "embed"), "self_attn.k_proj.weight", (K * H, D))
    layer("v", (K, H, D), ("kv_heads", "head", "embed"), "self_attn.v_proj.weight", (K * H, D))
    layer("o", (D, N, H), ("embed", "heads", "head"), "self_attn.o_proj.weight", (D, N * H))
    if config.qkv_bias:
        layer("q_bias", (N, H), ("heads", "head"), "self_attn.q_proj.bias", (N * H,), "zeros")
        layer("k_bias", (K, H), ("kv_heads", "head"), "self_attn.k_proj.bias", (K * H,), "zeros")
        layer("v_bias", (K, H), ("kv_heads", "head"), "self_attn.v_proj.bias", (K * H,), "zeros")
    if config.qk_norm:
        layer("q_norm", (H,), ("norm",), "self_attn.q_norm.weight", initial="ones")
        layer("k_norm", (H,), ("norm",), "self_attn.k_norm.weight", initial="ones")
    layer("mlp_norm", (D,), ("norm",), "post_attention_layernorm.weight", initial="ones")
    layer("gate", (F, D), ("ffn", "embed"), "mlp.gate_proj.weight")
    layer("up", (F, D), ("ffn", "embed"), "mlp.up_proj.weight")
    layer("down", (D, F), ("embed", "ffn"), "mlp.down_proj.weight")
    return specs


def overview(arrays: Mapping[str, jax.Array]) -> str:
    """A table for people of the arrays of a model: shape, dtype, how each is cut, and what a device has of it."""
    lines = [f"{'parameter':<24} {'shape':<24} {'dtype':<9} {'cut':<28} {'MiB a device':>12}"]
    numbers, held = 0, 0.0
    for name, array in arrays.items():
        numbers += array.size
        here = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize / 2**20
        held += here
        cut = getattr(array.sharding, "spec", None)
        cut = ", ".join("+".join(e) if isinstance(e, tuple) else e or "-" for e in cut) if cut else "whole"
        lines.append(f"{name:<24} {list(array.shape)!s:<24} {array.dtype.name:<9} {cut:<28} {here:>12,.1f}")
    lines.append(f"{numbers:,} parameters, {held:,.1f} MiB a device")
    return "\n".join(lines)
