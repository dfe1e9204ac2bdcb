"""Token scores over a mesh: tokens spread over some axes, the vocabulary over another."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dgr_kernels.token_scores.api import check, partial_scores
from dgr_kernels.token_scores.scores import TokenScores


def sharded_token_scores(
    hidden: jax.Array,
    unembed: jax.Array,
    targets: jax.Array,
    *,
    mesh: Mesh,
    token_axes: str | tuple[str, ...] | None,
    vocabulary_axis: str | None,
    with_entropy: bool = False,
    implementation: str | None = None,
    blocks: Any = None,
) -> TokenScores:
    """`token_scores` where no device holds the whole vocabulary.

    Each device scores its tokens against its part; three or four floats per token and part travel, nothing else.

    Args:
      hidden, unembed, targets, with_entropy, implementation, blocks: as `token_scores` takes them.
      mesh: of the devices.
      token_axes: mesh axes over which T is spread; T must be a multiple of their product.
      vocabulary_axis: mesh axis over which V is spread, V a multiple of its size; None where every device has all.

    Returns:
      `TokenScores`, spread over `token_axes`.

    Raises:
      ValueError: as `token_scores`, or a size that its axes do not divide.
    """
    check(hidden, unembed, targets)
    for name, size, axes in (("hidden", hidden.shape[0], token_axes), ("unembed", unembed.shape[0], vocabulary_axis)):
        ways = _ways(mesh, axes)
        if size % ways:
            raise ValueError(f"{name} has {size} rows, not a multiple of the {ways} devices of mesh axes {axes}")

    def local(hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> TokenScores:
        if vocabulary_axis is None:
            return partial_scores(hidden, unembed, targets, with_entropy, implementation, blocks).scores()
        first = jax.lax.axis_index(vocabulary_axis) * unembed.shape[0]
        part = partial_scores(hidden, unembed, targets - first, with_entropy, implementation, blocks)
        return jax.lax.all_gather(part, vocabulary_axis).merged().scores()

    tokens, vocabulary = PartitionSpec(token_axes), PartitionSpec(vocabulary_axis)
    # Replication is not tracked through a kernel's own derivative.
    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, vocabulary, tokens), out_specs=tokens, check_vma=False)(
        hidden, unembed, targets.astype(jnp.int32)
    )


def _ways(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    ways = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        ways *= mesh.shape[axis]
    return ways
