"""What token scoring returns, and how scores of parts of a vocabulary become scores of the whole."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32


class TokenScores(NamedTuple):
    """Scores of T targets.

    Attributes:
      log_prob: float32 [T], log-probability of the target, in nats; NaN where the target is outside the vocabulary.
      log_sum_exp: float32 [T], of the row's logits.
      is_greedy: bool [T], whether the target's logit is the row's maximum.
      entropy: float32 [T] in nats, or None where it was not asked for.
    """

    log_prob: Float32[Array, " T"]
    log_sum_exp: Float32[Array, " T"]
    is_greedy: Bool[Array, " T"]
    entropy: Float32[Array, " T"] | None


class Partial(NamedTuple):
    """What one part of the vocabulary says about T tokens; all float32 [T], or with a leading axis of parts.

    Every implementation computes this. Parts are split among a kernel's thread blocks, or among a mesh's devices.

    Attributes:
      log_sum_exp: of the part's logits.
      target: the target's logit, -inf where the target is not in this part.
      highest: the largest logit; no gradient passes.
      mean: of the part's logits, weighted by their softmax over the part; None where no entropy is wanted.
    """

    log_sum_exp: jax.Array
    target: jax.Array
    highest: jax.Array
    mean: jax.Array | None

    @classmethod
    def of_logits(cls, logits: jax.Array, targets: jax.Array, with_entropy: bool) -> "Partial":
        """What logits [T, part] say, with targets counted from the part's first entry."""
        log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
        inside = (targets >= 0) & (targets < logits.shape[-1])
        target = jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[:, None], axis=-1)[:, 0]
        mean = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1) if with_entropy else None
        highest = jax.lax.stop_gradient(logits.max(-1))
        return cls(log_sum_exp, jnp.where(inside, target, -jnp.inf), highest, mean)

    def merged(self) -> "Partial":
        """Parts on a leading axis -> the whole."""
        log_sum_exp = jax.nn.logsumexp(self.log_sum_exp, axis=0)
        mean = None
        if self.mean is not None:
            mean = jnp.sum(jax.nn.softmax(self.log_sum_exp, axis=0) * self.mean, axis=0)
        return Partial(log_sum_exp, self.target.max(0), self.highest.max(0), mean)

    def scores(self) -> TokenScores:
        """The scores, where the part is the whole vocabulary."""
        inside = self.target > -jnp.inf
        log_prob = jnp.where(inside, jnp.where(inside, self.target, 0) - self.log_sum_exp, jnp.nan)
        entropy = None if self.mean is None else self.log_sum_exp - self.mean
        return TokenScores(log_prob, self.log_sum_exp, self.target >= self.highest, entropy)


class SlopeFactors(NamedTuple):
    """What the derivatives by logits are made of; all float32 [T] or stacked chunks of it.

    With p the softmax over the part: d log_sum_exp / d logit = p, and d mean / d logit = p (1 + logit - mean).

    Attributes:
      log_sum_exp: of the part's logits.
      of_target: derivative of the loss by the target's logit.
      constant: factor of p.
      of_mean: factor of p times the logit.
    """

    log_sum_exp: jax.Array
    of_target: jax.Array
    constant: jax.Array
    of_mean: jax.Array

    @classmethod
    def of(cls, partial: Partial, given: Partial) -> Self:
        """The factors, given the forward pass's result and the loss's derivatives by it."""
        if partial.mean is None or given.mean is None:
            return cls(partial.log_sum_exp, given.target, given.log_sum_exp, jnp.zeros_like(given.target))
        constant = given.log_sum_exp + given.mean * (1 - partial.mean)
        return cls(partial.log_sum_exp, given.target, constant, given.mean)

    def slopes(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss's derivatives by logits [T, part], with targets counted from the part's first entry."""
        log_sum_exp, of_target, constant, of_mean = (x[:, None] for x in self)
        is_target = jnp.arange(logits.shape[1], dtype=jnp.int32) == targets[:, None]
        return jnp.exp(logits - log_sum_exp) * (constant + of_mean * logits) + jnp.where(is_target, of_target, 0)
