"""How far a model's distribution over the next token is from another's, without keeping logits of either.

The forward Kullback-Leibler divergence KL(base || model) = sum_v p_base(v) (log p_base(v) - log p(v)), in XLA, a chunk
of the vocabulary at a time as `chunked` has it: a chunk's logits of both are made, used, and made again for the
gradient. The base gets no gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, Float32, Int

from dgr_kernels.partition import Partition
from dgr_kernels.precision import product
from dgr_kernels.token_scores.chunked import chunk_size, gradients, over_chunks


class Divergence(NamedTuple):
    """Of T tokens.

    Attributes:
      log_prob: float32 [T], of the target under the model, in nats; NaN where the target is outside the vocabulary.
      divergence: float32 [T], KL(base || model), in nats.
    """

    log_prob: Float32[Array, " T"]
    divergence: Float32[Array, " T"]


class _Part(NamedTuple):
    """What a part of the vocabulary says; float32 [T], or with a leading axis of parts.

    Attributes:
      log_sum_exp: of the model's logits.
      target: the target's logit, -inf where the target is not in this part.
      base_log_sum_exp: of the base's logits.
      gap: the base's logit less the model's, on average under the base's softmax over the part.
    """

    log_sum_exp: jax.Array
    target: jax.Array
    base_log_sum_exp: jax.Array
    gap: jax.Array

    def merged(self) -> "_Part":
        """Parts on a leading axis -> the whole."""
        of_base = jax.nn.softmax(self.base_log_sum_exp, axis=0)
        return _Part(
            jax.nn.logsumexp(self.log_sum_exp, axis=0),
            self.target.max(0),
            jax.nn.logsumexp(self.base_log_sum_exp, axis=0),
            jnp.sum(of_base * self.gap, axis=0),
        )

    def scores(self) -> Divergence:
        """Where the part is the whole vocabulary."""
        inside = self.target > -jnp.inf
        log_prob = jnp.where(inside, jnp.where(inside, self.target, 0) - self.log_sum_exp, jnp.nan)
        return Divergence(log_prob, self.gap - self.base_log_sum_exp + self.log_sum_exp)


def token_divergence(
    hidden: Float[Array, "T D"],
    unembed: Float[Array, "V D"],
    base_hidden: Float[Array, "T E"],
    base_unembed: Float[Array, "V E"],
    targets: Int[Array, " T"],
    *,
    partition: Partition | None = None,
) -> Divergence:
    """KL(base || model) at each token, and the target's log-probability; differentiable in hidden and unembed.

    Args:
      hidden, unembed: the model's, as `token_scores` takes them.
      base_hidden, base_unembed: the base's, over the same vocabulary; no gradient passes.
      targets: integers [T].
      partition: how the arrays lie on a mesh, as `token_scores` takes it.

    Raises:
      ValueError: shapes that do not fit.
    """
    T, V = hidden.shape[0], unembed.shape[0]
    if base_hidden.shape[0] != T or base_unembed.shape[0] != V or targets.shape != (T,):
        raise ValueError(
            f"hidden {hidden.shape}, unembed {unembed.shape}, base_hidden {base_hidden.shape}, base_unembed "
            f"{base_unembed.shape} and targets {targets.shape} must be of the same tokens and vocabulary"
        )
    arrays = hidden, unembed, base_hidden, base_unembed, targets.astype(jnp.int32)
    if partition is None:
        return _part(*arrays).scores()
    partition.check_rows("hidden", T)
    axis = partition.tensor_axis if V % partition.tensor_ways == 0 else None

    def local(hidden, unembed, base_hidden, base_unembed, targets) -> Divergence:
        if axis is None:
            return _part(hidden, unembed, base_hidden, base_unembed, targets).scores()
        first = jax.lax.axis_index(axis) * unembed.shape[0]
        part: _Part = jax.lax.all_gather(_part(hidden, unembed, base_hidden, base_unembed, targets - first), axis)
        return part.merged().scores()

    rows, vocabulary = partition.rows(), PartitionSpec(axis)
    return partition.run(local, (rows, vocabulary, rows, vocabulary, rows), rows, *arrays)


def _run(hidden, unembed, base_hidden, base_unembed, targets) -> _Part:
    size = chunk_size(hidden.shape[0], unembed.shape[0])

    def of_chunk(first: jax.Array, size: int) -> _Part:
        logits, base = _logits(hidden, unembed, base_hidden, base_unembed, first, size)
        within = targets - first
        inside = (within >= 0) & (within < size)
        target = jnp.take_along_axis(logits, jnp.where(inside, within, 0)[:, None], axis=-1)[:, 0]
        gap = jnp.sum(jax.nn.softmax(base, axis=-1) * (base - logits), axis=-1)
        lse = jax.nn.logsumexp
        return _Part(lse(logits, axis=-1), jnp.where(inside, target, -jnp.inf), lse(base, axis=-1), gap)

    return over_chunks(of_chunk, unembed.shape[0], size).merged()


def _logits(hidden, unembed, base_hidden, base_unembed, first, size: int) -> tuple[jax.Array, jax.Array]:
    """Of the model and of the base, float32 [T, size], from entry `first` on."""
    cut = jax.lax.dynamic_slice_in_dim
    own = product("td,vd->tv", hidden, cut(unembed, first, size))
    return own, product("td,vd->tv", base_hidden, cut(base_unembed, first, size))


def _forward(*arrays):
    out = _run(*arrays)
    return out, (arrays, out)


def _backward(kept, given: _Part):
    (hidden, unembed, base_hidden, base_unembed, targets), out = kept
    size = chunk_size(hidden.shape[0], unembed.shape[0])

    def slopes_of(first: jax.Array, size: int) -> jax.Array:
        logits, base = _logits(hidden, unembed, base_hidden, base_unembed, first, size)
        slopes = given.log_sum_exp[:, None] * jnp.exp(logits - out.log_sum_exp[:, None])
        slopes -= given.gap[:, None] * jnp.exp(base - out.base_log_sum_exp[:, None])
        is_target = jnp.arange(size, dtype=jnp.int32) == (targets - first)[:, None]
        return slopes + jnp.where(is_target, given.target[:, None], 0)

    by_ours = gradients(slopes_of, hidden, unembed, size)
    return *by_ours, jnp.zeros_like(base_hidden), jnp.zeros_like(base_unembed), None


_part: Any = jax.custom_vjp(_run)
_part.defvjp(_forward, _backward)
