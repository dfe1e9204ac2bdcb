"""One decoder for Qwen2, Qwen3, Llama and Mistral, as a Flax NNX module with its layers stacked.

Axis letters: B batch, T queries, S cache slots, N query heads, K kv heads, H head dim, D model, F feed-forward,
V vocabulary, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dgr_kernels import Partition
from dgr_kernels.attention import Visibility, attention, cached_attention, prepare
from flax import nnx

from dgr_jax.models.adapter import Adapter, Lora, dropped, merged_weight, side_names
from dgr_jax.models.cache import KVCache
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.parameters import parameter_specs
from dgr_jax.models.sharding import pinned

_UNROLLED_LAYERS = 8
_FEW_ROWS = 64
"""Rows up to which a CPU multiplies weights by activations, not activations by weights: see `linear`."""


class Layers(nnx.Module):
    """The parameters of all layers, each stacked on a leading axis L."""

    def __init__(self, parameters: dict[str, jax.Array]):
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))


class Decoder(nnx.Module):
    """Tokens to hidden states.

    Args:
      config: the architecture.
      parameters: arrays by the names of `parameter_specs(config)`, all of one dtype.
      partition: how rows, heads and vocabulary lie on a mesh; None on a single device.
      implementation: of attention and token scores, as `dgr_kernels` names them; None for the device's default.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict[str, jax.Array],
        *,
        partition: Partition | None = None,
        implementation: str | None = None,
    ):
        self.config, self.partition, self.implementation = config, partition, implementation
        self.embed = nnx.Param(parameters["embed"])
        self.final_norm = nnx.Param(parameters["final_norm"])
        if config.labels:
            self.score = nnx.Param(parameters["score"])
        elif not config.tie_embeddings:
            self.unembed = nnx.Param(parameters["unembed"])
        self.lora: Lora | None = None
        prefix = "layers."
        self.layers = Layers({k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)})

    @property
    def unembed_weight(self) -> jax.Array:
        """[V, D]; the embedding itself where the two are tied."""
        return self.embed[...].astype(self.dtype) if self.config.tie_embeddings else self.unembed[...]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations."""
        return self.final_norm[...].dtype

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """[B, T, D] embeddings of int32 [B, T] tokens, in the dtype of the calculation."""
        return self._pinned(self.embed[...][tokens].astype(self.dtype))

    def computing_in(self, dtype: str) -> "Decoder":
        """The model with its matrices in a dtype, for a forward pass whose gradient is wanted in the original one.

        The embedding stays as it is: its gradient is a sum over a batch's tokens, and bfloat16 cannot count beyond 256.
        """
        cast = jax.tree.map(lambda x: x.astype(dtype), self)
        cast.embed = nnx.Param(self.embed[...])
        return cast

    def with_adapter(self, adapter: Adapter, dropout_keys: jax.Array | None = None) -> "Decoder":
        """The model with an adapter beside its weights, which are shared.

        Args:
          adapter: of this architecture.
          dropout_keys: in training, a key of each layer, uint32 [L, 2]; None drops nothing.

        Raises:
          ValueError: there is one already.
        """
        if self.lora is not None:
            raise ValueError("the model has an adapter already; merge it first")
        beside = jax.tree.map(lambda x: x, self)
        for name, array in adapter.arrays.items():
            setattr(beside.layers, name, nnx.Param(array))
        if dropout_keys is not None:
            beside.layers.dropout_key = nnx.Param(dropout_keys)
        beside.lora = adapter.lora
        return beside

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that stands beside the weights."""
        if self.lora is None:
            return None
        names = [name for target in self.lora.targets for name in side_names(target)]
        return Adapter({name: getattr(self.layers, name)[...] for name in names}, self.lora)

    def merged(self) -> "Decoder":
        """The model with its adapter added to its weights; itself where it has none."""
        if self.lora is None:
            return self
        parameters = self.parameters()
        for target in self.lora.targets:
            weight = parameters[f"layers.{target}"]
            a, b = (getattr(self.layers, name)[...] for name in side_names(target))
            where = None if self.partition is None else weight.sharding
            merge = jax.jit(merged_weight, static_argnames="scale", out_shardings=where)
            parameters[f"layers.{target}"] = merge(weight, a, b, scale=self.lora.scale)
        return Decoder(self.config, parameters, partition=self.partition, implementation=self.implementation)

    def parameters(self) -> dict[str, jax.Array]:
        """All arrays but an adapter's, by the names of `parameter_specs(config)`."""
        return {
            name: getattr(self.layers if name.startswith("layers.") else self, name.removeprefix("layers."))[...]
            for name in parameter_specs(self.config)
        }

    def apart(self) -> "Decoder":
        """The model for `extend` alone: with each layer in arrays of its own on a single CPU, elsewhere as it is.

        XLA's CPU backend copies what it slices from a stack before it multiplies: 150 of the 350 ms of a step at 0.5B.
        The arrays are views of the same memory.
        """
        if self.partition is not None or jax.default_backend() != "cpu":
            return self
        apart = jax.tree.map(lambda x: x, self)
        stacks, structure = jax.tree.flatten(self.layers)
        layers = zip(*map(np.asarray, stacks), strict=True)
        apart.layers = nnx.List([jax.tree.unflatten(structure, map(jax.device_put, layer)) for layer in layers])
        return apart

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, visibility: Visibility, *, remat: bool = False
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          tokens, positions: int32 [B, T]; positions are RoPE's.
          visibility: of the T queries over T keys.
          remat: recompute each layer's activations in the backward pass.

        Returns:
          [B, T, D] in the weights' dtype.
        """
        rotation, mix = rope(self.config, positions), self._mixing(visibility)
        body = lambda x, layer: (self._layer(x, layer, rotation, mix)[0], None)  # noqa: E731
        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        x, _ = jax.lax.scan(body, self.embedded(tokens), self.layers, unroll=self._unroll)
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)

    def prefill(
        self, tokens: jax.Array, positions: jax.Array, visibility: Visibility
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Hidden states [B, T, D], and the keys and values of all layers, [L, B, T, K, H] each."""
        rotation, mix = rope(self.config, positions), self._mixing(visibility)
        body = lambda x, layer: self._layer(x, layer, rotation, mix)  # noqa: E731
        x, kept = jax.lax.scan(body, self.embedded(tokens), self.layers, unroll=self._unroll)
        return rms_norm(x, self.final_norm[...], self.config.norm_eps), kept

    def extend(self, tokens: jax.Array, at: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """A decoding step: one token more in each row.

        Args:
          tokens: int32 [B].
          at: int32 [B], each token's position, which is its slot in the cache as well.
          cache: keys and values of what comes before.

        Returns:
          Hidden states [B, D] after the final norm, and the cache with the tokens in it.
        """
        rotation = rope(self.config, at[:, None])

        def step(carry: tuple[jax.Array, KVCache], layer_and_index: tuple[Any, jax.Array]):
            x, cache = carry
            layer, index = layer_and_index

            def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache]:
                more = cache.with_token(index, at, k[:, 0], v[:, 0])
                mixed = cached_attention(q[:, 0], more.k, more.v, index, at + 1, heads_first=more.heads_first)
                return mixed[:, None], more

            return self._layer(x, layer, rotation, mix), None

        carry = (self.embedded(tokens[:, None]), cache)
        indices = jnp.arange(self.config.num_layers)
        if isinstance(self.layers, Layers):
            carry, _ = jax.lax.scan(step, carry, (self.layers, indices), unroll=self._unroll)
        else:
            for layer in zip(self.layers, indices, strict=True):
                carry, _ = step(carry, layer)
        x, cache = carry
        return rms_norm(x[:, 0], self.final_norm[...], self.config.norm_eps), cache

    def _pinned(self, x: jax.Array) -> jax.Array:
        """[B, T, D] activations, each row on the device that its batch's row is on."""
        return x if self.partition is None else pinned(x, ("batch", "length", "hidden"), self.partition.mesh)

    @property
    def _unroll(self) -> int:
        """Layers per scan step. A shallow model is unrolled: XLA's CPU backend then keeps residuals where they are
        made, instead of copying them into stacks (a training step of 5 layers took 1.1 s, scanned 1.5 s)."""
        return self.config.num_layers if self.config.num_layers <= _UNROLLED_LAYERS else 1

    def _mixing(self, visibility: Visibility) -> "_Mix[tuple[jax.Array, jax.Array]]":
        """Attention of T queries over as many keys, which are kept; the lists that all layers share are made once."""
        how = {"implementation": self.implementation, "partition": self.partition}
        heads = (self.config.num_heads, self.config.num_kv_heads)
        tiles = prepare(visibility, keys=visibility.own_start.shape[1], heads=heads, **how)
        return lambda q, k, v: (attention(q, k, v, visibility, tiles=tiles, **how), (k, v))

    def _layer[Kept](
        self, x: jax.Array, layer: Any, rotation: tuple[jax.Array, jax.Array], mix: "_Mix[Kept]"
    ) -> tuple[jax.Array, Kept]:
        config = self.config
        eps = config.norm_eps
        B, T, D = x.shape
        # Matmuls see rows [B T, ...]: XLA's CPU backend takes twice as long for a weight's gradient that is summed over
        # two axes (86 against 38 ms at [37 x 192, 192] x [512, 192] on two cores).
        normed = rms_norm(x, layer.attention_norm[...], eps).reshape(B * T, D)
        heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        q, k, v = (
            self._through(layer, name, normed).reshape(B, T, n, -1) for name, n in zip("qkv", heads, strict=True)
        )
        if config.qkv_bias:
            q, k, v = q + layer.q_bias[...], k + layer.k_bias[...], v + layer.v_bias[...]
        if config.qk_norm:
            q, k = rms_norm(q, layer.q_norm[...], eps), rms_norm(k, layer.k_norm[...], eps)
        mixed, kept = mix(rotate(q, rotation), rotate(k, rotation), v)
        x = x + self._through(layer, "o", mixed.reshape(B * T, -1)).reshape(x.shape)
        normed = rms_norm(x, layer.mlp_norm[...], eps).reshape(B * T, D)
        gate, up = self._through(layer, "gate", normed), self._through(layer, "up", normed)
        x = x + self._through(layer, "down", gated(gate, up)).reshape(x.shape)
        return self._pinned(x), kept

    def _through(self, layer: Any, name: str, x: jax.Array) -> jax.Array:
        """[rows, in] through a weight, and through what an adapter has beside it: [rows, out]."""
        out = linear(x, getattr(layer, name)[...])
        if self.lora is None or name not in self.lora.targets:
            return out
        a, b = (getattr(layer, side)[...] for side in side_names(name))
        if hasattr(layer, "dropout_key"):
            x = dropped(x, layer.dropout_key[...], name, self.lora.dropout)
        return out + (self.lora.scale * linear(linear(x.astype(a.dtype), a), b)).astype(out.dtype)


type _Mix[Kept] = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Kept]]
"""From q, k and v: what attention makes of them [B, T, N, H], and what is to be kept."""


def linear(x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """[rows, in] times a weight whose last axes make up `in`: [rows, out], in x's dtype unless another is said.

    Of few float32 rows a CPU takes the product the other way round: its matmul packs whatever stands second, and the
    weights are by far the larger (16 rows by [4864, 896]: 2.6 ms, the other way 1.4; a single row 3.0 and 0.6; from 64
    on it is the same). The barrier keeps XLA from turning it back. Of bfloat16 it has a matmul that is twice as fast as
    float32's, for two rows and more (by [151936, 896], one row: 181 ms, with a row of zeros 20).
    """

    # Two dimensions, because XLA turned whole stacks of weights with more for a TPU; made within a checkpoint, because
    # a scan over layers would keep a copy of each flat weight for the gradient; the weight's last axis is named, and
    # not turned first, because the CPU's matmul for bfloat16 does not see through that (512 rows: 25 ms, so 11).
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def usual(x: jax.Array, weight: jax.Array) -> jax.Array:
        flat, last = weight.reshape(-1, x.shape[1]), (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, flat, last, preferred_element_type=dtype)

    def turned(x: jax.Array, weight: jax.Array) -> jax.Array:
        flat = weight.reshape(-1, x.shape[1])
        return jax.lax.optimization_barrier(jnp.matmul(flat, x.T, preferred_element_type=dtype)).T

    def of_two(x: jax.Array, weight: jax.Array) -> jax.Array:
        return usual(jnp.pad(x, ((0, 1), (0, 0))), weight)[:1]

    if x.dtype == jnp.bfloat16:
        on_cpu = of_two if len(x) == 1 else usual
    else:
        on_cpu = usual if len(x) > _FEW_ROWS else turned
    return usual(x, weight) if on_cpu is usual else jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=usual)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SiLU(gate) * up. Of what lies between nothing is kept for the gradient."""
    return jax.nn.silu(gate) * up


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMS norm over the last axis, computed in float32, returned in x's dtype; x alone is kept for the gradient."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * wide.astype(x.dtype)


def inverse_frequencies(config: ModelConfig) -> jax.Array:
    """RoPE's angle per position for each pair of dimensions, float32 [H / 2].

    Llama 3's scaling divides frequencies whose wavelength exceeds original / low_freq_factor by `factor`, keeps those
    below original / high_freq_factor, and interpolates between.

    Rounded to float32 where transformers rounds: at position 4,096 an angle is off by 4,096 times the last bit of its
    frequency, enough to be seen in logits.
    """
    H = config.head_dim
    exponents = (np.arange(0, H, 2) / np.float32(H)).astype(np.float32)
    powers = (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    scaling = config.rope_scaling
    if scaling is None:
        return jnp.asarray(frequencies)
    turns = scaling.original_max_positions * frequencies / np.float32(2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1).astype(np.float32)
    return jnp.asarray(keep * frequencies + (1 - keep) * frequencies / np.float32(scaling.factor))


def rope(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, float32 [B, T, 1, H / 2]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies RoPE to [B, T, heads, H], pairing dimension i with i + H / 2 as Hugging Face does."""
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
    return turned.astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _draw(key: jax.Array, config: ModelConfig, dtype: str) -> dict[str, jax.Array]:
    drawn = {}
    for number, (name, spec) in enumerate(parameter_specs(config).items()):
        if spec.initial == "normal":
            value = 0.02 * jax.random.normal(jax.random.fold_in(key, number), spec.shape, jnp.float32)
        else:
            value = jnp.full(spec.shape, float(spec.initial == "ones"))
        drawn[name] = value.astype(dtype)
    return drawn


def init_model(config: ModelConfig, seed: int, dtype: str = "float32") -> Decoder:
    """A decoder with random weights: normal of scale 0.02, norms 1, biases 0."""
    return Decoder(config, _draw(jax.random.key(seed), config, dtype))
